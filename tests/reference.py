"""The published algorithm in plain float64, written from the paper alone (arXiv 2409.13652).

Nothing here imports oats, because a mistake shared with the package would stay hidden.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]


class Reference(NamedTuple):
    """S, L and the relative error on the scaled layer."""

    sparse: Array
    low_rank: Array
    relative_error: float
    rank: int


def budget(d_out: int, d_in: int, compression: str, rank_ratio: str) -> tuple[int, int, int]:
    """Rank, non-zeros in each row, non-zeros in the layer. Decimals are text, so they are exact."""
    rho, kappa = Fraction(compression), Fraction(rank_ratio)
    rank = math.floor(kappa * (1 - rho) * d_out * d_in / (d_out + d_in))
    row = d_in - math.floor(d_in * (1 - (1 - rho) * (1 - kappa)))
    return rank, row, math.floor((1 - kappa) * (1 - rho) * d_out * d_in)


def truncated_svd(matrix: Array, rank: int) -> Array:
    # torch's SVD, because the threads of numpy's cannot be set here.
    u, s, vt = (part.numpy() for part in torch.linalg.svd(torch.from_numpy(matrix), full_matrices=False))
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def hard_threshold(matrix: Array, per_row: int) -> Array:
    """Keep the `per_row` largest magnitudes of each row; of equal ones, the lowest column."""
    kept = np.zeros_like(matrix)
    for i, row in enumerate(matrix):
        order = np.argsort(-np.abs(row), kind="stable")[:per_row]
        kept[i, order] = row[order]
    return kept


def hard_threshold_layer(matrix: Array, total: int) -> Array:
    return hard_threshold(matrix.reshape(1, -1), total).reshape(matrix.shape)


def hard_threshold_n_m(matrix: Array, n: int, m: int) -> Array:
    return hard_threshold(matrix.reshape(-1, m), n).reshape(matrix.shape)


def decompose(
    weight: Any, second_moment: Any, compression: str, rank_ratio: str, iterations: int = 80
) -> Reference:
    """Alternating thresholding on ``W diag(√m)``, non-zeros per row."""
    weight = np.asarray(weight, dtype=np.float64)
    scale = np.sqrt(np.asarray(second_moment, dtype=np.float64))
    scaled = weight * scale
    d_out, d_in = weight.shape
    rank, per_row, _ = budget(d_out, d_in, compression, rank_ratio)
    sparse = np.zeros_like(scaled)
    for _ in range(iterations):
        low_rank = truncated_svd(scaled - sparse, rank)
        sparse = hard_threshold(scaled - low_rank, per_row)
    error = float(np.linalg.norm(scaled - sparse - low_rank) / np.linalg.norm(scaled))
    return Reference(sparse / scale, low_rank / scale, error, rank)
