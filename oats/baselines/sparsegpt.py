"""SparseGPT: what is pruned is made good by the weights that come after it (arXiv 2301.00774)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oats.baselines.pruning import as_decomposition, check_budget
from oats.config import Pattern, parse_n_m
from oats.decomposition import Decomposition
from oats.errors import WeightError
from oats.hessian import check_hessian
from oats.selection import keep_largest

BLOCK = 128
"""Columns whose masks are chosen together (the paper's B_s = B)."""

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean."""


@torch.no_grad()
def prune_sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    compression: float = 0.5,
    pattern: Pattern = "row",
    name: str | None = None,
) -> Decomposition:
    """Prune column by column, each time with the optimal update of the columns to come.

    With the upper Cholesky factor U of the inverse of the damped Hessian (arXiv 2301.00774, algorithm 1):
    blocks of 128 columns keep the weights of largest ``w² / U_jj²``; then, from left to right, the error
    ``(w_j − s_j) / U_jj`` of a column times ``U_j,·`` is taken off the columns to its right (the update of
    the Optimal Brain Surgeon under the masks chosen so far).

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        hessian: (d_in, d_in), ``X Xᵀ`` summed over the calibration tokens; its scale does not matter.
        compression: share of the weights that is removed, in [0, 1).
        pattern: ``"layer"``, the published one, compares all weights of a block, ``"row"`` those of a row
            of the block, ``"N:M"`` those of M contiguous inputs.
        name: of the layer, for error messages.

    Returns:
        A decomposition of rank 0. Its relative_error is ``‖(W − S) X‖_F / ‖W X‖_F``.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose_hessian`.

    >>> weight, hessian = torch.tensor([[1.0, 0.9]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> prune_sparsegpt(weight, hessian).sparse.shape
    torch.Size([1, 2])
    """
    layer = name or "weight"
    count = check_budget(weight, compression, pattern, layer)
    d_in = weight.shape[1]
    check_hessian(hessian, d_in, layer)
    hessian = hessian.detach().double()
    left = weight.detach().float().clone()
    left[:, hessian.diagonal() == 0] = 0  # what multiplies inputs that are always zero
    factor = _inverse_factor(hessian, layer).float()

    n_m = parse_n_m(pattern)
    width = BLOCK if n_m is None else max(BLOCK // n_m[1], 1) * n_m[1]
    for start in range(0, d_in, width):
        stop = min(start + width, d_in)
        # Every block has its share of the row's, or the layer's, budget.
        kept = count if n_m else count * stop // d_in - count * start // d_in
        block, rest = left[:, start:stop], left[:, stop:]
        errors = _prune_block(block, factor[start:stop, start:stop], kept, pattern)
        rest.addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return as_decomposition(weight, left, _output_error(weight, left, hessian))


def _prune_block(block: Tensor, factor: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Prune a block of columns in place; returns the errors, scaled by the diagonal of the factor."""
    n_m = parse_n_m(pattern)
    diagonal = factor.diagonal()
    errors = torch.empty_like(block)
    mask = torch.empty_like(block, dtype=torch.bool)
    if n_m is None:
        mask.copy_(keep_largest((block / diagonal).contiguous(), count, pattern) != 0)
    for j in range(block.shape[1]):
        if n_m is not None and j % n_m[1] == 0:
            group = slice(j, j + n_m[1])
            scores = (block[:, group] / diagonal[group]).contiguous()
            mask[:, group] = keep_largest(scores, count, pattern) != 0
        errors[:, j] = block[:, j] * ~mask[:, j] / diagonal[j]
        block[:, j] *= mask[:, j]
        block[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
    return errors


def _inverse_factor(hessian: Tensor, layer: str) -> Tensor:
    """Upper U with ``Uᵀ U = (H + damping)⁻¹``, (d_in, d_in) float64."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise WeightError(
            f"{layer}: the Hessian is not positive semi-definite ({error}); pass X Xᵀ summed over the "
            "calibration tokens, in float32 or better"
        ) from error
    return factor


def _output_error(weight: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """``‖(W − S) X‖_F / ‖W X‖_F``, with ``tr(E H Eᵀ) = ‖E X‖_F²``."""
    original = weight.detach().double()
    error, norm = (
        float(((matrix @ hessian) * matrix).sum().clamp_min(0))
        for matrix in (original - sparse.double(), original)
    )
    return math.sqrt(error / norm) if norm else 0.0
