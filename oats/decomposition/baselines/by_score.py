"""Pruning by a score of each weight alone: magnitude pruning and Wanda."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern
from oats.decomposition.baselines.pruning import checked_count, keep, largest
from oats.decomposition.checks import check_second_moment
from oats.decomposition.result import Decomposition
from oats.decomposition.scaling import root_moment


@torch.no_grad()
def prune_magnitude(
    weight: Tensor,
    second_moment: Tensor,
    *,
    compression: float = 0.5,
    pattern: Pattern = "row",
    name: str | None = None,
) -> Decomposition:
    """Keep the weights of largest magnitude, unchanged (Han et al., NeurIPS 2015, arXiv 1506.02626).

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        second_moment: (d_in,), ``Σ x_j²`` over the calibration tokens. Only relative_error depends on it.
        compression: share of the weights that is removed, in [0, 1).
        pattern: ``"row"`` compares the weights of a row, ``"layer"`` those of the matrix, ``"N:M"`` those of
            M contiguous inputs.
        name: the layer's name, for error messages.

    Returns:
        A decomposition of rank 0.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose`.

    >>> prune_magnitude(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.ones(4)).sparse
    tensor([[ 0., -3.,  2.,  0.]])
    """
    return _prune(weight, second_moment, compression, pattern, name, norms_count=False)


@torch.no_grad()
def prune_wanda(
    weight: Tensor,
    second_moment: Tensor,
    *,
    compression: float = 0.5,
    pattern: Pattern = "row",
    name: str | None = None,
) -> Decomposition:
    """Keep the weights of largest ``|W_ij| ‖x_j‖₂``, unchanged (arXiv 2306.11695, equation 1).

    As :func:`prune_magnitude`, but ``second_moment`` counts; its scale does not matter. The published pattern
    is ``"row"``.

    >>> prune_wanda(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor([100.0, 1.0, 1.0, 1.0])).sparse
    tensor([[ 1., -3.,  0.,  0.]])
    """
    return _prune(weight, second_moment, compression, pattern, name, norms_count=True)


def _prune(
    weight: Tensor,
    second_moment: Tensor,
    compression: float,
    pattern: Pattern,
    name: str | None,
    *,
    norms_count: bool,
) -> Decomposition:
    layer = name or "weight"
    count = checked_count(weight, compression, pattern, layer)
    check_second_moment(second_moment, weight.shape[1], layer)
    root = root_moment(second_moment).float()
    scores = weight.detach().float()
    return keep(weight, largest(scores * root if norms_count else scores, count, pattern), root)
