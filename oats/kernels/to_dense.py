"""A packed weight, or some of its rows, as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from oats import _core
from oats.format.layer_spec import LayerSpec, exact_parts
from oats.kernels.cuda import sparse_low_rank_linear as cuda
from oats.kernels.packing import spec_of_packed, unpack


@torch.library.custom_op("oats::to_dense", mutates_args=(), device_types="cpu")
def to_dense(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    """``S + U V`` of a packed weight, (d_out, d_in) in `dtype`, summed in float32.

    `packed` is from :func:`oats.kernels.packing.pack`; the others are its sizes and dtype.

    Raises:
        FormatError: `packed` does not have these sizes, or was packed for another kind of CPU.
    """
    spec = LayerSpec(d_out, d_in, rank, nnz, dtype, spec_of_packed(packed).storage)
    sparse, u, v = exact_parts(unpack(packed, spec), spec.storage)
    return sparse.addmm_(u, v).to(dtype)


@to_dense.register_kernel("cuda")
def _(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    return cuda.to_dense(packed, LayerSpec(d_out, d_in, rank, nnz, dtype))


@to_dense.register_fake
def _(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((d_out, d_in), dtype=dtype)


@torch.library.custom_op("oats::read_rows", mutates_args=(), device_types="cpu")
def read_rows(packed: Tensor, rows: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """Some rows of a weight that is packed for the CPU and has no low-rank part, as an embedding reads them.

    Args:
        packed: from :func:`oats.kernels.packing.pack`, of `d_in` inputs, `dtype` and rank 0.
        rows: int32 or int64, of any shape, each at least 0 and below d_out.

    Returns:
        (*rows.shape, d_in), in `dtype`.

    Raises:
        FormatError: `packed` was not made by :func:`~oats.kernels.packing.pack`, or for another kind of CPU.
        IndexError: there is no such row.
        ValueError: the weight has another `d_in` or `dtype`, or a low-rank part; or `rows` are not int32 or
            int64.
    """
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are {rows.dtype}, expected torch.int32 or torch.int64")
    spec = spec_of_packed(packed)
    if (spec.d_in, spec.dtype, spec.rank) != (d_in, dtype, 0):
        raise ValueError(
            f"the packed weight is {spec.dtype} with {spec.d_in} inputs and rank {spec.rank}, "
            f"expected {dtype} with {d_in} and rank 0"
        )
    indices = rows.long().contiguous()
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= spec.d_out):
        raise IndexError(
            f"rows are {int(indices.min())} to {int(indices.max())}, but the packed weight has {spec.d_out}"
        )
    out = torch.empty((*rows.shape, d_in), dtype=dtype)
    _core.read_sparse_rows(
        packed.data_ptr(), indices.data_ptr(), indices.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


@read_rows.register_fake
def _(packed: Tensor, rows: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*rows.shape, d_in), dtype=dtype)
