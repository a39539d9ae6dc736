"""Decoding and prefill of one model in the engine and in transformers' own `generate`, in turns.

    python benchmarks/engine.py DIR [--prompt 128] [--new 32] [--threads 2]

DIR is a dense or compressed model that the engine knows (docs/engine.md). Prints the median, least and most
of five runs, and the engine's tokens per second for several sequences at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oats.checkpoint.loading import load_model
from oats.engine.engine import Engine
from oats.engine.most_likely import most_likely
from oats.kernels.isa import active_isa

RUNS = 5
BATCHES = (4, 8, 16)


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def in_engine(engine: Engine, ids: list[int], new: int) -> tuple[float, float]:
    """Prefill and decode tokens per second."""
    tokens = engine.new()
    logits: Tensor = torch.empty(0)

    def prefill() -> None:
        nonlocal logits
        logits = engine.prefill(tokens, ids)

    def decode() -> None:
        nonlocal logits
        for _ in range(new):
            logits = engine.step([(tokens, [most_likely(logits)])])[0]

    speeds = len(ids) / seconds(prefill), new / seconds(decode)
    engine.release(tokens)
    return speeds


def in_transformers(model: Any, ids: list[int], new: int) -> tuple[float, float]:
    """The same by `generate`: decoding is what more tokens take than one."""
    prompt = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False}

    def generate(count: int) -> float:
        return seconds(lambda: model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options))

    first = generate(1)
    return len(ids) / first, new / (generate(new + 1) - first)


def together(engine: Engine, ids: list[int], count: int, new: int) -> float:
    """Tokens per second of `count` sequences that are decoded in one step each."""
    sequences = [engine.new() for _ in range(count)]
    for tokens in sequences:
        engine.prefill(tokens, ids)
    taken = seconds(lambda: [engine.step([(tokens, [7]) for tokens in sequences]) for _ in range(new)])
    for tokens in sequences:
        engine.release(tokens)
    return count * new / taken


def shown(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):7.1f} ({min(values):.1f}–{max(values):.1f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = load_model(options.model)
    engine = Engine(model)
    if engine.reason is not None:
        parser.error(engine.reason)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(5, vocabulary, (options.prompt,), generator=generator)
    runs: dict[str, list[tuple[float, float]]] = {"engine": [], "transformers": []}
    with torch.inference_mode():
        for _ in range(RUNS):
            runs["engine"].append(in_engine(engine, ids.tolist(), options.new))
            runs["transformers"].append(in_transformers(model, ids.tolist(), options.new))
    print(f"{options.threads} threads, {active_isa()}, prompt {options.prompt}, {options.new} new tokens")
    for name, pairs in runs.items():
        prefill, decode = zip(*pairs, strict=True)
        print(f"{name:<13} decode {shown(list(decode))} tokens/s   prefill {shown(list(prefill))} tokens/s")
    at_once = [f"{n}: {together(engine, ids.tolist(), n, options.new):.0f}" for n in BATCHES]
    print(f"engine, tokens/s of so many sequences at once  {', '.join(at_once)}")


if __name__ == "__main__":
    main()
