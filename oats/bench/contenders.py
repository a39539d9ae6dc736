"""What is timed against what: one way to multiply by a weight each, all driven alike."""

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

# Weights are cycled through this much memory at least, and through 4 times the last-level cache, so that
# no cache holds them: a model's layers do not find theirs in a cache either.
_CYCLED_BYTES = 200_000_000

# Of one weight: a copy is a module, and small weights would need millions.
_MOST_COPIES = 1000

Dtype = Literal["bf16", "fp32"]
DTYPES: tuple[Dtype, ...] = ("bf16", "fp32")


@dataclass(frozen=True)
class Loaded:
    """What a contender holds.

    Attributes:
        weight_bytes: of one weight as it is read by a product; None where that is not known.
        copies: of the weight, cycled through call by call. So small layers (200 kB and less) stay in a cache.
    """

    weight_bytes: int | None
    copies: int


class Contender(Protocol):
    """One way to compute a layer.

    Attributes:
        name: for people, such as "torch".
        version: of the software.
        dtype: of the weight and input that it is given.
        stored_dtype: what it makes of the weight, as in "q8_0".
        isa: that it was told to use, "" where it chooses by itself.
        form: the weight that it takes.
        compression: of that weight, None for the one of the run.
        tolerance: largest error accepted, in units of `Reference.scale`.
        batches: at which it is to be timed, None for all.
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
        """Take a weight, in as many copies as no cache holds; what was loaded before is dropped."""

    def output(self, x: Tensor) -> Tensor:
        """The product with `x` (batch, d_in), which is also the input of the calls timed from then on."""

    def time(self, calls: int, warm_up: int) -> list[float]:
        """Milliseconds of each of `calls` calls, which come after `warm_up` that are not timed."""

    def close(self) -> None:
        """Give everything back."""


# Largest error that is accepted, in units of Reference.scale. An output of a random layer is normal with
# that deviation, and the largest of millions is 6 of them: bf16 rounds the output and V x to 2^-9 of it;
# fp32 sums up to 16384 products, each partial sum to 2^-24.
# Codes round a weight to some hundredths of it (int8), or to an eighth of its range (int4).
TOLERANCES = {"bf16": 2.0**-5, "fp32": 2.0**-14, "int8": 2.0**-4, "int4": 0.75}


class InProcess:
    """A contender that is a module of this process."""

    def __init__(
        self,
        name: str,
        dtype: Dtype,
        form: Form,
        make: Callable[[RandomWeight], Iterator[nn.Module]],
        weight_bytes: Callable[[nn.Module], int],
        *,
        version: str,
        isa: str = "",
    ) -> None:
        self.name, self.version, self.dtype, self.form, self.isa = name, version, dtype, form, isa
        self.stored_dtype: str = dtype
        self.compression: float | None = None
        self.tolerance = TOLERANCES[dtype]
        self.batches: Collection[int] | None = None
        self._make, self._weight_bytes = make, weight_bytes
        self._layers: list[nn.Module] = []
        self._x = torch.empty(0)
        self._next = 0

    def load(self, weight: RandomWeight) -> Loaded:
        """See `Contender`."""
        self._layers = []
        supply = self._make(weight)
        first = next(supply)
        size = self._weight_bytes(first)
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
    dtype: Dtype,
    *,
    isa: str | None = None,
    form: Form = "oats",
    storage: Storage = EXACT,
    compression: float | None = None,
) -> Contender:
    """`SparseLowRankLinear`, packed for `isa` (None: the best one), its numbers stored as `storage` says.

    `compression` is of a weight other than the run's: several of them are timed in turn.

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

    contender = InProcess("oats", dtype, form, make, _packed_bytes, version=__version__, isa=isa)
    contender.compression = compression
    if storage.values != "exact":
        contender.stored_dtype = storage.values
        contender.tolerance = TOLERANCES[storage.values]
    return contender


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

    return InProcess("torch", dtype, "dense", make, _dense_bytes, version=torch.__version__)


def read_time(megabytes: int = 32) -> Callable[[], float]:
    """A function that reads memory which no cache holds, and returns GB/s: torch's sum, all threads.

    >>> read_time()() > 0
    True
    """
    # In one piece: far more than what starting the threads costs.
    piece = megabytes * 1_000_000
    pieces = torch.ones(cycled_bytes() // 4).split(piece // 4)[:-1]
    supply = itertools.cycle(pieces)

    def read() -> float:
        part = next(supply)
        start = time.perf_counter()
        part.sum()
        return piece / (time.perf_counter() - start) / 1e9

    return read


def peak_gflops(dtype: Dtype, size: int = 2048, repetitions: int = 5) -> float:
    """GFLOP/s of torch's dense product of two square matrices, the best of some: the roof of a roofline.

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
    """How much memory is cycled through."""
    return max(_CYCLED_BYTES, 4 * _last_level_cache_bytes())


@contextlib.contextmanager
def _packing_for(isa: str) -> Iterator[None]:
    """Weights packed meanwhile are laid out for `isa`."""
    before = os.environ.get("OATS_ISA")
    os.environ["OATS_ISA"] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ["OATS_ISA"]
        else:
            os.environ["OATS_ISA"] = before


def _packed_bytes(layer: nn.Module) -> int:
    assert isinstance(layer, SparseLowRankLinear) and layer.packed is not None
    return layer.packed.numel()


def _dense_bytes(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.weight.nbytes


def _last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports, 0 where it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)
