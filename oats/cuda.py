"""The kernels' operations on CUDA tensors (docs/cuda.md).

The module ``oats._cuda`` is optional: it is built where nvcc is found. A weight is packed in a layout of its
own (``csrc/cuda/cells.h``), by torch operators on whatever device its tensors are on.

No function here but :func:`pack` and :func:`unpack` waits for the device, so a product can be captured in a
CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oats.bitmask import decode, decode_mask, encode_mask
from oats.errors import ConfigError, DeviceError, FormatError

try:
    from oats import _cuda as _built
except ImportError:
    _built = None  # type: ignore[assignment]

_kernels: Any = _built

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights, in the order of the core's numbers. Of float32 every product is by panels."""

PANEL_ELEMENTS = 1 << 25
"""Elements of a panel of the weight that a product with many rows expands at once."""

GROUP_ELEMENTS = 1 << 24
"""Elements of a weight that :func:`pack` and :func:`unpack` hold expanded at once."""

# Rows longer than this (whole matrices) are not left to one block of threads.
_LONG_ROW = 1 << 17

_REMEDY = (
    "build oats where nvcc is found (OATS_CUDA=1 pip install ., docs/cuda.md), set "
    "OATS_CUDA_FALLBACK=dense to compute with the unpacked weight, or move the model with .cpu()"
)


def fallback() -> bool:
    """Whether ``OATS_CUDA_FALLBACK=dense`` asks for products with the unpacked weight.

    Raises:
        ConfigError: it is something else.
    """
    wanted = os.environ.get("OATS_CUDA_FALLBACK", "")
    if wanted not in ("", "dense"):
        raise ConfigError(f"OATS_CUDA_FALLBACK is {wanted!r}, expected 'dense' or nothing")
    return wanted == "dense"


def is_built() -> bool:
    """Whether this installation has the CUDA kernels."""
    return _kernels is not None


def require(name: str, *, codes: bool = False) -> None:
    """Raise where the kernels cannot compute with a layer on a CUDA device.

    Args:
        name: of what needs them, for the message.
        codes: whether the layer stores codes.

    Raises:
        DeviceError: the module is not built, or the layer has codes.
    """
    if not is_built():
        raise DeviceError(
            f"{name} is on a CUDA device, and this installation of oats has no kernels for it; {_REMEDY}"
        )
    if codes:
        raise DeviceError(
            f"{name} is on a CUDA device, where int8 and int4 codes have no kernels yet; store it exactly, "
            "set OATS_CUDA_FALLBACK=dense to compute with the unpacked weight, or move the model with .cpu()"
        )


class Sizes(NamedTuple):
    """What the kernels have to know of a packed weight; the host does, without asking the device."""

    d_out: int
    d_in: int
    rank: int
    nnz: int


class _Parts(NamedTuple):
    """Views into a packed weight."""

    starts: Tensor
    masks: Tensor  # bytes
    values: Tensor
    u: Tensor  # (d_out, rank and zeros up to a multiple of 64)
    v: Tensor  # (rank, d_in and zeros up to a multiple of 64)


def packed_bytes(sizes: Sizes, dtype: torch.dtype) -> int:
    """Length of a packed weight."""
    return int(_kernels.layout(*sizes, dtype.itemsize)[5])


def _parts(packed: Tensor, sizes: Sizes, dtype: torch.dtype) -> _Parts:
    starts, masks, values, u, v, _, u_stride, v_stride = _kernels.layout(*sizes, dtype.itemsize)

    def part(begin: int, elements: int, kind: torch.dtype) -> Tensor:
        return packed[begin : begin + elements * kind.itemsize].view(kind)

    strips, tiles = _tiles(sizes.d_out, sizes.d_in)
    return _Parts(
        part(starts, strips * tiles + 1, torch.int64),
        part(masks, strips * tiles * 128, torch.uint8),
        part(values, sizes.nnz, dtype),
        part(u, sizes.d_out * u_stride, dtype).view(sizes.d_out, u_stride),
        part(v, sizes.rank * v_stride, dtype).view(sizes.rank, v_stride),
    )


def _tiles(d_out: int, d_in: int) -> tuple[int, int]:
    """Strips of the weight, and tiles of a strip."""
    return -(-d_out // _kernels.cell_rows), -(-d_in // _kernels.cell_columns)


# The axes of a weight in tiles: strip, output // 8 and output % 8 in it; tile, lane, step and input in it.
_VALUES = (0, 3, 1, 5, 2, 4, 6)  # strip, tile | half, step, output, lane, input
_VALUES_BACK = (0, 2, 4, 1, 5, 3, 6)
_MASKS = (0, 3, 5, 2, 1, 4, 6)  # strip, tile | step, output | half, lane, input
_MASKS_BACK = (0, 4, 3, 1, 5, 2, 6)


def _cut(matrix: Tensor) -> Tensor:
    d_out, d_in = matrix.shape
    strips, tiles = _tiles(d_out, d_in)
    filled = matrix.new_zeros(strips * 16, tiles * 64)
    filled[:d_out, :d_in] = matrix
    return filled.view(strips, 2, 8, tiles, 4, 4, 4)


def _row_groups(sizes: Sizes) -> Iterator[tuple[slice, slice]]:
    """Rows, and their tiles, that are laid out at once: indices take up to 8 bytes an element meanwhile."""
    _, tiles = _tiles(sizes.d_out, sizes.d_in)
    strips = max(1, GROUP_ELEMENTS // max(1, tiles * 1024))
    for first in range(0, sizes.d_out, strips * 16):
        last = min(first + strips * 16, sizes.d_out)
        yield slice(first, last), slice(first // 16 * tiles, -(-last // 16) * tiles)


def pack(
    mask: Tensor,
    values: Tensor,
    low_rank_u: Tensor,
    low_rank_v: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Lay a layer out for the CUDA kernels, on the device of its tensors.

    The tensors are those of :mod:`oats.format`, already validated there.

    Args:
        mask: (d_out, ceil(d_in / 8)), uint8.
        values: (nnz,).
        low_rank_u: (d_out, rank).
        low_rank_v: (rank, d_in).
        dtype: torch.bfloat16, torch.float16 or torch.float32; None means that of the values.

    Returns:
        uint8 (n,), opaque.
    """
    dtype = dtype or values.dtype
    rank, d_in = low_rank_v.shape
    sizes = Sizes(mask.shape[0], d_in, rank, values.numel())
    packed = torch.zeros(packed_bytes(sizes, dtype), dtype=torch.uint8, device=mask.device)
    parts = _parts(packed, sizes, dtype)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    first_value = 0
    for rows, tiles in _row_groups(sizes):
        kept = decode_mask(mask[rows], d_in)
        own = values[first_value : first_value + int(kept.sum())]
        in_tiles = _cut(kept)
        words = in_tiles.permute(_MASKS).reshape(-1, 8)
        parts.masks.view(-1, 128)[tiles] = (words * powers).sum(-1, dtype=torch.uint8).view(-1, 128)
        in_order = in_tiles.permute(_VALUES).reshape(-1)
        dense = _cut(decode(mask[rows], own.to(dtype), d_in)).permute(_VALUES).reshape(-1)
        parts.values[first_value : first_value + len(own)] = dense[in_order]
        parts.starts[1:][tiles] = in_order.view(-1, 1024).sum(1)
        first_value += len(own)
    parts.starts.copy_(parts.starts.cumsum(0))
    parts.u[:, :rank] = low_rank_u
    parts.v[:, :d_in] = low_rank_v
    return packed


def unpack(packed: Tensor, sizes: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of :func:`pack`: the tensors of :mod:`oats.format` by name."""
    parts = _parts(packed, sizes, dtype)
    mask = packed.new_empty(sizes.d_out, -(-sizes.d_in // 8))
    values = packed.new_empty(sizes.nnz, dtype=dtype)
    first_value = 0
    for rows, tiles in _row_groups(sizes):
        bits = decode_mask(parts.masks.view(-1, 128)[tiles].reshape(-1, 1), 8)
        count = rows.stop - rows.start
        strips, strip_tiles = _tiles(count, sizes.d_in)
        in_tiles = bits.view(strips, strip_tiles, 4, 8, 2, 4, 4).permute(_MASKS_BACK)
        in_order = in_tiles.permute(_VALUES)
        own = parts.values[first_value : first_value + int(bits.sum())]
        tiled = torch.zeros(in_order.shape, dtype=dtype, device=packed.device).masked_scatter_(in_order, own)
        dense = tiled.permute(_VALUES_BACK).reshape(strips * 16, strip_tiles * 64)[:count, : sizes.d_in]
        kept = in_tiles.reshape(strips * 16, strip_tiles * 64)[:count, : sizes.d_in]
        mask[rows] = encode_mask(kept)
        values[first_value : first_value + len(own)] = dense.reshape(-1)[kept.reshape(-1)]
        first_value += len(own)
    return {
        "mask": mask,
        "values": values,
        "low_rank_u": parts.u[:, : sizes.rank].clone(),
        "low_rank_v": parts.v[:, : sizes.d_in].clone(),
    }


def _queue(tensor: Tensor) -> tuple[int, int]:
    """Stream of what is queued now on the tensor's device, and the device's capability."""
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    return stream, torch.cuda.get_device_capability(tensor.device)[0]


def _current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """In it, the tensor's device is the one that kernels are launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _side_stream(device: torch.device, main: int) -> torch.cuda.Stream:
    """One for each stream, as far as torch's pool reaches: a capture of one spares what others queue."""
    return torch.cuda.Stream(device)


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """``y = S x + U (V x) + b`` without checks or autograd.

    The caller answers for the arguments: `packed` is from :func:`pack`, `x` (…, d_in) and `bias` (d_out,)
    have its dtype and device. The same call gives the same bits.
    """
    rows = x.reshape(-1, sizes.d_in)
    batch = rows.shape[0]
    if x.dtype == torch.float32 or batch > _kernels.max_columns:
        return _by_panels(rows, packed, bias, sizes).view(*x.shape[:-1], sizes.d_out)
    rows = _whole_tiles(rows)
    y = x.new_empty(*x.shape[:-1], sizes.d_out)
    splits, size = _kernels.plan(sizes.d_out, sizes.d_in, sizes.rank, batch, _multiprocessors(x.device))
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    with _current(x):
        _kernels.sparse_low_rank_linear(
            packed.data_ptr(),
            *sizes,
            DTYPES.index(x.dtype),
            rows.data_ptr(),
            batch,
            rows.stride(0),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            sizes.d_out,
            splits,
            workspace.data_ptr(),
            *_queue(x),
        )
    return y


def _whole_tiles(rows: Tensor) -> Tensor:
    """`rows` as the fused product reads them: aligned, with zeros up to a multiple of 64 columns."""
    columns = rows.shape[1]
    if (
        columns % _kernels.cell_columns == 0
        and (rows.stride(1) == 1 or columns == 1)
        and rows.stride(0) % 8 == 0
        and rows.data_ptr() % 16 == 0
    ):
        return rows
    filled = rows.new_zeros(rows.shape[0], -(-columns // 64) * 64)
    filled[:, :columns] = rows
    return filled


def _by_panels(x: Tensor, packed: Tensor, bias: Tensor | None, sizes: Sizes) -> Tensor:
    """The product of many rows, (batch, d_in): rows of S are expanded, and torch multiplies.

    The low-rank part is in the same product: [S U] times [x V x].
    """
    parts = _parts(packed, sizes, x.dtype)
    at = parts.v.shape[1]  # d_in, rounded up
    joined = x.new_zeros(x.shape[0], at + parts.u.shape[1])
    joined[:, : sizes.d_in] = x
    torch.mm(x, parts.v[:, : sizes.d_in].T, out=joined[:, at : at + sizes.rank])
    y = x.new_empty(x.shape[0], sizes.d_out)
    for first, panel in _panels(packed, parts, sizes):
        out = y[:, first : first + len(panel)]
        if bias is None:
            torch.mm(joined, panel.T, out=out)
        else:
            torch.addmm(bias[first : first + len(panel)], joined, panel.T, out=out)
    return y


def _panels(packed: Tensor, parts: _Parts, sizes: Sizes) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of [S U], panel by panel; a panel may be used until the next but one is asked for.

    On a CUDA device the next panel is expanded, on a stream of its own, while the caller uses this one.
    """
    at, dtype = parts.v.shape[1], parts.u.dtype
    columns = at + parts.u.shape[1]
    # Rows of a panel, a multiple of 16.
    step = max(1, PANEL_ELEMENTS // max(columns, 1) // 16) * 16
    starts = range(0, sizes.d_out, step)
    places = [packed.new_empty((min(step, sizes.d_out), columns), dtype=dtype) for _ in starts[:2]]
    main = side = None
    if packed.is_cuda:
        main = torch.cuda.current_stream(packed.device)
        side = _side_stream(packed.device, main.cuda_stream)
        side.wait_stream(main)
    used: list[torch.cuda.Event] = []
    for number, first in enumerate(starts):
        panel = places[number % 2][: sizes.d_out - first]
        with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
            if side is not None and number >= 2:
                side.wait_event(used[number - 2])
            expand(packed, sizes, panel[:, :at], first)
            panel[:, at:] = parts.u[first : first + len(panel)]
        if main is not None and side is not None:
            main.wait_stream(side)
        yield first, panel
        if main is not None:
            used.append(main.record_event())


def expand(packed: Tensor, sizes: Sizes, out: Tensor, first: int = 0) -> Tensor:
    """Write rows of S, dense, with zeros behind the last input.

    Args:
        packed: from :func:`pack`.
        sizes: its sizes.
        out: (rows, at least d_in) of its dtype, elements of a row side by side.
        first: of the rows, a multiple of 16.
    """
    with _current(out):
        _kernels.expand(
            packed.data_ptr(),
            *sizes,
            DTYPES.index(out.dtype),
            first,
            out.shape[0],
            out.data_ptr(),
            out.stride(0),
            out.shape[1],
            *_queue(out),
        )
    return out


@torch.library.custom_op("oats::cuda_sparse_low_rank_linear", mutates_args=(), device_types="cuda")
def sparse_low_rank_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int
) -> Tensor:
    """``y = S x + U (V x) + b`` on a CUDA device, the operator.

    Args:
        x: (…, d_in), the dtype of the packed weight.
        packed: from :func:`pack`.
        bias: (d_out,), the dtype of the packed weight, or None.
        d_out: number of outputs.
        rank: of the packed weight.
        nnz: of the packed weight.

    Raises:
        DeviceError: the kernels are not built.
        FormatError: `packed` does not have these sizes.
        ValueError: `x` or `bias` does not fit it.
    """
    require("x")
    sizes = _checked(x, packed, bias, d_out, rank, nnz)
    return linear(x, packed, None if bias is None else bias.contiguous(), sizes)


def _checked(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int) -> Sizes:
    if x.dim() == 0 or x.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected (..., d_in) of {names}")
    sizes = Sizes(d_out, x.shape[-1], rank, nnz)
    expected = packed_bytes(sizes, x.dtype)
    if packed.dtype != torch.uint8 or packed.shape != (expected,) or not packed.is_contiguous():
        raise FormatError(
            f"the packed weight is {packed.dtype} {tuple(packed.shape)}, expected torch.uint8 ({expected},) "
            f"for {d_out} outputs, {sizes.d_in} inputs, rank {rank} and {nnz} values of {x.dtype}"
        )
    if bias is not None and (bias.shape != (d_out,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {x.dtype} ({d_out},)")
    for name, tensor in (("packed weight", packed), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"the {name} is on {tensor.device} and x on {x.device}; move one of them")
    return sizes


@sparse_low_rank_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], d_out))


@torch.library.custom_op("oats::cuda_to_dense", mutates_args=(), device_types="cuda")
def to_dense(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    """``S + U V`` of a packed weight of `dtype`, (d_out, d_in), summed in fp32."""
    return dense(packed, Sizes(d_out, d_in, rank, nnz), dtype)


@to_dense.register_fake
def _(packed: Tensor, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((d_out, d_in), dtype=dtype)


def dense(packed: Tensor, sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """What :func:`to_dense` returns, without the operator."""
    parts = _parts(packed, sizes, dtype)
    sparse = expand(packed, sizes, packed.new_empty(sizes[:2], dtype=dtype)).float()
    return sparse.addmm_(parts.u[:, : sizes.rank].float(), parts.v[:, : sizes.d_in].float()).to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, bias, d_out, rank, nnz = inputs
    ctx.save_for_backward(packed)
    ctx.sizes, ctx.has_bias = Sizes(d_out, x.shape[-1], rank, nnz), bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ to_dense(packed, *ctx.sizes, grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.sizes.d_out).sum(0)
    return grad_x, None, grad_bias, None, None, None


# The packed weight is fixed: gradients reach the input and the bias.
sparse_low_rank_linear.register_autograd(_backward, setup_context=_setup_context)


def keep_largest_in_rows(rows: Tensor, count: int, out: Tensor) -> None:
    """:func:`oats.ops.keep_largest_in_rows` of checked, contiguous tensors on a CUDA device."""
    require("the matrix")
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
    """Few rows, each too long for one block: torch selects with the whole device."""
    for row, into in zip(rows, out, strict=True):
        size = row.abs()
        threshold = size.topk(count, sorted=False).values.min()
        larger, equal = size > threshold, size == threshold
        # Of equal magnitudes the first ones.
        first = equal.cumsum(0) <= count - larger.sum()
        into.copy_(row).masked_fill_(~(larger | (equal & first)), 0)


def splits_in_one_pass(rows: Tensor, count: int, out: Tensor) -> bool:
    """Whether :func:`split_largest_in_rows` takes such tensors."""
    require("the matrix")
    return bool(
        rows.dtype in (torch.float32, torch.float64)
        and (out.shape, out.dtype, out.device) == (rows.shape, rows.dtype, rows.device)
        and rows.is_contiguous()
        and out.is_contiguous()
        and 0 < count < rows.shape[1]
        and _kernels.max_group < rows.shape[1] <= _LONG_ROW
    )


def split_largest_in_rows(rows: Tensor, count: int, out: Tensor) -> Tensor:
    """:func:`oats.ops.split_largest_in_rows` in one kernel, where :func:`splits_in_one_pass` holds."""
    squares = rows.new_empty(rows.shape[0], dtype=torch.float64)
    _select(rows, count, out, squares.data_ptr())
    return squares.sqrt_()


def _select(rows: Tensor, count: int, out: Tensor, squares: int) -> None:
    with _current(rows):
        _kernels.keep_largest_in_rows(
            *(rows.data_ptr(), *rows.shape, count, rows.element_size(), out.data_ptr(), squares),
            *_queue(rows),
        )
