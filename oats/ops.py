"""The C++ kernels as torch operators.

``torch.ops.oats.sparse_low_rank_linear`` is what `torch.compile`, `torch.export` and autograd see;
:func:`linear` is the same product with as few Python steps as it can have, for eager inference.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# torch first: it loads the OpenMP runtime whose threads the core then shares.
import torch
from torch import Tensor
from torch.autograd import forward_ad

from oats import _core, cuda
from oats.errors import ConfigError, FormatError, WeightError
from oats.storage import EXACT, Storage

_VALUE_BYTES = {torch.float32: 4, torch.bfloat16: 2}
_DTYPES = {bytes_: dtype for dtype, bytes_ in _VALUE_BYTES.items()}
# By name here: looking them up through their modules takes as long as the calls.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_threads = torch.get_num_threads

# The packed layout is read with aligned loads of one cache line.
_ALIGNMENT = 64

# The pool is torch's too. Without this, the first parallel region of a forked child, torch's or ours, would
# wait for threads that only its parent has.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_core.release_threads)


def active_isa() -> str:
    """The instruction set that new weights are packed for: the best one, or what ``OATS_ISA`` allows.

    Raises:
        ConfigError: ``OATS_ISA`` is not a name that oats knows.
    """
    wanted = os.environ.get("OATS_ISA")
    if wanted is not None and wanted not in _core.isa_names():
        raise ConfigError(f"OATS_ISA is {wanted!r}, expected one of {', '.join(_core.isa_names())}")
    return _core.active_isa()


def available_isas() -> list[str]:
    """The instruction sets that this machine supports, from the most general to the best.

    >>> available_isas()[0]
    'scalar'
    """
    names = _core.isa_names()
    return names[: names.index(_core.best_isa()) + 1]


def mask_population(mask: Tensor, d_in: int) -> int:
    """Number of kept values of a mask (uint8, (d_out, ceil(d_in / 8))); -1 where a padding bit is set."""
    mask = mask.cpu().contiguous()
    return _core.mask_population(mask.data_ptr(), mask.shape[0], d_in)


def stored_values(mask: Tensor, values: Tensor, d_in: int, storage: Storage) -> int:
    """Number of kept values that are stored; of int4, two in a byte, only the mask tells."""
    return mask_population(mask, d_in) if storage.values == "int4" else values.numel()


def pack(
    mask: Tensor,
    values: Tensor,
    low_rank_u: Tensor,
    low_rank_v: Tensor,
    *,
    storage: Storage = EXACT,
    dtype: torch.dtype | None = None,
    isa: str | None = None,
    **scales: Tensor,
) -> Tensor:
    """Lay a layer out for the kernels of one instruction set.

    The tensors are those of :mod:`oats.format`, already validated there.

    Args:
        storage: how they are stored.
        dtype: of inputs and outputs, torch.float32 or torch.bfloat16; None means that of the values.
        isa: a name from :func:`available_isas`; None means :func:`active_isa`.
        scales: the tensors beyond these four that `storage` has.

    Returns:
        uint8 (n,), opaque: it depends on the instruction set and is never saved.
    """
    isa = active_isa() if isa is None else isa
    rank, d_in = low_rank_v.shape
    nnz = stored_values(mask, values, d_in, storage)
    shape = _core.WeightShape(
        d_out=mask.shape[0],
        d_in=d_in,
        rank=rank,
        nnz=nnz,
        value_bytes=_VALUE_BYTES[dtype or values.dtype],
        values=storage.values,
        factors=storage.low_rank,
        scale_columns=storage.scale_columns,
    )
    packed = _aligned(_core.packed_bytes(shape, isa))
    tensors = {"mask": mask, "values": values, "low_rank_u": low_rank_u, "low_rank_v": low_rank_v, **scales}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _core.pack(shape, _addresses(tensors), isa, packed.data_ptr(), torch.get_num_threads())
    return packed


def _addresses(tensors: Mapping[str, Tensor]) -> _core.TensorAddresses:
    return _core.TensorAddresses(**{name: tensor.data_ptr() for name, tensor in tensors.items()})


def unpack(packed: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`pack`: the tensors by name.

    Raises:
        FormatError: `packed` was not made by :func:`pack`, or for another kind of CPU.
    """
    header = _header(packed)
    shapes = header.storage.tensors(header.d_out, header.d_in, header.rank, header.nnz, header.dtype)
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    _core.unpack(packed.data_ptr(), _addresses(tensors), torch.get_num_threads())
    return tensors


def packed_isa(packed: Tensor) -> str:
    """The instruction set that a packed weight was laid out for."""
    return _header(packed).isa


def is_plain(x: Tensor) -> bool:
    """Whether nothing but a kernel will see `x`: no compiler, tracer, mode, lazy negation."""
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not _is_compiling()
        and _tracing_state() is None
        and not x.is_neg()
        and _dispatch_modes() == 0
        and _transform() is None
        and forward_ad._current_level < 0
    )


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int) -> Tensor:
    """``y = S x + U (V x) + b`` without checks or autograd.

    The caller answers for the arguments: `packed` is from :func:`pack` on this machine, `x` (…, d_in)
    and `bias` (d_out,) are on the CPU and have its dtype.
    """
    *outer, stride = x.shape
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


Projection = tuple[Tensor, Tensor | None, int]
"""``packed``, ``bias`` and ``d_out`` of :func:`linear`."""


def linear_many(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """What :func:`linear` returns for each of the projections, bit for bit, in one call of the kernels.

    Args:
        x: (…, d_in), read once for all.
        projections: at least one, all of d_in inputs and the dtype of `x`.

    Returns:
        (…, d_out) for each of them.
    """
    outer = x.shape[:-1]
    outputs = [x.new_empty((*outer, d_out)) for _, _, d_out in projections]
    _linear_into(x, projections, [(y.data_ptr(), y.shape[-1]) for y in outputs])
    return outputs


def linear_joined(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """The outputs of :func:`linear_many` one after another in one tensor, (…, sum of d_out)."""
    width = sum(d_out for _, _, d_out in projections)
    y = x.new_empty((*x.shape[:-1], width))
    address, places = y.data_ptr(), []
    for _, _, d_out in projections:
        places.append((address, width))
        address += d_out * y.itemsize
    _linear_into(x, projections, places)
    return y


def _linear_into(x: Tensor, projections: Sequence[Projection], places: list[tuple[int, int]]) -> None:
    """Compute the projections into `places`: address and elements from row to row of each output."""
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
def sparse_low_rank_linear(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int) -> Tensor:
    """``y = S x + U (V x) + b``, the operator.

    Args:
        x: (…, d_in), the dtype of the packed weight.
        packed: from :func:`pack`.
        bias: (d_out,), the dtype of the packed weight, or None.
        d_out: number of outputs.

    Raises:
        FormatError: `packed` was not made by :func:`pack`, or for another kind of CPU.
        ValueError: `x`, `bias` or `d_out` does not fit it.
    """
    h = _header(packed)
    dtype = h.dtype
    if x.dim() == 0 or x.shape[-1] != h.d_in or x.dtype != dtype:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected {dtype} (..., {h.d_in})")
    if d_out != h.d_out:
        raise ValueError(f"d_out is {d_out}, but the packed weight has {h.d_out} outputs")
    if bias is not None:
        if bias.shape != (d_out,) or bias.dtype != dtype:
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {dtype} ({d_out},)")
        bias = bias.contiguous()
    return linear(x, packed, bias, d_out)


@sparse_low_rank_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], d_out))


@torch.library.custom_op("oats::to_dense", mutates_args=(), device_types="cpu")
def to_dense(packed: Tensor, d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    """``S + U V`` of a packed weight, (d_out, d_in) in `dtype`, summed in fp32."""
    sparse, u, v = _header(packed).storage.exact_parts(unpack(packed), d_in)
    return sparse.addmm_(u, v).to(dtype)


@to_dense.register_fake
def _(packed: Tensor, d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((d_out, d_in), dtype=dtype)


@torch.library.custom_op("oats::read_rows", mutates_args=(), device_types="cpu")
def read_rows(packed: Tensor, rows: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    """Some rows of a packed weight without a low-rank part, as an embedding reads them.

    Args:
        packed: from :func:`pack`, of rank 0.
        rows: int32 or int64, of any shape, each at least 0 and below d_out.
        d_in: number of inputs.
        dtype: of the packed weight.

    Returns:
        (*rows.shape, d_in), in `dtype`.

    Raises:
        FormatError: `packed` was not made by :func:`pack`, or for another kind of CPU.
        IndexError: there is no such row.
        ValueError: `d_in` or `dtype` is not that of the weight, or it has a low-rank part; or `rows` are no
            whole numbers.
    """
    if rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are {rows.dtype}, expected torch.int32 or torch.int64")
    h = _header(packed)
    if (h.d_in, h.dtype, h.rank) != (d_in, dtype, 0):
        raise ValueError(
            f"the packed weight is {h.dtype} with {h.d_in} inputs and rank {h.rank}, expected {dtype} with "
            f"{d_in} and rank 0"
        )
    indices = rows.long().contiguous()
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= h.d_out):
        raise IndexError(
            f"rows are {int(indices.min())} to {int(indices.max())}, but the packed weight has {h.d_out}"
        )
    out = torch.empty((*rows.shape, d_in), dtype=dtype)
    _core.read_sparse_rows(
        packed.data_ptr(), indices.data_ptr(), indices.numel(), out.data_ptr(), torch.get_num_threads()
    )
    return out


@read_rows.register_fake
def _(packed: Tensor, rows: Tensor, d_in: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((*rows.shape, d_in), dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    """``x / sqrt(mean(x²) + eps)`` of each row, times a weight, without checks or autograd.

    Args:
        x: (…, n), contiguous, float32 or bfloat16, on the CPU.
        weight: (n,), of the same dtype.
        eps: added to the mean of the squares.
        one_plus: one plus the weight multiplies, before the result is rounded to the dtype; else the weight,
            after it.

    Returns:
        The shape and dtype of `x`.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0, one_plus=False)
    tensor([[0.8485, 1.1314]])
    """
    y = torch.empty_like(x)
    columns = x.shape[-1]
    _core.rms_norm(
        x.data_ptr(), x.numel() // columns if columns else 0, columns, weight.data_ptr(), eps, one_plus,
        x.element_size(), y.data_ptr(), _threads(),
    )  # fmt: skip
    return y


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
    if (
        not (rows.is_cpu or rows.is_cuda)
        or rows.dim() != 2
        or rows.dtype not in (torch.float32, torch.float64)
    ):
        raise WeightError(
            f"rows are {rows.dtype} {tuple(rows.shape)} on {rows.device}, expected 2-D float32 or float64 "
            "on the CPU or a CUDA device"
        )
    rows = rows.contiguous()
    kept = torch.empty_like(rows) if out is None else out
    if (
        kept.shape != rows.shape
        or kept.dtype != rows.dtype
        or kept.device != rows.device
        or not kept.is_contiguous()
    ):
        raise WeightError(
            f"out is {kept.dtype} {tuple(kept.shape)} on {kept.device}, expected contiguous {rows.dtype} "
            f"{tuple(rows.shape)} on {rows.device}"
        )
    if rows.is_cuda:
        cuda.keep_largest_in_rows(rows, count, kept)
        return kept
    number, columns = rows.shape
    _core.keep_largest_in_rows(
        rows.data_ptr(), number, columns, count, rows.element_size(), kept.data_ptr(), torch.get_num_threads()
    )
    return kept


def split_largest_in_rows(rows: Tensor, count: int, out: Tensor) -> Tensor:
    """Move the `count` entries of largest magnitude of each row from `rows` to `out`.

    Args:
        rows: (n, columns), as for :func:`keep_largest_in_rows`, contiguous; zeros are left where they were.
        count: at least 0; of equal magnitudes the lowest column is moved.
        out: to write to, contiguous, of the shape and dtype of `rows`; zeros where nothing is moved.

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

    float32 sums of a row stay short, and converting every element to float64 takes 25 times as long.
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.double()


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    x, packed, bias, d_out = inputs
    ctx.save_for_backward(packed)
    ctx.d_out, ctx.d_in, ctx.has_bias = d_out, x.shape[-1], bias is not None  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors  # type: ignore[attr-defined]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        grad_x = grad @ to_dense(packed, ctx.d_out, ctx.d_in, grad.dtype)  # type: ignore[attr-defined]
    if ctx.has_bias and ctx.needs_input_grad[2]:  # type: ignore[attr-defined]
        grad_bias = grad.reshape(-1, ctx.d_out).sum(0)  # type: ignore[attr-defined]
    return grad_x, None, grad_bias, None


# The packed weight is fixed: gradients reach the input and the bias.
sparse_low_rank_linear.register_autograd(_backward, setup_context=_setup_context)


def _aligned(size: int) -> Tensor:
    """uint8 (size,), at a multiple of a cache line whatever the allocator does."""
    packed = torch.empty(size, dtype=torch.uint8)
    if packed.data_ptr() % _ALIGNMENT == 0:
        return packed
    spare = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    return spare[-spare.data_ptr() % _ALIGNMENT :][:size]


class _Header(NamedTuple):
    """What a packed weight says of itself."""

    d_out: int
    d_in: int
    rank: int
    nnz: int
    dtype: torch.dtype
    storage: Storage
    isa: str


def _header(packed: Tensor) -> _Header:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.device.type != "cpu":
        raise FormatError("a packed weight is a 1-D uint8 tensor on the CPU, as oats.ops.pack makes it")
    try:
        shape, isa = _core.packed_header(packed.data_ptr(), packed.numel())
    except ValueError as error:
        raise FormatError(f"{error}; pack the weight again on this machine") from error
    storage = Storage(shape.values, shape.factors, shape.scale_columns)
    return _Header(shape.d_out, shape.d_in, shape.rank, shape.nnz, _DTYPES[shape.value_bytes], storage, isa)
