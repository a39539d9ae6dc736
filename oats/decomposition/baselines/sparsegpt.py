"""SparseGPT: the weights that follow a pruned one are updated to make up for it (arXiv 2301.00774)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oats.config import Pattern, parse_n_m
from oats.decomposition.baselines.pruning import checked_count, largest
from oats.decomposition.checks import check_hessian
from oats.decomposition.error_feedback import inverse_factor, settle_columns
from oats.decomposition.result import Decomposition

BLOCK = 128
"""Columns whose masks are chosen together (the paper's B_s = B)."""


@torch.no_grad()
def prune_sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    compression: float = 0.5,
    pattern: Pattern = "row",
    name: str | None = None,
) -> Decomposition:
    """Prune column by column, each time with the optimal update of the columns to its right.

    U is the upper Cholesky factor of the inverse of the damped Hessian (arXiv 2301.00774, algorithm 1). Each
    block of 128 columns keeps the weights of largest ``w² / U_jj²``. Then, from left to right, the error
    ``(w_j − s_j) / U_jj`` of a column, times ``U_j,·``, is subtracted from the columns to its right. This is
    the update of the Optimal Brain Surgeon under the masks chosen so far.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        hessian: (d_in, d_in), ``X Xᵀ`` summed over the calibration tokens; its scale does not matter.
        compression: this and `name` are those of `prune_magnitude`.
        pattern: ``"layer"``, the published one, compares all weights of a block, ``"row"`` those of a row
            of the block, ``"N:M"`` those of M contiguous inputs.

    Returns:
        A decomposition of rank 0. Here relative_error is ``‖(W − S) X‖_F / ‖W X‖_F``.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose_hessian`.

    >>> weight, hessian = torch.tensor([[1.0, 0.9]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> prune_sparsegpt(weight, hessian).sparse.shape
    torch.Size([1, 2])
    """
    layer = name or "weight"
    count = checked_count(weight, compression, pattern, layer)
    d_in = weight.shape[1]
    check_hessian(hessian, d_in, layer)
    hessian = hessian.detach().double()
    left = weight.detach().float().clone()
    left[:, hessian.diagonal() == 0] = 0  # these multiply inputs that are always zero
    factor = inverse_factor(hessian, layer).float()
    diagonal = factor.diagonal()

    n_m = parse_n_m(pattern)
    width = BLOCK if n_m is None else max(BLOCK // n_m[1], 1) * n_m[1]
    # The number of columns whose masks are chosen together, and those masks.
    together = n_m[1] if n_m else width
    mask = torch.empty(0)

    def prune(j: int, block: Tensor) -> Tensor:
        nonlocal mask
        if j % together == 0:
            columns = block[:, :together]
            stop = j + columns.shape[1]
            # Each block gets its share of the budget of the row or the layer.
            kept = count if n_m else count * stop // d_in - count * j // d_in
            mask = largest(columns / diagonal[j:stop], kept, pattern)
        return block[:, 0] * mask[:, j % together]

    settle_columns(left, factor, prune, width)
    return Decomposition.of_sparse(left, weight.dtype, _output_error(weight, left, hessian))


def _output_error(weight: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """``‖(W − S) X‖_F / ‖W X‖_F``, with ``tr(E H Eᵀ) = ‖E X‖_F²``."""
    original = weight.detach().double()
    error, norm = (
        float(((matrix @ hessian) * matrix).sum().clamp_min(0))
        for matrix in (original - sparse.double(), original)
    )
    return math.sqrt(error / norm) if norm else 0.0
