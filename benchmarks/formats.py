"""The formats of one model in one table and one picture: perplexity against bytes, and against speed.

    oats compare MODEL --out DIR …                  # the cells; docs/quality.md has the command for Gemma
    python benchmarks/formats.py DIR
    python benchmarks/formats.py DIR --gguf FILE    # with llama.cpp, which benchmarks/install_peers.sh builds

All formats are timed in turn, with random weights: the speed does not depend on the values. A dense format of
GGUF is timed in llama.cpp, with all linear layers in that format; FILE is any GGUF file of the model.
Embedding and head have eight bits (codes, or Q8_0), except in the dense model. The speed is that of the whole
model, so it includes the software around the layers: transformers for ours. formats.md, formats.png,
formats.svg and speeds.json are written to DIR; a second run reuses speeds.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llama_files import BENCH, LlamaModel
from transformers import AutoConfig
from transformers.utils import logging

from oats import OatsConfig
from oats.bench.model_speed import decode_time, model_speeds
from oats.bench.random_model import random_model
from oats.checkpoint.atomic import write_text
from oats.compression.head import quantize_head_
from oats.config import PRUNING
from oats.evaluate.cells import DENSE, Cell, Cells, is_dense
from oats.evaluate.comparison import split_codes
from oats.evaluate.comparison_plot import draw
from oats.evaluate.comparison_table import header, rows
from oats.kernels.isa import active_isa

# Format of a dense cell → file type of llama.cpp whose layers have this format.
GGUF = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K_S"}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, metavar="DIR", help="what `oats compare` wrote")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model for llama.cpp")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default 32)")
    parser.add_argument("--new-tokens", type=int, default=32, help="generated tokens (default 32)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each form (default 5)")
    options = parser.parse_args()
    if options.gguf is not None and not (BENCH / "version").exists():
        parser.error("llama.cpp is not built; benchmarks/install_peers.sh does it")
    logging.set_verbosity_error()
    settings = json.loads((options.comparison / "settings.json").read_text())
    cells = Cells(options.comparison, settings).finished()
    speeds = measured(cells, settings, options)
    by_cell = {(c.method, c.compression): speeds[name] for c in cells if (name := form(c)) in speeds}
    folder = options.comparison
    write_text(folder / "formats.md", table(cells, by_cell, settings, options))
    draw(
        cells,
        [folder / "formats.png", folder / "formats.svg"],
        {which: speed["decode"] for which, speed in by_cell.items()},
    )
    print((folder / "formats.md").read_text())


def form(cell: Cell) -> str:
    """Name of what a cell is timed as. Cells with one name have one speed."""
    if is_dense(cell):
        return cell.method
    method, codes = split_codes(cell.method)
    kind = "pruned" if method in PRUNING else "oats"
    return f"{kind}{codes} {cell.compression:g}"


def measured(
    cells: Sequence[Cell], settings: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Form → decoded tokens a second, and if known milliseconds of a token in the linear layers."""
    file = options.comparison / "speeds.json"
    speeds: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    wanted = dict.fromkeys(form(cell) for cell in cells)
    if any(name not in speeds for name in wanted if runs(name, options)):
        # Time all of them again: only times of one run can be compared.
        with tempfile.TemporaryDirectory() as folder:
            networks = {
                name: make(name, settings, options, Path(folder)) for name in wanted if runs(name, options)
            }
        prompt = torch.randint(1000, (options.prompt,), generator=torch.Generator().manual_seed(0))
        numbers = {"new_tokens": options.new_tokens, "repetitions": options.repetitions}
        found = model_speeds(networks, prompt, **numbers)
        speeds = {name: {"decode": speed.decode.median} for name, speed in found.items()}
        for name, network in networks.items():
            if isinstance(network, LlamaModel):
                network.close()
            else:
                parts = decode_time(network, prompt, new_tokens=options.new_tokens)
                speeds[name]["linear_ms"] = 1e3 * parts.linear
        write_text(file, json.dumps(speeds, indent=2) + "\n")
    return speeds


def runs(name: str, options: argparse.Namespace) -> bool:
    """True if there is software here that runs the form."""
    dense, _, kind = name.partition("+")
    return dense != DENSE or not kind or (kind in GGUF and options.gguf is not None)


def make(name: str, settings: dict[str, Any], options: argparse.Namespace, folder: Path) -> Any:
    """The model in a form, ready to be timed."""
    architecture = AutoConfig.from_pretrained(settings["model"])
    if name == DENSE:
        return random_model(architecture, None)
    if name.startswith(f"{DENSE}+"):
        kind = GGUF[name.removeprefix(f"{DENSE}+")]
        network, file = LlamaModel(), folder / f"{kind}.gguf"
        network.quantize(options.gguf, file, kind, embedding="Q8_0", pure=True)
        network.load({"file": str(file)}, options.prompt + options.new_tokens)
        return network
    kind, compression = name.split()
    kind, codes = split_codes(kind)
    config = OatsConfig(
        compression=float(compression),
        rank_ratio=0 if kind == "pruned" else settings["rank ratio"],
        pattern=settings["pattern"],
        values=codes.removeprefix("+") or None,
    )
    model = random_model(architecture, config)
    quantize_head_(model)
    return model


def table(
    cells: Sequence[Cell],
    speeds: dict[tuple[str, float], dict[str, float]],
    settings: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """The table of the comparison with two more columns, and the settings."""

    def shown(cell: Cell, key: str, digits: int) -> str:
        value = speeds.get((cell.method, cell.compression), {}).get(key)
        return "" if value is None else f"{value:.{digits}f}"

    names = [*header(cells)[:-1], "tokens/s", "ms in linear layers"]
    lines = [names, ["---", "---", *["---:"] * (len(names) - 2)]]
    for cell, row in zip(cells, rows(cells), strict=True):
        lines.append([*row[:-1], shown(cell, "decode", 1), shown(cell, "linear_ms", 2)])
    settings = {
        **settings,
        "speed": f"median of {options.repetitions} runs in turn, batch 1, prompt of {options.prompt} tokens, "
        f"{options.new_tokens} new ones, {torch.get_num_threads()} threads, ISA {active_isa()}; "
        "embedding and head of eight bits but in the dense model",
    }
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return text + "\n\n" + "\n".join(f"- {name}: {value}" for name, value in settings.items()) + "\n"


if __name__ == "__main__":
    main()
