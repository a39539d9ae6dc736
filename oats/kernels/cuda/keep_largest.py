"""The entries of largest magnitude in each row of a matrix on a CUDA device."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.kernels.cuda import availability, launch

# One block of threads has a row. Longer rows, which are whole matrices, get the whole device.
_LONG_ROW = 1 << 17


def keep_largest_in_rows(rows: Tensor, count: int, out: Tensor) -> None:
    """:func:`oats.kernels.keep_largest.keep_largest_in_rows` of checked, contiguous tensors."""
    availability.check_cuda_kernels("the matrix", rows.device)
    columns = rows.shape[1]
    if count <= 0:
        out.zero_()
    elif count >= columns:
        out.copy_(rows)
    elif columns > _LONG_ROW:
        _keep_largest_in_long_rows(rows, count, out)
    else:
        _select(rows, count, out, 0)


def _keep_largest_in_long_rows(rows: Tensor, count: int, out: Tensor) -> None:
    for row, into in zip(rows, out, strict=True):
        size = row.abs()
        threshold = size.topk(count, sorted=False).values.min()
        larger, equal = size > threshold, size == threshold
        # Of equal magnitudes the first ones.
        first = equal.cumsum(0) <= count - larger.sum()
        into.copy_(row).masked_fill_(~(larger | (equal & first)), 0)


def splits_in_one_pass(rows: Tensor, count: int, out: Tensor) -> bool:
    """True if :func:`split_largest_in_rows` takes such tensors; DeviceError if the kernels are not built."""
    availability.check_cuda_kernels("the matrix", rows.device)
    return bool(
        rows.dtype in (torch.float32, torch.float64)
        and (out.shape, out.dtype, out.device) == (rows.shape, rows.dtype, rows.device)
        and rows.is_contiguous()
        and out.is_contiguous()
        and 0 < count < rows.shape[1]
        and availability.compiled.max_group < rows.shape[1] <= _LONG_ROW
    )


def split_largest_in_rows(rows: Tensor, count: int, out: Tensor) -> Tensor:
    """:func:`oats.kernels.keep_largest.split_largest_in_rows` where :func:`splits_in_one_pass` is true."""
    squares = rows.new_empty(rows.shape[0], dtype=torch.float64)
    _select(rows, count, out, squares.data_ptr())
    return squares.sqrt_()


def _select(rows: Tensor, count: int, out: Tensor, squares: int) -> None:
    """Run the kernel; where `squares` is an address, it moves entries instead of copying them."""
    with launch.on_device_of(rows):
        availability.compiled.keep_largest_in_rows(
            *(rows.data_ptr(), *rows.shape, count, rows.element_size(), out.data_ptr(), squares),
            *launch.stream_and_capability(rows),
        )
