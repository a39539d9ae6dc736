"""What every baseline has in common: how many weights it keeps, and the result as a `Decomposition`."""

from __future__ import annotations

from torch import Tensor

from oats.config import OatsConfig, Pattern
from oats.decomposition.alternating import Decomposition, check_weight, frobenius_norm, kept_count
from oats.decomposition.budget import check_inputs


def check_budget(weight: Tensor, compression: float, pattern: Pattern, layer: str) -> int:
    """Check a weight and its budget.

    Args:
        weight: (d_out, d_in).
        compression: share of the weights that is removed, in [0, 1).
        pattern: ``"row"``, ``"layer"`` or ``"N:M"``, which has to keep the same share.
        layer: its name, for error messages.

    Returns:
        How many weights are kept, in the unit of :func:`oats.decomposition.selection.keep_largest`.

    Raises:
        ConfigError: a setting is out of range, the pattern and the compression contradict each other, or
            d_in is not a multiple of M.
        WeightError: the weight has a wrong shape or dtype, or is not finite.

    >>> import torch
    >>> check_budget(torch.ones(2, 8), 0.5, "row", "q_proj")
    4
    """
    # Any method without a low-rank part has this budget.
    config = OatsConfig(method="magnitude", compression=compression, pattern=pattern)
    check_weight(weight, layer)
    d_out, d_in = weight.shape
    check_inputs(d_in, pattern, layer)
    return kept_count(d_out, d_in, config)


def as_decomposition(weight: Tensor, sparse: Tensor, relative_error: float) -> Decomposition:
    """A pruned weight as a decomposition of rank 0.

    Args:
        weight: (d_out, d_in), for the dtype of the result.
        sparse: (d_out, d_in), zero where nothing is kept.
        relative_error: in the metric of the method.
    """
    d_out, d_in = weight.shape
    return Decomposition(
        sparse=sparse.to(weight.dtype).contiguous(),
        low_rank_u=weight.new_zeros(d_out, 0),
        low_rank_v=weight.new_zeros(0, d_in),
        relative_error=relative_error,
        iterations=1,
    )


def keep(weight: Tensor, mask: Tensor, root: Tensor) -> Decomposition:
    """The weights of a mask, unchanged.

    Args:
        weight: W, (d_out, d_in).
        mask: (d_out, d_in), bool.
        root: (d_in,), float32, in proportion to ``‖x_j‖₂``: the error is in this metric.
    """
    scaled = weight.detach().float() * root
    error = frobenius_norm(scaled * ~mask) / (frobenius_norm(scaled) or 1.0)
    return as_decomposition(weight, weight.detach() * mask, error)
