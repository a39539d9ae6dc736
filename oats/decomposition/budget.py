"""Compression and rank ratio → rank and number of non-zeros (arXiv 2409.13652, section 2.4)."""

from __future__ import annotations

import math
from fractions import Fraction

from oats.config import parse_n_m
from oats.errors import ConfigError


def _exact(value: float) -> Fraction:
    # floor(0.75 * 0.4 * 10) is 2 in binary floating point and 3 on paper: count with the decimal
    # number that the user wrote.
    return Fraction(str(float(value)))


def rank_for(d_out: int, d_in: int, compression: float, rank_ratio: float, pattern: str = "row") -> int:
    """Rank of the low-rank part, ⌊κ (1−ρ) d_out d_in / (d_out + d_in)⌋.

    With an N:M pattern the sparse part is fixed at N/M, and the rank is what is left of the same
    parameter budget: ⌊(1 − ρ − N/M) d_out d_in / (d_out + d_in)⌋; `rank_ratio` is not used.

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
    density = (1 - _exact(rank_ratio)) * (1 - _exact(compression))
    return d_in - math.floor(d_in * (1 - density))


def nnz_per_layer(d_out: int, d_in: int, compression: float, rank_ratio: float) -> int:
    """Non-zeros kept in the whole layer, ⌊(1−κ)(1−ρ) d_out d_in⌋.

    >>> nnz_per_layer(4096, 4096, 0.5, 0.25)
    6291456
    """
    density = (1 - _exact(rank_ratio)) * (1 - _exact(compression))
    return math.floor(density * d_out * d_in)


def check_inputs(d_in: int, pattern: str, layer: str) -> None:
    """Refuse a pattern that does not divide the inputs of a layer.

    Raises:
        ConfigError: the pattern is N:M and d_in is not a multiple of M; the message names `layer`.

    >>> check_inputs(12, "2:4", "q_proj")
    """
    n_m = parse_n_m(pattern)
    if n_m is not None and d_in % n_m[1]:
        raise ConfigError(
            f"{layer}: pattern {pattern} needs a multiple of {n_m[1]} inputs, and the layer has {d_in}; "
            f'use pattern="row" or skip this layer'
        )
