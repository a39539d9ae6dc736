"""Compression and rank ratio → rank and number of non-zeros (arXiv 2409.13652, section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from oats.config import OatsConfig, Pattern, parse_n_m
from oats.errors import ConfigError


def rank_for(d_out: int, d_in: int, compression: float, rank_ratio: float, pattern: Pattern = "row") -> int:
    """Rank of the low-rank part, ⌊κ (1−ρ) d_out d_in / (d_out + d_in)⌋.

    An N:M pattern fixes the sparse part at N/M. The rank is then what the same budget of parameters leaves,
    ⌊(1 − ρ − N/M) d_out d_in / (d_out + d_in)⌋, and `rank_ratio` is not used.

    Raises:
        ConfigError: the N:M pattern alone keeps more than the budget allows.

    >>> rank_for(4096, 4096, 0.5, 0.25)
    256
    >>> rank_for(1024, 640, 0.4, 0.25, "2:4")
    39
    """
    kept = 1 - _exact(compression)
    n_m = parse_n_m(pattern)
    if n_m is None:
        share = _exact(rank_ratio) * kept
    else:
        share = kept - Fraction(*n_m)
        if share < 0:
            raise ConfigError(
                f"pattern {pattern} keeps {n_m[0]}/{n_m[1]} of the weights, more than the {float(kept):g} "
                f"that compression {compression:g} leaves; lower the compression to "
                f"{1 - n_m[0] / n_m[1]:g} or less"
            )
    return math.floor(share * d_out * d_in / (d_out + d_in))


def nnz_per_row(d_in: int, compression: float, rank_ratio: float) -> int:
    """Non-zeros kept in each row, d_in − ⌊d_in (1 − (1−κ)(1−ρ))⌋.

    >>> nnz_per_row(4096, 0.5, 0.25)
    1536
    """
    return d_in - math.floor(d_in * (1 - _density(compression, rank_ratio)))


def nnz_per_layer(d_out: int, d_in: int, compression: float, rank_ratio: float) -> int:
    """Non-zeros kept in the whole layer, ⌊(1−κ)(1−ρ) d_out d_in⌋.

    >>> nnz_per_layer(4096, 4096, 0.5, 0.25)
    6291456
    """
    return math.floor(_density(compression, rank_ratio) * d_out * d_in)


def kept_count(shape: Sequence[int], config: OatsConfig) -> int:
    """How many entries of each row, or of the layer, or of each group of M, the sparse part keeps.

    >>> kept_count((64, 96), OatsConfig()), kept_count((64, 96), OatsConfig(pattern="2:4"))
    (36, 2)
    """
    d_out, d_in = shape
    n_m = parse_n_m(config.pattern)
    if n_m is not None:
        return n_m[0]
    if config.pattern == "layer":
        return nnz_per_layer(d_out, d_in, config.compression, config.rank_ratio)
    return nnz_per_row(d_in, config.compression, config.rank_ratio)


def rank_and_count(shape: Sequence[int], config: OatsConfig) -> tuple[int, int]:
    """The rank of the low-rank part, and :func:`kept_count`.

    >>> rank_and_count((64, 96), OatsConfig())
    (4, 36)
    """
    d_out, d_in = shape
    rank = rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
    return rank, kept_count(shape, config)


def check_pattern_divides(d_in: int, pattern: Pattern, layer: str) -> None:
    """Raise a ConfigError that names the layer if the pattern is N:M and d_in is not a multiple of M.

    >>> check_pattern_divides(12, "2:4", "q_proj")
    """
    n_m = parse_n_m(pattern)
    if n_m is not None and d_in % n_m[1]:
        raise ConfigError(
            f"{layer}: pattern {pattern} needs a multiple of {n_m[1]} inputs, and the layer has {d_in}; "
            f'use pattern="row" or skip this layer'
        )


def _density(compression: float, rank_ratio: float) -> Fraction:
    return (1 - _exact(rank_ratio)) * (1 - _exact(compression))


def _exact(value: float) -> Fraction:
    # The decimal that the user wrote: floor(0.75 * 0.4 * 10) is 2 in binary floating point and 3 on paper.
    return Fraction(str(float(value)))
