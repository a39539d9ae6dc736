"""The product on a CUDA device: one fused kernel for few rows of x, panels of the weight for many.

Nothing here waits for the device: the host knows the sizes of a packed weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from oats.errors import FormatError
from oats.format.layer_spec import LayerSpec
from oats.kernels.cuda import availability, launch
from oats.kernels.cuda.packing import Parts, packed_bytes, parts_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of weights, in the order of the core's numbers. The fused kernel does not take float32."""

PANEL_ELEMENTS = 1 << 25
"""Elements of a panel of the weight that a product with many rows expands at once."""


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """What :func:`oats.kernels.sparse_low_rank_linear.linear` returns; the same call gives the same bits.

    Raises:
        ValueError: the arguments are on several devices.
    """
    _check_devices(x, packed, bias)
    rows = x.reshape(-1, spec.d_in)
    batch = rows.shape[0]
    compiled = availability.compiled
    if x.dtype == torch.float32 or batch > compiled.max_columns:
        return _by_panels(rows, packed, bias, spec).view(*x.shape[:-1], spec.d_out)
    rows = _whole_cells(rows)
    y = x.new_empty(*x.shape[:-1], spec.d_out)
    splits, size = compiled.plan(spec.d_out, spec.d_in, spec.rank, batch, launch.multiprocessors(x.device))
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
    weight = packed.data_ptr(), *spec.sizes, DTYPES.index(x.dtype)
    inputs = rows.data_ptr(), batch, rows.stride(0)
    outputs = 0 if bias is None else bias.data_ptr(), y.data_ptr(), spec.d_out
    with launch.on_device_of(x):
        compiled.sparse_low_rank_linear(
            *weight, *inputs, *outputs, splits, workspace.data_ptr(), *launch.stream_and_capability(x)
        )
    return y


def _whole_cells(rows: Tensor) -> Tensor:
    """`rows` as the fused kernel reads them: aligned, with zeros up to a multiple of 64 columns."""
    columns = rows.shape[1]
    if (
        columns % availability.compiled.cell_columns == 0
        and (rows.stride(1) == 1 or columns == 1)
        and rows.stride(0) % 8 == 0
        and rows.data_ptr() % 16 == 0
    ):
        return rows
    filled = rows.new_zeros(rows.shape[0], -(-columns // 64) * 64)
    filled[:, :columns] = rows
    return filled


def _by_panels(x: Tensor, packed: Tensor, bias: Tensor | None, spec: LayerSpec) -> Tensor:
    """The product of many rows, (batch, d_in): rows of S are expanded, and torch multiplies.

    One product computes both parts: [S U] times [x V x].
    """
    parts = parts_of(packed, spec)
    at = parts.v.shape[1]  # d_in, rounded up
    joined = x.new_zeros(x.shape[0], at + parts.u.shape[1])
    joined[:, : spec.d_in] = x
    torch.mm(x, parts.v[:, : spec.d_in].T, out=joined[:, at : at + spec.rank])
    y = x.new_empty(x.shape[0], spec.d_out)
    for first, panel in _panels(packed, parts, spec):
        out = y[:, first : first + len(panel)]
        if bias is None:
            torch.mm(joined, panel.T, out=out)
        else:
            torch.addmm(bias[first : first + len(panel)], joined, panel.T, out=out)
    return y


def _panels(packed: Tensor, parts: Parts, spec: LayerSpec) -> Iterator[tuple[int, Tensor]]:
    """First row and rows of [S U], panel by panel; a panel is overwritten when the next but one is asked for.

    On a CUDA device a second stream expands the next panel while the caller uses this one.
    """
    at = parts.v.shape[1]
    columns = at + parts.u.shape[1]
    # Rows of a panel, a multiple of 16.
    step = max(1, PANEL_ELEMENTS // max(columns, 1) // 16) * 16
    starts = range(0, spec.d_out, step)
    places = [packed.new_empty((min(step, spec.d_out), columns), dtype=spec.dtype) for _ in starts[:2]]
    main = side = None
    if packed.is_cuda:
        main = torch.cuda.current_stream(packed.device)
        side = launch.side_stream(packed.device, main.cuda_stream)
        side.wait_stream(main)
    used: list[torch.cuda.Event] = []
    for number, first in enumerate(starts):
        panel = places[number % 2][: spec.d_out - first]
        with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
            if side is not None and number >= 2:
                side.wait_event(used[number - 2])
            expand(packed, spec, panel[:, :at], first)
            panel[:, at:] = parts.u[first : first + len(panel)]
        if main is not None and side is not None:
            main.wait_stream(side)
        yield first, panel
        if main is not None:
            used.append(main.record_event())


def expand(packed: Tensor, spec: LayerSpec, out: Tensor, first: int = 0) -> Tensor:
    """Write rows of S, dense, with zeros behind the last input.

    Args:
        packed: from :func:`oats.kernels.cuda.packing.pack`, of `spec`.
        out: (rows, at least d_in) of its dtype, elements of a row side by side.
        first: of the rows, a multiple of 16.
    """
    weight = packed.data_ptr(), *spec.sizes, DTYPES.index(out.dtype)
    rows, columns = out.shape
    with launch.on_device_of(out):
        availability.compiled.expand(
            *weight, first, rows, out.data_ptr(), out.stride(0), columns, *launch.stream_and_capability(out)
        )
    return out


def to_dense(packed: Tensor, spec: LayerSpec) -> Tensor:
    """``S + U V`` of a packed weight, (d_out, d_in) in its dtype, summed in float32."""
    parts = parts_of(packed, spec)
    sparse = expand(packed, spec, packed.new_empty((spec.d_out, spec.d_in), dtype=spec.dtype)).float()
    u, v = parts.u[:, : spec.rank].float(), parts.v[:, : spec.d_in].float()
    return sparse.addmm_(u, v).to(spec.dtype)


def checked_spec(
    x: Tensor, packed: Tensor, bias: Tensor | None, d_out: int, rank: int, nnz: int
) -> LayerSpec:
    """The spec of a packed weight, once the arguments of the operator are known to fit each other.

    Raises:
        DeviceError: the kernels are not built.
        FormatError: `packed` does not have these sizes.
        ValueError: `x` or `bias` does not fit it.
    """
    availability.check_cuda_kernels("x", x.device)
    if x.dim() == 0 or x.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected (..., d_in) of {names}")
    spec = LayerSpec(d_out, x.shape[-1], rank, nnz, x.dtype)
    expected = packed_bytes(spec)
    if packed.dtype != torch.uint8 or packed.shape != (expected,) or not packed.is_contiguous():
        raise FormatError(
            f"the packed weight is {packed.dtype} {tuple(packed.shape)}, expected torch.uint8 ({expected},) "
            f"for {d_out} outputs, {spec.d_in} inputs, rank {rank} and {nnz} values of {x.dtype}"
        )
    if bias is not None and (bias.shape != (d_out,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {x.dtype} ({d_out},)")
    _check_devices(x, packed, bias)
    return spec


def _check_devices(x: Tensor, packed: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("packed weight", packed), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"the {name} is on {tensor.device} and x on {x.device}; move one of them")
