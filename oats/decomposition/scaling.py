"""The scaled layer ``W diag(√m)``: columns weigh as much as the inputs they multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.kernels.keep_largest import row_norms

MOMENT_FLOOR = 1e-12
"""The least second moment of an input, as a share of the largest: undoing the scaling then never divides by
zero, not even for an input that was never active."""


def root_moment(second_moment: Tensor) -> Tensor:
    """√m, (d_in,) float64, the largest 1; ones if all moments are zero."""
    moment = second_moment.detach().double()
    largest = moment.max()
    if largest == 0:
        return torch.ones_like(moment)
    return (moment / largest).clamp_min(MOMENT_FLOOR).sqrt()


def scale_weight(weight: Tensor, root: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``W diag(root)``, in `dtype`, with the largest magnitude 1.

    Also what its columns must be multiplied by to undo the scaling, (d_in,) float64.
    """
    scaled = weight.detach().to(dtype) * root.to(dtype)
    # So no sum of squares overflows or vanishes.
    peak = float(scaled.abs().max()) or 1.0
    return scaled.div_(peak), peak / root


def frobenius_norm(matrix: Tensor) -> float:
    """Summed by rows first, which keeps float32 sums short."""
    return float(torch.linalg.vector_norm(row_norms(matrix)))
