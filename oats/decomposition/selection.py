"""Which entries of a matrix the sparse part keeps: the largest magnitudes under a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern, parse_n_m
from oats.kernels.keep_largest import keep_largest_in_rows, row_norms, split_largest_in_rows


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

    >>> keep_largest(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), 2)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    width, count = _selected(residual, count, pattern)
    into = None if out is None else out.view(-1, width)
    return keep_largest_in_rows(residual.view(-1, width), count, into).view_as(residual)


def split_largest(residual: Tensor, count: int, pattern: Pattern = "row", *, out: Tensor) -> list[float]:
    """Move the entries of largest magnitude from `residual` to `out`.

    Args:
        residual: as for :func:`keep_largest`; zeros are left where entries were.
        count: as there.
        pattern: as there.
        out: to write to, contiguous, of the shape and dtype of `residual`.

    Returns:
        The Frobenius norms of what is left of each matrix.

    >>> residual, out = torch.tensor([[3.0, -5.0, 4.0]]), torch.empty(1, 3)
    >>> split_largest(residual, 1, out=out), residual, out
    ([5.0], tensor([[3., 0., 4.]]), tensor([[ 0., -5.,  0.]]))
    """
    columns = residual.shape[-1]
    if parse_n_m(pattern) is None and pattern != "layer":
        norms = split_largest_in_rows(residual.view(-1, columns), count, out.view(-1, columns))
    else:
        keep_largest(residual, count, pattern, out=out)
        norms = row_norms(residual.sub_(out).view(-1, columns))
    matrices = 1 if residual.dim() == 2 else residual.shape[0]
    return torch.linalg.vector_norm(norms.view(matrices, -1), dim=1).tolist()  # type: ignore[no-any-return]


def _selected(residual: Tensor, count: int, pattern: Pattern) -> tuple[int, int]:
    """How many entries are looked at together, and how many of them stay."""
    n_m = parse_n_m(pattern)
    if n_m is not None:
        return n_m[1], n_m[0]
    return residual.shape[-1] * (residual.shape[-2] if pattern == "layer" else 1), count
