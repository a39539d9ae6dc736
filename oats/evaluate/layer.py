"""Latency of one layer: compressed against torch's dense one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats import ops
from oats.bitmask import decode, encode_mask
from oats.budget import nnz_per_layer, nnz_per_row, rank_for
from oats.config import OatsConfig, parse_n_m
from oats.errors import ConfigError, OatsError
from oats.evaluate.spread import Spread
from oats.format import DTYPES
from oats.nn import SparseLowRankLinear

# Weights are cycled through this much memory at least, and through 4 times the last-level cache, so that
# no cache holds them: a model's layers do not find theirs in a cache either.
_CYCLED_BYTES = 200_000_000

# Of one weight: a copy is a module, and small weights would need millions.
_MOST_COPIES = 1000

# Read in one piece to measure the bandwidth: far more than what starting the threads costs.
_READ_BYTES = 32_000_000

# Largest error of an output, relative to Σ|w||x| (the sum that rounding errors are proportional to), in
# units of the dtype's rounding. bf16 rounds V x, and the output; fp32 sums up to d_in products.
_TOLERANCE = {"bf16": 2.0**-7, "fp32": 2.0**-18}


@dataclass(frozen=True)
class LayerLatency:
    """One layer shape, compressed against dense, and every setting of the measurement.

    Attributes:
        compressed_ms: of one call of `SparseLowRankLinear`.
        dense_ms: of one call of `torch.nn.Linear`, same dtype and threads.
        compressed_bytes: of the packed weight.
        dense_bytes: of the dense weight.
        compressed_copies: weights cycled through, at most 1000; dense_copies alike. So small layers
            (200 kB and less) stay in a cache.
        read_gb_per_s: of torch's sum of 32 MB of fp32 with the same threads, timed in between.
        error: largest error against float64, relative to Σ|w||x|.
    """

    d_out: int
    d_in: int
    batch: int
    compression: float
    rank_ratio: float
    pattern: str
    rank: int
    nnz: int
    dtype: str
    threads: int
    isa: str
    repetitions: int
    compressed_copies: int
    dense_copies: int
    compressed_bytes: int
    dense_bytes: int
    compressed_ms: Spread
    dense_ms: Spread
    read_gb_per_s: float
    error: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense, by medians."""
        return self.dense_ms.median / self.compressed_ms.median

    @property
    def compressed_gb_per_s(self) -> float:
        """Packed bytes read a second."""
        return self.compressed_bytes / self.compressed_ms.median / 1e6

    @property
    def dense_gb_per_s(self) -> float:
        """Dense bytes read a second."""
        return self.dense_bytes / self.dense_ms.median / 1e6

    def to_dict(self) -> dict[str, Any]:
        """The fields and what follows from them, as plain JSON values."""
        return {
            **asdict(self),
            "speedup": self.speedup,
            "compressed_gb_per_s": self.compressed_gb_per_s,
            "dense_gb_per_s": self.dense_gb_per_s,
        }


def layer_latency(
    d_out: int,
    d_in: int,
    *,
    batch: int = 1,
    compression: float = 0.5,
    rank_ratio: float = 0.25,
    pattern: str = "row",
    dtype: str = "bf16",
    repetitions: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LayerLatency:
    """Time one compressed layer against the dense one, call by call in turn.

    The weight is random: non-zeros at random places, as many as a compression run leaves. The result is
    first compared with a float64 computation.

    Args:
        batch: rows of the input.
        dtype: ``"bf16"`` or ``"fp32"``.
        repetitions: timed calls of each.
        progress: called as progress(done, total) now and then.

    Raises:
        ConfigError: a setting is out of range.
        OatsError: the result is wrong; nothing was timed.
    """
    config = OatsConfig(compression=compression, rank_ratio=rank_ratio, pattern=pattern, dtype=dtype)  # type: ignore[arg-type]
    if min(d_out, d_in, batch, repetitions) < 1:
        raise ConfigError(
            "d_out, d_in, batch and repetitions must be at least 1, got "
            f"{d_out}, {d_in}, {batch} and {repetitions}"
        )
    n_m = parse_n_m(pattern)
    if n_m is not None and d_in % n_m[1]:
        raise ConfigError(f"pattern {pattern} needs d_in to be a multiple of {n_m[1]}, got {d_in}")
    generator = torch.Generator().manual_seed(seed)
    tensors = _random_layer(d_out, d_in, config, DTYPES[dtype], generator)
    compressed = SparseLowRankLinear.from_canonical(tensors, d_in)
    assert compressed.packed is not None

    x = torch.randn(batch, d_in, generator=generator).to(DTYPES[dtype])
    with torch.inference_mode():
        error = _relative_error(compressed(x), x, tensors)
    if not error <= _TOLERANCE[dtype]:
        raise OatsError(
            f"the {dtype} kernel for {ops.active_isa()} is wrong at {d_out} x {d_in}: error {error:.2e} "
            f"relative to the sum of |w||x|, allowed {_TOLERANCE[dtype]:.2e}; nothing was timed. "
            "Please report this"
        )

    dense = nn.Linear(d_in, d_out, bias=False, dtype=DTYPES[dtype])
    compressed_bytes, dense_bytes = compressed.packed.numel(), dense.weight.nbytes
    read = torch.ones(_cycled_bytes() // 4).split(_READ_BYTES // 4)
    calls: list[list[Callable[[], Tensor]]] = [
        [partial(layer, x) for layer in _copies(compressed, compressed_bytes)],
        [partial(layer, x) for layer in _copies(dense, dense_bytes)],
        [part.sum for part in read],
    ]
    times: list[list[float]] = [[] for _ in calls]
    warm_up = max(len(copies) for copies in calls)
    with torch.inference_mode():
        for call in range(warm_up + repetitions):
            for copies, taken in zip(calls, times, strict=True):
                function = copies[call % len(copies)]
                start = time.perf_counter()
                function()
                seconds = time.perf_counter() - start
                if call >= warm_up:
                    taken.append(1e3 * seconds)
            if progress is not None:
                progress(call + 1, warm_up + repetitions)
    return LayerLatency(
        d_out=d_out,
        d_in=d_in,
        batch=batch,
        compression=compression,
        rank_ratio=rank_ratio,
        pattern=pattern,
        rank=compressed.rank,
        nnz=compressed.nnz,
        dtype=dtype,
        threads=torch.get_num_threads(),
        isa=ops.packed_isa(compressed.packed),
        repetitions=repetitions,
        compressed_copies=len(calls[0]),
        dense_copies=len(calls[1]),
        compressed_bytes=compressed_bytes,
        dense_bytes=dense_bytes,
        compressed_ms=Spread.of(times[0]),
        dense_ms=Spread.of(times[1]),
        read_gb_per_s=read[0].nbytes / Spread.of(times[2]).median / 1e6,
        error=error,
    )


def _random_layer(
    d_out: int, d_in: int, config: OatsConfig, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Canonical tensors of a layer with random non-zeros; no decomposition is run."""
    rank = rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
    kept = _random_support(d_out, d_in, config, generator)
    return {
        "mask": encode_mask(kept),
        "values": torch.randn(int(kept.sum()), generator=generator).to(dtype),
        "low_rank_u": torch.randn(d_out, rank, generator=generator).to(dtype),
        "low_rank_v": (torch.randn(rank, d_in, generator=generator) / max(rank, 1) ** 0.5).to(dtype),
    }


def _random_support(d_out: int, d_in: int, config: OatsConfig, generator: torch.Generator) -> Tensor:
    """Which elements are kept, (d_out, d_in) bool."""
    n_m = parse_n_m(config.pattern)
    if n_m is not None:
        n, m = n_m
        keys = torch.rand(d_out, d_in // m, m, generator=generator)
        chosen = keys.topk(n, dim=2).indices
        return torch.zeros(keys.shape, dtype=torch.bool).scatter_(2, chosen, True).view(d_out, d_in)
    if config.pattern == "layer":
        rows, k = 1, nnz_per_layer(d_out, d_in, config.compression, config.rank_ratio)
    else:
        rows, k = d_out, nnz_per_row(d_in, config.compression, config.rank_ratio)
    keys = torch.rand(rows, d_out * d_in // rows, generator=generator)
    chosen = keys.topk(k, dim=1, sorted=False).indices
    return torch.zeros(keys.shape, dtype=torch.bool).scatter_(1, chosen, True).view(d_out, d_in)


def _relative_error(y: Tensor, x: Tensor, tensors: Mapping[str, Tensor]) -> float:
    """Largest |y − reference| / Σ|w||x| over the outputs, in float64."""
    wide = {name: tensor.double() for name, tensor in tensors.items() if name != "mask"}
    sparse = decode(tensors["mask"], wide["values"], x.shape[-1])
    columns = x.double().T
    reference = sparse @ columns + wide["low_rank_u"] @ (wide["low_rank_v"] @ columns)
    magnitude = sparse.abs() @ columns.abs() + wide["low_rank_u"].abs() @ (
        wide["low_rank_v"].abs() @ columns.abs()
    )
    return float(((y.double().T - reference).abs() / magnitude.clamp_min(1e-30)).max())


def _copies(layer: nn.Module, weight_bytes: int) -> list[nn.Module]:
    number = min(-(-_cycled_bytes() // weight_bytes), _MOST_COPIES)
    return [layer] + [copy.deepcopy(layer) for _ in range(number - 1)]


def _cycled_bytes() -> int:
    return max(_CYCLED_BYTES, 4 * _last_level_cache_bytes())


def _last_level_cache_bytes() -> int:
    """Size of the largest cache that Linux reports, 0 where it reports none."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)
