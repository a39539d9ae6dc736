"""Time ``generate`` eagerly, and with ``torch.compile`` and a static cache, in turn.

    python examples/compiled_generation.py .demo/oats-50 .demo/dense-bf16

torch's default backend needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from oats.bench.model_speed import model_speeds
from oats.bench.spread import Spread
from oats.cli.console import progress_bar, results, status
from oats.compression.calibration_text import builtin_text
from oats.kernels.isa import active_isa

PROMPT_TOKENS, NEW_TOKENS = 64, 32


def load(directory: str, compiled: bool) -> Any:
    """A model; if `compiled`, its first ``generate`` compiles it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    if compiled:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, fullgraph=True)
    return model


def shown(speed: Spread) -> str:
    """Median, 10th and 90th percentile as text."""
    return f"{speed.median:.1f} ({speed.p10:.1f}–{speed.p90:.1f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="DIR", help="model directory, compressed or dense")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each, alternating (5)")
    options = parser.parse_args()

    models, seconds = {}, {}
    for directory in options.models:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(builtin_text("second").content, return_tensors="pt").input_ids[0, :PROMPT_TOKENS]
        for way in ("eager", "compiled"):
            with status(f"First run of {directory}, {way}"):
                model = models[directory, way] = load(directory, way == "compiled")
                started = time.perf_counter()
                model.generate(ids[None], max_new_tokens=NEW_TOKENS, do_sample=False)
                seconds[directory, way] = time.perf_counter() - started
    with progress_bar("Timing generation") as bar:
        speeds = model_speeds(
            models, ids, new_tokens=NEW_TOKENS, repetitions=options.repetitions,
            progress=lambda done, total, name: bar.update(done, total, " ".join(name)),
        )  # fmt: skip

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("model", "generate"):
        table.add_column(column)
    for column in ("decode tokens/s", "prefill tokens/s", "first run, s"):
        table.add_column(column, justify="right")
    for name, speed in speeds.items():
        directory, way = name
        table.add_row(
            Path(directory).name, way, shown(speed.decode), shown(speed.prefill), f"{seconds[name]:.1f}"
        )
    console = results()
    console.print(table)
    console.print(
        f"Median (p10–p90) of {options.repetitions} alternating runs, batch 1, greedy, prompt "
        f"{PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones; {torch.get_num_threads()} threads, "
        f"ISA {active_isa()}."
    )


if __name__ == "__main__":
    main()
