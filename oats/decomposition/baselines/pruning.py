"""What every baseline shares: how many weights it keeps, which are largest, and the result."""

from __future__ import annotations

from torch import Tensor

from oats.config import OatsConfig, Pattern
from oats.decomposition.budget import kept_count
from oats.decomposition.checks import check_weight
from oats.decomposition.result import Decomposition
from oats.decomposition.scaling import frobenius_norm
from oats.decomposition.selection import keep_largest


def checked_count(weight: Tensor, compression: float, pattern: Pattern, layer: str) -> int:
    """Check a weight and its budget, and return the count for `oats.decomposition.selection.keep_largest`.

    Raises:
        ConfigError: a setting is out of range, the pattern does not keep what the compression leaves, or d_in
            is not a multiple of M.
        WeightError: the weight has a wrong shape or dtype, or is not finite.

    >>> import torch
    >>> checked_count(torch.ones(2, 8), 0.5, "row", "q_proj")
    4
    """
    # All methods without a low-rank part have the same budget.
    config = OatsConfig(method="magnitude", compression=compression, pattern=pattern)
    check_weight(weight, pattern, layer)
    return kept_count(weight.shape, config)


def largest(scores: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Bool mask of the scores of largest magnitude; `count` and `pattern` as in `keep_largest`."""
    return keep_largest(scores.contiguous(), count, pattern) != 0


def keep(weight: Tensor, mask: Tensor, root: Tensor) -> Decomposition:
    """Keep the weights of a mask unchanged; the error is ``‖(W − S) diag(root)‖_F``, relative.

    `root`, (d_in,) float32, is proportional to ``‖x_j‖₂``.
    """
    scaled = weight.detach().float() * root
    error = frobenius_norm(scaled * ~mask) / (frobenius_norm(scaled) or 1.0)
    return Decomposition.of_sparse(weight.detach() * mask, weight.dtype, error)
