"""Keep the entries of largest magnitude under a pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern, parse_n_m
from oats.kernels.keep_largest import keep_largest_in_rows, row_norms, split_largest_in_rows


def keep_largest(
    residual: Tensor, count: int, pattern: Pattern = "row", *, out: Tensor | None = None
) -> Tensor:
    """Keep the entries of largest magnitude, and set the others to zero.

    Of equal magnitudes, the one with the lowest column index is kept.

    Args:
        residual: (…, d_out, d_in), float32 or float64, finite, contiguous.
        count: how many to keep: in each row for ``"row"``, in each matrix for ``"layer"``. Not used for N:M.
        pattern: ``"row"``, ``"layer"`` or ``"N:M"`` with d_in a multiple of M.
        out: result, contiguous, with the shape and dtype of `residual`; None means a new tensor.

    Returns:
        `out`, or a new tensor of the same shape and dtype.

    >>> keep_largest(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), 2)
    tensor([[ 0., -3.,  2.,  0.]])
    """
    width, count = _unit(residual, count, pattern)
    into = None if out is None else out.view(-1, width)
    return keep_largest_in_rows(residual.view(-1, width), count, into).view_as(residual)


def split_largest(residual: Tensor, count: int, pattern: Pattern = "row", *, out: Tensor) -> list[float]:
    """Move the entries of largest magnitude from `residual` to `out`.

    The arguments are those of :func:`keep_largest`. Zeros replace the entries that are moved.

    Returns:
        The Frobenius norm of what is left of each matrix.

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


def _unit(residual: Tensor, count: int, pattern: Pattern) -> tuple[int, int]:
    """The number of neighbouring entries that compete, and how many of them are kept."""
    n_m = parse_n_m(pattern)
    if n_m is not None:
        return n_m[1], n_m[0]
    return residual.shape[-1] * (residual.shape[-2] if pattern == "layer" else 1), count
