"""Whole models in our engine and in the programs to beat: tokens a second, memory, and time to start.

    benchmarks/install_peers.sh                  # once: llama.cpp, OpenVINO GenAI, SmolLM2
    python benchmarks/end_to_end.py              # the two models with real weights, all programs installed
    python benchmarks/end_to_end.py gemma-3-270m --prompts 128 512 2048 --together 4 8 16
    python benchmarks/end_to_end.py gemma-3-270m --start
    python benchmarks/end_to_end.py phi-3-mini --forms oats-int8 oats-int4 llama-q8_0 openvino-int8

gemma-3-270m (from `make demo`) and smollm2-135m have real weights, the same in all programs, and get the
tokens of a text. The other models have the published shapes and random weights: their text is nonsense, but
takes as long.

Each form of a model runs in a process of its own, on the same CPUs. All that fit into memory together take
turns; a process is stopped while another is timed. The read bandwidth is measured between the turns. What
the programs read is made once, under .bench/models/. vLLM is not among them.

Linux only: memory is the kernel's count in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from model_forms import DEMO, FORMS, IN_TRANSFORMERS, REAL, SHAPES, Forms, missing, start
from model_process import ModelProcess, memory
from process import PeerError
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers.utils import logging

from oats.bench.contenders import read_time
from oats.bench.model_speed import model_speeds
from oats.bench.spread import Spread
from oats.cli.console import human_bytes, results
from oats.kernels.isa import active_isa

MODELS = [*REAL, *SHAPES]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default: all that are installed")
    parser.add_argument("--transformers", action="store_true", help="ours in transformers too")
    parser.add_argument("--compression", type=float, default=0.5, help="of the random models (default 0.5)")
    parser.add_argument(
        "--head", choices=["int8", "exact"], default="int8", help="the output head of ours with codes"
    )
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[128], metavar="N",
        help="tokens of prompts; decoding goes on from the first (default 128)",
    )  # fmt: skip
    parser.add_argument(
        "--together", type=int, nargs="*", default=[], metavar="N", help="texts that are decoded at once"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="generated tokens (default 32)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed runs of each form (default 5)")
    parser.add_argument(
        "--start", action="store_true", help="time each program from its start to the first token instead"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--demo", type=Path, default=DEMO, help="where make demo left its models")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    models = options.models or list(REAL)
    unknown = sorted(set(models) - set(MODELS))
    if unknown:
        parser.error(f"unknown model {unknown[0]}; choose from {', '.join(MODELS)}")
    if options.start and set(models) - set(REAL):
        parser.error("--start needs models that are in files: those with real weights")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    # The processes inherit both.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    rows: list[dict[str, Any]] = []
    for model in models:
        forms = Forms(model, options.demo, options.compression, options.head)
        try:
            for group in groups(forms, chosen(model, options), model):
                rows += starts(model, forms, group, options) if options.start else measure(
                    model, forms, group, options
                )  # fmt: skip
        except PeerError as error:
            sys.exit(f"{parser.prog}: {error}")
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows, options)


def chosen(model: str, options: argparse.Namespace) -> list[str]:
    """The forms of a model to measure.

    Raises:
        PeerError: one that was asked for is not installed, or none is.
    """
    asked = options.forms or [name for name in FORMS if name not in IN_TRANSFORMERS]
    if options.transformers:
        asked = [*asked, *(f"{name}-transformers" for name in asked if f"{name}-transformers" in FORMS)]
    lacking = {name: reason for name in asked if (reason := missing(model, FORMS[name], options.demo))}
    if (options.forms and lacking) or len(lacking) == len(asked):
        raise PeerError(next(iter(lacking.values())))
    for reason in sorted(set(lacking.values())):
        print(f"{model}: {reason}; left out", file=sys.stderr)
    return [name for name in asked if name not in lacking]


def groups(forms: Forms, names: Sequence[str], model: str) -> Iterator[list[str]]:
    """What is in memory together: all forms if they fit, else one at a time."""
    free = memory("MemAvailable", "/proc/meminfo")
    needed = {name: forms.expected_bytes(FORMS[name]) for name in names}
    if sum(needed.values()) < 0.9 * free:
        yield list(needed)
        return
    for name, size in needed.items():
        if size < 0.95 * free:
            yield [name]
        else:
            more = human_bytes(size - 0.95 * free)
            print(f"{model} {name} left out: it needs {more} more memory", file=sys.stderr)


def measure(
    model: str, forms: Forms, names: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Load forms of one model and time them in turn."""
    requests = {name: forms.load_request(FORMS[name]) for name in names}
    context = max(options.prompts) + options.new_tokens
    with ExitStack() as stack:
        networks = {name: stack.enter_context(closing(start(FORMS[name]))) for name in names}
        for name, network in networks.items():
            network.load(requests[name], context)
        return timed(model, forms, networks, options)


def timed(
    model: str, forms: Forms, networks: Mapping[str, ModelProcess], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of programs that have a model loaded."""
    read = read_time()
    reads: list[float] = []

    def between(*_: Any) -> None:
        reads.append(1e9 * read())

    numbers = {"repetitions": options.repetitions, "progress": between}
    first, *others = options.prompts
    speeds = model_speeds(networks, forms.prompt(first), new_tokens=options.new_tokens, **numbers)
    texts = {name: list(network.tokens) for name, network in networks.items()}
    peaks = {name: network.memory("VmHWM") for name, network in networks.items()}
    prefill = {name: {first: speed.prefill} for name, speed in speeds.items()}
    for length in others:
        found = model_speeds(networks, forms.prompt(length), new_tokens=2, **numbers)
        for name, speed in found.items():
            prefill[name][length] = speed.prefill
    together = at_once(networks, forms, options, between)
    bandwidth = Spread.of(reads)
    rows = []
    for name, network in networks.items():
        decode, size = speeds[name].decode, network.bytes_per_token
        rows.append(
            {
                "model": model,
                "form": name,
                "runtime": FORMS[name].runtime,
                "kind": FORMS[name].kind,
                "version": network.version,
                "weights": "real" if model in REAL else "random",
                "head": options.head if "int" in name and FORMS[name].is_ours else None,
                "decode_tokens_per_s": asdict(decode),
                "together_tokens_per_s": {count: asdict(rate) for count, rate in together[name].items()},
                "prefill_tokens_per_s": {length: asdict(rate) for length, rate in prefill[name].items()},
                "same_tokens_as_dense": same_tokens(texts, name) if model in REAL else None,
                "bytes_per_token": size,
                "peak_bytes": peaks[name],
                "read_bytes_per_s": asdict(bandwidth),
                "share_of_bandwidth": None if size is None else size * decode.median / bandwidth.median,
                "new_tokens": options.new_tokens,
                "repetitions": options.repetitions,
                "in_turn_with": [other for other in networks if other != name],
                "threads": options.threads,
                "isa": active_isa(),
            }
        )
    return rows


def at_once(
    networks: Mapping[str, ModelProcess], forms: Forms, options: argparse.Namespace, between: Any
) -> dict[str, dict[int, Spread]]:
    """Form → number of texts → tokens a second of all of them; of programs in turn."""
    found: dict[str, dict[int, Spread]] = {name: {} for name in networks}
    able = {name: network for name, network in networks.items() if name not in IN_TRANSFORMERS}
    prompt = forms.prompt(options.prompts[0]).tolist()
    for count in options.together:
        rates: dict[str, list[float]] = {name: [] for name in able}
        for repetition in range(options.repetitions + 1):
            for name, network in able.items():
                rate = network.together([prompt] * count, options.new_tokens)
                if repetition > 0:
                    rates[name].append(rate)
                between()
        for name, values in rates.items():
            found[name][count] = Spread.of(values)
    return found


def same_tokens(texts: Mapping[str, Sequence[int]], name: str) -> int | None:
    """How many of a text's first tokens are those of our dense model; None if that was not run."""
    if "dense" not in texts:
        return None
    pairs = zip(texts["dense"], texts[name], strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(texts[name]))


def starts(
    model: str, forms: Forms, names: Sequence[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Seconds from the start of a process to its first token; what it reads is in the page cache."""
    requests = {name: forms.load_request(FORMS[name]) for name in names}
    prompt = forms.prompt(options.prompts[0])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rows = {}
    for repetition in range(options.repetitions + 1):
        for name, request in requests.items():
            started = time.perf_counter()
            with closing(start(FORMS[name])) as network:
                network.load(request, len(prompt) + 1)
                network.timed_generate(prompt, 1)
                if repetition > 0:
                    seconds[name].append(time.perf_counter() - started)
                rows[name] = {"model": model, "form": name, "runtime": FORMS[name].runtime}
                rows[name] |= {"kind": FORMS[name].kind, "peak_bytes": network.memory("VmHWM")}
    return [row | {"start_seconds": asdict(Spread.of(seconds[name]))} for name, row in rows.items()]


def show(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Print a table for each model."""
    console = results()
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        console.print(start_table(model, of_model) if options.start else table(model, of_model))
    if options.start:
        console.print(f"Median (p10–p90) of {options.repetitions} starts, {options.threads} threads.")
        return
    console.print(
        f"Tokens a second: median (p10–p90) of {options.repetitions} runs in turn, greedy, prompt of "
        f"{options.prompts[0]} tokens, {options.new_tokens} new ones; {options.threads} threads, ISA "
        f"{rows[0]['isa']}; memory was read at {rows[0]['read_bytes_per_s']['median'] / 1e9:.1f} GB/s. × is "
        "ours over the fastest other program of the column. The share of the bandwidth is of the weights "
        "that a token reads. Memory: the most that the process ever held, with its libraries."
    )


def label(row: Mapping[str, Any]) -> str:
    """What a row is called."""
    kind = row["kind"].replace("dense", "dense bf16").replace("oats-", "oats ")
    return f"{row['runtime']}: {'oats bf16' if kind == 'oats' else kind}"


def table(model: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The speeds of the forms of one model."""
    made = Table(title=model, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("form", no_wrap=True)
    columns = {"decode": lambda row: row["decode_tokens_per_s"]}
    for count in rows[0]["together_tokens_per_s"]:
        columns[f"{count} at once"] = lambda row, count=count: row["together_tokens_per_s"].get(count)
    for length in rows[0]["prefill_tokens_per_s"]:
        columns[f"prefill {length}"] = lambda row, length=length: row["prefill_tokens_per_s"][length]
    for name in (*columns, "read a token", "of bandwidth", "memory", "as dense"):
        made.add_column(name, justify="right", no_wrap=True)
    rivals = [row for row in rows if not FORMS[row["form"]].is_ours]
    best = {name: max((s["median"] for s in map(of, rivals) if s), default=0) for name, of in columns.items()}
    for row in rows:
        cells = []
        for name, of in columns.items():
            speed = of(row)
            against = best[name] if FORMS[row["form"]].is_ours else 0
            cells.append("" if speed is None else shown(speed, against))
        size, share, same = row["bytes_per_token"], row["share_of_bandwidth"], row["same_tokens_as_dense"]
        cells.append("" if size is None else human_bytes(size))
        cells.append("" if share is None else f"{share:.0%}")
        cells.append(human_bytes(row["peak_bytes"]))
        cells.append("" if same is None else f"{same} of {row['new_tokens']}")
        made.add_row(label(row), *cells)
    return made


def shown(speed: Mapping[str, float], rival: float) -> str:
    """A speed, and how many times that of the fastest rival it is; 0 for none."""
    digits = 0 if speed["median"] >= 100 else 1
    text = f"{speed['median']:.{digits}f} ({speed['p10']:.{digits}f}–{speed['p90']:.{digits}f})"
    return f"{text} {speed['median'] / rival:.2f}×" if rival else text


def start_table(model: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """How long the forms of one model take to their first token."""
    made = Table(title=model, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    made.add_column("form", no_wrap=True)
    made.add_column("s to the first token", justify="right", no_wrap=True)
    made.add_column("memory", justify="right", no_wrap=True)
    for row in rows:
        took = row["start_seconds"]
        seconds = f"{took['median']:.2f} ({took['p10']:.2f}–{took['p90']:.2f})"
        made.add_row(label(row), seconds, human_bytes(row["peak_bytes"]))
    return made


if __name__ == "__main__":
    main()
