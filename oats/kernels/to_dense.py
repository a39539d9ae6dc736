"""A packed weight as a dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.format.layer_spec import LayerSpec, exact_parts
from oats.kernels.cuda import sparse_low_rank_linear as cuda
from oats.kernels.packing import packed_header, unpack


@torch.library.custom_op("oats::to_dense", mutates_args=(), device_types="cpu")
def to_dense(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    """``S + U V`` of a packed weight, (d_out, d_in) in `dtype`, summed in float32.

    Args:
        packed: from :func:`oats.kernels.packing.pack`.
        d_out: number of outputs.
        d_in: number of inputs.
        rank: of the low-rank part.
        nnz: number of kept values.
        dtype: of the packed weight.

    Raises:
        FormatError: `packed` does not have these sizes, or was packed for another kind of CPU.
    """
    spec = LayerSpec(d_out, d_in, rank, nnz, dtype, packed_header(packed).spec.storage)
    sparse, u, v = exact_parts(unpack(packed, spec), spec.storage)
    return sparse.addmm_(u, v).to(dtype)


@to_dense.register_kernel("cuda")
def _(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    return cuda.to_dense(packed, LayerSpec(d_out, d_in, rank, nnz, dtype))


@to_dense.register_fake
def _(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((d_out, d_in), dtype=dtype)
