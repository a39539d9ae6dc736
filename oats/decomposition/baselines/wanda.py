"""Wanda: keep the weights whose magnitude times the norm of their input is largest (arXiv 2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern
from oats.decomposition.baselines.pruning import checked_count, keep, largest
from oats.decomposition.checks import check_second_moment
from oats.decomposition.result import Decomposition
from oats.decomposition.scaling import root_moment


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
        name: the layer's name, for error messages.

    Returns:
        A decomposition of rank 0. Kept weights are unchanged.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose`.

    >>> prune_wanda(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor([100.0, 1.0, 1.0, 1.0])).sparse
    tensor([[ 1., -3.,  0.,  0.]])
    """
    layer = name or "weight"
    count = checked_count(weight, compression, pattern, layer)
    check_second_moment(second_moment, weight.shape[1], layer)
    root = root_moment(second_moment).float()
    return keep(weight, largest(weight.detach().float() * root, count, pattern), root)
