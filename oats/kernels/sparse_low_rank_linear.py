"""The product ``y = S x + U (V x) + b`` of a packed weight.

:func:`sparse_low_rank_linear` is the operator, which autograd, `torch.compile` and `torch.export` see.
:func:`linear` is the same product called directly, in as few Python steps as possible, for eager inference.
:func:`linear_many` and :func:`linear_joined` compute several products of one input in one call of the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oats import _core
from oats.format.layer_spec import LayerSpec
from oats.kernels.cuda import sparse_low_rank_linear as cuda
from oats.kernels.packing import spec_of_packed
from oats.kernels.to_dense import to_dense

# By name here: looking it up through its module takes as long as a call of it.
_threads = torch.get_num_threads


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """``y = S x + U (V x) + b`` without checks or autograd.

    The caller has checked the arguments: `packed` is from :func:`oats.kernels.packing.pack`, of `spec`, in
    this process; `x` (…, d_in) and `bias` (d_out,), contiguous, have its dtype and kind of device.

    Raises:
        ValueError: they are on several CUDA devices.
    """
    if x.is_cuda:
        return cuda.linear(x, packed, bias, spec)
    *outer, stride = x.shape
    d_out = spec.d_out
    # Sizes one by one: torch takes 0.3 µs longer to parse a tuple.
    y = x.new_empty(*outer, d_out)
    if x.is_contiguous():
        batch = x.numel() // stride
    else:
        x = _rows(x)
        batch, stride = x.shape[0], x.stride(0)
    _core.sparse_low_rank_linear(
        packed.data_ptr(),
        x.data_ptr(),
        batch,
        stride,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        d_out,
        _threads(),
    )
    return y


Projection = tuple[Tensor, Tensor | None, LayerSpec]
"""``packed``, ``bias`` and ``spec`` of :func:`linear`."""


def linear_many(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """What :func:`linear` returns for each of the projections, bit for bit, in one call of the core.

    Args:
        x: (…, d_in), on the CPU, read once for all.
        projections: at least one, all of d_in inputs and the dtype of `x`.

    Returns:
        (…, d_out) for each of them.
    """
    outer = x.shape[:-1]
    outputs = [x.new_empty((*outer, spec.d_out)) for _, _, spec in projections]
    _linear_into(x, projections, [(y.data_ptr(), y.shape[-1]) for y in outputs])
    return outputs


def linear_joined(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """The outputs of :func:`linear_many` one after another in one tensor, (…, sum of d_out)."""
    width = sum(spec.d_out for _, _, spec in projections)
    y = x.new_empty((*x.shape[:-1], width))
    address, places = y.data_ptr(), []
    for _, _, spec in projections:
        places.append((address, width))
        address += spec.d_out * y.itemsize
    _linear_into(x, projections, places)
    return y


def _linear_into(x: Tensor, projections: Sequence[Projection], places: list[tuple[int, int]]) -> None:
    """Compute the projections into `places`: of each output its address, and elements from row to row."""
    rows = _rows(x)
    numbers: list[int] = []
    for (packed, bias, _), (address, stride) in zip(projections, places, strict=True):
        numbers += (packed.data_ptr(), 0 if bias is None else bias.data_ptr(), address, stride)
    _core.sparse_low_rank_linears(tuple(numbers), rows.data_ptr(), rows.shape[0], rows.stride(0), _threads())


def _rows(x: Tensor) -> Tensor:
    """`x` as (rows, d_in), with the elements of a row side by side."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@torch.library.custom_op("oats::sparse_low_rank_linear", mutates_args=(), device_types="cpu")
def sparse_low_rank_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int
) -> Tensor:
    """``y = S x + U (V x) + b``, the operator.

    Args:
        x: (…, d_in), the dtype of the packed weight.
        packed: from :func:`oats.kernels.packing.pack`, of these `d_out`, `rank` and `nnz`.
        bias: (d_out,), the dtype of the packed weight, or None.

    Raises:
        FormatError: `packed` was not made by :func:`~oats.kernels.packing.pack`, or for another kind of CPU.
        DeviceError: `x` is on a CUDA device, and the kernels for it are not built.
        ValueError: an argument does not fit the packed weight.
    """
    spec = spec_of_packed(packed)
    if x.dim() == 0 or x.shape[-1] != spec.d_in or x.dtype != spec.dtype:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected {spec.dtype} (..., {spec.d_in})")
    if (d_out, rank, nnz) != (spec.d_out, spec.rank, spec.nnz):
        raise ValueError(
            f"the packed weight has {spec.d_out} outputs, rank {spec.rank} and {spec.nnz} values, "
            f"but d_out is {d_out}, rank {rank} and nnz {nnz}"
        )
    if bias is not None:
        if bias.shape != (d_out,) or bias.dtype != spec.dtype:
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {spec.dtype} ({d_out},)")
        bias = bias.contiguous()
    return linear(x, packed, bias, spec)


@sparse_low_rank_linear.register_kernel("cuda")
def _(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int) -> Tensor:
    spec = cuda.checked_spec(x, packed, bias, d_out, rank, nnz)
    return cuda.linear(x, packed, None if bias is None else bias.contiguous(), spec)


@sparse_low_rank_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], d_out))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, d_out, rank, nnz = inputs
    ctx.save_for_backward(packed)
    ctx.sizes, ctx.has_bias = (d_out, x.shape[-1], rank, nnz), bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ to_dense(packed, *ctx.sizes, grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, grad_bias, None, None, None


# The packed weight is fixed: gradients reach the input and the bias.
sparse_low_rank_linear.register_autograd(_backward, setup_context=_setup_context)
