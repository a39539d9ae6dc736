"""Wanda: a weight counts by its magnitude times the norm of its input (arXiv 2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern
from oats.decomposition.alternating import Decomposition, check_second_moment, root_moment
from oats.decomposition.baselines.pruning import check_budget, keep
from oats.decomposition.selection import keep_largest


@torch.no_grad()
def prune_wanda(
    weight: Tensor,
    second_moment: Tensor,
    *,
    compression: float = 0.5,
    pattern: Pattern = "row",
    name: str | None = None,
) -> Decomposition:
    """Keep the weights of largest ``|W_ij| ‖x_j‖₂`` (arXiv 2306.11695, equation 1), unchanged.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        second_moment: (d_in,), ``‖x_j‖₂²`` over the calibration tokens; its scale does not matter.
        compression: share of the weights that is removed, in [0, 1).
        pattern: ``"row"``, the published one, compares the weights of an output, ``"layer"`` those of the
            matrix, ``"N:M"`` those of M contiguous inputs.
        name: of the layer, for error messages.

    Returns:
        A decomposition of rank 0; what is kept is as in the weight.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose`.

    >>> prune_wanda(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor([100.0, 1.0, 1.0, 1.0])).sparse
    tensor([[ 1., -3.,  0.,  0.]])
    """
    layer = name or "weight"
    count = check_budget(weight, compression, pattern, layer)
    check_second_moment(second_moment, weight.shape[1], layer)
    root = root_moment(second_moment).float()
    return keep(weight, wanda_mask(weight, root, count, pattern), root)


def wanda_mask(weight: Tensor, root: Tensor, count: int, pattern: Pattern) -> Tensor:
    """Which weights Wanda keeps.

    Args:
        weight: (d_out, d_in).
        root: (d_in,), float32, in proportion to ``‖x_j‖₂``.
        count: as in :func:`oats.decomposition.selection.keep_largest`.
        pattern: as there.

    Returns:
        (d_out, d_in), bool.
    """
    scores = weight.detach().float() * root
    return keep_largest(scores.contiguous(), count, pattern) != 0
