"""What a call of a layer costs without its arithmetic: from Python to the kernel and back.

    python benchmarks/call_overhead.py

A 16 × 16 layer with one row of x on one thread has almost no arithmetic. Prints microseconds per call of the
layer, of the kernel alone and of `torch.nn.Linear`: the mean of 20 000 calls, the least of 15 such means.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch
from torch import nn

import oats
from oats import _core

CALLS, REPETITIONS = 20_000, 15


def microseconds(call: Callable[[], object]) -> float:
    """Microseconds of one call, the least of some means."""
    return min(timeit.repeat(call, number=CALLS, repeat=REPETITIONS)) / CALLS * 1e6


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    linear = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    layer = oats.SparseLowRankLinear.from_linear(linear, torch.ones(16), oats.OatsConfig())
    x = torch.randn(1, 16, dtype=torch.bfloat16)
    with torch.inference_mode():
        y = layer(x)
        assert layer.packed is not None
        numbers = layer.packed.data_ptr(), x.data_ptr(), 1, 16, 0, y.data_ptr(), 16, 1
        calls: dict[str, Callable[[], object]] = {
            "torch.nn.Linear": lambda: linear(x),
            "SparseLowRankLinear": lambda: layer(x),
            "its kernel alone": lambda: _core.sparse_low_rank_linear(*numbers),
        }
        for name, call in calls.items():
            print(f"{name:<20} {microseconds(call):5.2f} µs")


if __name__ == "__main__":
    main()
