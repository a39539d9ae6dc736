"""Contenders: implementations of a linear layer that a benchmark times against each other.

A contender is ours, torch's, or a peer: other software, in a process of its own (`benchmarks/`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from oats._version import __version__
from oats.bench.random_layer import Form, RandomWeight
from oats.config import EXACT, Storage
from oats.decomposition.codes import quantize_tensors
from oats.format.layer_spec import DTYPES as FORMAT_DTYPES
from oats.kernels.isa import active_isa
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

# Calls cycle through copies of the weight that fill at least this much memory, and 4 times the last-level
# cache. So no cache holds the weight, as in a model, where the other layers have displaced it.
_CYCLED_BYTES = 200_000_000

# Each copy is a module; small weights would need millions of them.
_MOST_COPIES = 1000

Dtype = Literal["bf16", "fp32"]
DTYPES: tuple[Dtype, ...] = ("bf16", "fp32")


@dataclass(frozen=True)
class Loaded:
    """What a contender has loaded.

    Attributes:
        weight_bytes: bytes of one weight that a product reads; None if that is not known.
        copies: number of copies of the weight; each call takes the next one. There are not enough copies of a
            layer of 200 kB or less: it stays in a cache.
    """

    weight_bytes: int | None
    copies: int


class Contender(Protocol):
    """One implementation of a linear layer, which is timed against others.

    Attributes:
        name: name of the software, such as "torch".
        dtype: dtype of the weight and the input that it gets.
        stored_dtype: dtype in which it stores the weight, such as "q8_0".
        isa: instruction set that it must use; "" if it chooses.
        form: form of the weight that it takes.
        compression: compression of that weight; None means that of the run.
        tolerance: largest error that is accepted, in units of `Reference.scale`.
        batches: batch sizes to time it at; None means all.
    """

    name: str
    version: str
    dtype: Dtype
    stored_dtype: str
    isa: str
    form: Form
    compression: float | None
    tolerance: float
    batches: Collection[int] | None

    def load(self, weight: RandomWeight) -> Loaded:
        """Load a weight, in more copies than a cache holds, and drop the one before."""

    def output(self, x: Tensor) -> Tensor:
        """The product with `x` (batch, d_in). The calls of :meth:`time` take the same input."""

    def time(self, calls: int, warm_up: int) -> list[float]:
        """Milliseconds of each of `calls` calls, after `warm_up` calls that are not timed."""

    def close(self) -> None:
        """Free all memory."""


# Largest error that is accepted, in units of Reference.scale. An output of a random layer is normally
# distributed with that standard deviation, so the largest of millions is 6 times as large. bf16 rounds the
# output and V x with a relative error of 2^-9. fp32 adds up to 16384 products, and rounds each partial sum
# with 2^-24. Codes round a weight with an error of some hundredths (int8), or of an eighth of its range
# (int4).
TOLERANCES = {"bf16": 2.0**-5, "fp32": 2.0**-14, "int8": 2.0**-4, "int4": 0.75}


class InProcess:
    """A contender that is a module of this process."""

    batches: Collection[int] | None = None

    def __init__(
        self, name: str, version: str, dtype: Dtype, form: Form,
        make: Callable[[RandomWeight], Iterator[nn.Module]], *,
        isa: str = "", stored_dtype: str | None = None, compression: float | None = None,
    ) -> None:  # fmt: skip
        self.name, self.version, self.dtype, self.form, self.isa = name, version, dtype, form, isa
        self.stored_dtype = stored_dtype or dtype
        self.compression, self.tolerance = compression, TOLERANCES[self.stored_dtype]
        self._make = make
        self._layers: list[nn.Module] = []
        self._x, self._next = torch.empty(0), 0

    def load(self, weight: RandomWeight) -> Loaded:
        """See `Contender`."""
        self._layers = []
        supply = self._make(weight)
        first = next(supply)
        size = _weight_bytes(first)
        copies = min(math.ceil(cycled_bytes() / size), _MOST_COPIES)
        self._layers = [first, *(next(supply) for _ in range(copies - 1))]
        return Loaded(size, copies)

    def output(self, x: Tensor) -> Tensor:
        """See `Contender`."""
        self._x = x
        with torch.inference_mode():
            result: Tensor = self._layers[0](x)
            return result

    def time(self, calls: int, warm_up: int) -> list[float]:
        """See `Contender`."""
        taken = []
        with torch.inference_mode():
            for call in range(-warm_up, calls):
                layer = self._layers[self._next % len(self._layers)]
                self._next += 1
                start = time.perf_counter()
                layer(self._x)
                seconds = time.perf_counter() - start
                if call >= 0:
                    taken.append(1e3 * seconds)
        return taken

    def close(self) -> None:
        """See `Contender`."""
        self._layers, self._x = [], torch.empty(0)


def compressed(
    dtype: Dtype, *, isa: str | None = None, form: Form = "oats", storage: Storage = EXACT,
    compression: float | None = None,
) -> Contender:  # fmt: skip
    """`SparseLowRankLinear`, packed for `isa` (None: the best one), its numbers stored as `storage` says.

    `compression` gives it a weight of another compression than that of the run.

    >>> compressed("bf16", form="unstructured").form
    'unstructured'
    """
    isa = active_isa() if isa is None else isa

    def make(weight: RandomWeight) -> Iterator[nn.Module]:
        tensors, d_in = weight.canonical(), weight.sparse.shape[1]
        if storage.has_codes:
            tensors = quantize_tensors(tensors, d_in, storage)
        while True:
            with _packing_for(isa):
                layer = SparseLowRankLinear.from_canonical(
                    tensors, d_in, storage=storage, dtype=weight.sparse.dtype
                )
            yield layer

    stored_dtype = None if storage.values == "exact" else storage.values
    return InProcess(
        "oats", __version__, dtype, form, make, isa=isa, stored_dtype=stored_dtype, compression=compression
    )


def torch_dense(dtype: Dtype) -> Contender:
    """`torch.nn.Linear`.

    >>> torch_dense("fp32").tolerance < 1e-4
    True
    """

    def make(weight: RandomWeight) -> Iterator[nn.Module]:
        d_out, d_in = weight.sparse.shape
        while True:
            layer = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=weight.sparse.dtype)
            layer.weight = nn.Parameter(weight.sparse.clone(), requires_grad=False)
            yield layer

    return InProcess("torch", torch.__version__, dtype, "dense", make)


def read_time(megabytes: int = 32) -> Callable[[], float]:
    """A function that reads memory which no cache holds, by torch's sum with all threads, and returns GB/s.

    >>> read_time()() > 0
    True
    """
    # A piece is so large that the time to start the threads does not count.
    piece = megabytes * 1_000_000
    supply = itertools.cycle(torch.ones(cycled_bytes() // 4).split(piece // 4)[:-1])

    def read() -> float:
        part = next(supply)
        start = time.perf_counter()
        part.sum()
        return piece / (time.perf_counter() - start) / 1e9

    return read


def peak_gflops(dtype: Dtype, size: int = 2048, repetitions: int = 5) -> float:
    """GFLOP/s of torch's dense product of two square matrices, best of `repetitions`: the roof of a roofline.

    >>> peak_gflops("fp32", size=64) > 0
    True
    """
    a = torch.ones(size, size, dtype=FORMAT_DTYPES[dtype])
    best = math.inf
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * size * size * size / best / 1e9


def cycled_bytes() -> int:
    """Bytes that the copies of a weight fill together, at least."""
    return max(_CYCLED_BYTES, 4 * _last_level_cache_bytes())


@contextlib.contextmanager
def _packing_for(isa: str) -> Iterator[None]:
    """Weights packed in this context are laid out for `isa`."""
    before = os.environ.get("OATS_ISA")
    os.environ["OATS_ISA"] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ["OATS_ISA"]
        else:
            os.environ["OATS_ISA"] = before


def _weight_bytes(layer: nn.Module) -> int:
    weight = layer.packed if isinstance(layer, SparseLowRankLinear) else layer.weight
    assert isinstance(weight, Tensor)
    return weight.nbytes


def _last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports; 0 if it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)
