"""Which entries of a matrix the sparse part keeps: the largest magnitudes under a pattern."""

from __future__ import annotations

from torch import Tensor

from oats import ops
from oats.config import Pattern, parse_n_m


def keep_largest(
    residual: Tensor, count: int, pattern: Pattern = "row", *, out: Tensor | None = None
) -> Tensor:
    """Zero all but the entries of largest magnitude; of equal magnitudes the lowest column index is kept.

    Args:
        residual: (…, d_out, d_in), float32 or float64, finite, contiguous.
        count: how many stay, in each row for ``"row"``, in the matrix for ``"layer"``; an N:M
            pattern says it itself, and `count` is not used.
        pattern: ``"row"``, ``"layer"`` or ``"N:M"`` with d_in a multiple of M.
        out: to write to, contiguous, of the shape and dtype of `residual`; None means a new tensor.

    Returns:
        `out`, or a new tensor of the same shape and dtype.

    >>> import torch
    >>> keep_largest(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), 2)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    n_m = parse_n_m(pattern)
    if n_m is not None:
        width, count = n_m[1], n_m[0]
    else:
        width = residual.shape[-1] * (residual.shape[-2] if pattern == "layer" else 1)
    into = None if out is None else out.view(-1, width)
    return ops.keep_largest_in_rows(residual.view(-1, width), count, into).view_as(residual)
