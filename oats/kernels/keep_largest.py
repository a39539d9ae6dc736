"""The entries of largest magnitude in each row of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from oats import _core
from oats.errors import WeightError
from oats.kernels.cuda import keep_largest as cuda


def keep_largest_in_rows(rows: Tensor, count: int, out: Tensor | None = None) -> Tensor:
    """Zero all but the `count` entries of largest magnitude in each row.

    Args:
        rows: (n, columns), float32 or float64, finite, on the CPU or a CUDA device.
        count: at least 0; of equal magnitudes the lowest column is kept.
        out: to write to, contiguous, of the shape and dtype of `rows`; None means a new tensor.

    Returns:
        `out`, or a new tensor of the same shape and dtype.

    Raises:
        WeightError: `rows` is on another device, or has another dtype or number of dimensions; or `out`
            does not fit.
        DeviceError: `rows` is on a CUDA device, and the kernels for it are not built.
    """
    known_dtype = rows.dtype in (torch.float32, torch.float64)
    if not (rows.is_cpu or rows.is_cuda) or rows.dim() != 2 or not known_dtype:
        raise WeightError(
            f"rows are {rows.dtype} {tuple(rows.shape)} on {rows.device}, expected 2-D float32 or float64 "
            "on the CPU or a CUDA device"
        )
    rows = rows.contiguous()
    kept = torch.empty_like(rows) if out is None else out
    wanted = rows.shape, rows.dtype, rows.device
    if (kept.shape, kept.dtype, kept.device) != wanted or not kept.is_contiguous():
        raise WeightError(
            f"out is {kept.dtype} {tuple(kept.shape)} on {kept.device}, expected contiguous {rows.dtype} "
            f"{tuple(rows.shape)} on {rows.device}"
        )
    if rows.is_cuda:
        cuda.keep_largest_in_rows(rows, count, kept)
        return kept
    number, columns = rows.shape
    size, threads = rows.element_size(), torch.get_num_threads()
    _core.keep_largest_in_rows(rows.data_ptr(), number, columns, count, size, kept.data_ptr(), threads)
    return kept


def split_largest_in_rows(rows: Tensor, count: int, out: Tensor) -> Tensor:
    """Move the `count` entries of largest magnitude of each row from `rows` to `out`.

    The arguments are those of :func:`keep_largest_in_rows`; `rows` is contiguous. An entry that is moved
    leaves a zero; `out` has zeros where nothing is moved.

    Returns:
        (n,), float64: the norm of what is left of each row.

    >>> rows, out = torch.tensor([[3.0, -5.0, 4.0]]), torch.empty(1, 3)
    >>> split_largest_in_rows(rows, 1, out), rows, out
    (tensor([5.], dtype=torch.float64), tensor([[3., 0., 4.]]), tensor([[ 0., -5.,  0.]]))
    """
    if rows.is_cuda and cuda.splits_in_one_pass(rows, count, out):
        return cuda.split_largest_in_rows(rows, count, out)
    keep_largest_in_rows(rows, count, out)
    return row_norms(rows.sub_(out))


def row_norms(rows: Tensor) -> Tensor:
    """The norm of each row, float64.

    Each row is summed in its own dtype: float32 sums of one row stay short, and converting every element to
    float64 takes 25 times as long.
    """
    return torch.linalg.vector_norm(rows, dim=1).double()  # type: ignore[no-any-return]
