"""The layout that the CUDA kernels read (csrc/cuda/cells.h), written by torch operators on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from oats.format.bitmask import decode, decode_mask, encode_mask
from oats.format.layer_spec import LayerSpec, kept_elements
from oats.kernels.cuda import availability

GROUP_ELEMENTS = 1 << 24
"""Elements of a weight that :func:`pack` and :func:`unpack` hold expanded at once."""


class Parts(NamedTuple):
    """Views into a packed weight."""

    starts: Tensor  # int64, the index of the first value of each cell
    masks: Tensor  # uint8, 128 a cell
    values: Tensor
    u: Tensor  # (d_out, rank and zeros up to a multiple of 64)
    v: Tensor  # (rank, d_in and zeros up to a multiple of 64)


def packed_bytes(spec: LayerSpec) -> int:
    """Length of a packed weight."""
    return int(availability.compiled.layout(*spec.sizes, spec.dtype.itemsize)[5])


def parts_of(packed: Tensor, spec: LayerSpec) -> Parts:
    """The parts of a packed weight."""
    layout = availability.compiled.layout(*spec.sizes, spec.dtype.itemsize)
    starts, masks, values, u, v, _, u_stride, v_stride = layout

    def part(begin: int, elements: int, dtype: torch.dtype) -> Tensor:
        return packed[begin : begin + elements * dtype.itemsize].view(dtype)

    strips, cells = _cells(spec.d_out, spec.d_in)
    return Parts(
        part(starts, strips * cells + 1, torch.int64),
        part(masks, strips * cells * 128, torch.uint8),
        part(values, spec.nnz, spec.dtype),
        part(u, spec.d_out * u_stride, spec.dtype).view(spec.d_out, u_stride),
        part(v, spec.rank * v_stride, spec.dtype).view(spec.rank, v_stride),
    )


def pack(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor:
    """:func:`oats.kernels.packing.pack` on a CUDA device; the dtype of `spec` may also be torch.float16."""
    values = tensors["values"]
    # The kernels read masks.
    mask = tensors["mask"] if spec.storage.mask else encode_mask(kept_elements(tensors, spec.d_in))
    packed = torch.zeros(packed_bytes(spec), dtype=torch.uint8, device=mask.device)
    parts = parts_of(packed, spec)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    first_value = 0
    for rows, cells in _row_groups(spec):
        kept = decode_mask(mask[rows], spec.d_in)
        own = values[first_value : first_value + int(kept.sum())]
        in_cells = _cut(kept)
        words = in_cells.permute(_MASKS).reshape(-1, 8)
        parts.masks.view(-1, 128)[cells] = (words * powers).sum(-1, dtype=torch.uint8).view(-1, 128)
        in_order = in_cells.permute(_VALUES).reshape(-1)
        dense = _cut(decode(mask[rows], own.to(spec.dtype), spec.d_in)).permute(_VALUES).reshape(-1)
        parts.values[first_value : first_value + len(own)] = dense[in_order]
        parts.starts[1:][cells] = in_order.view(-1, 1024).sum(1)
        first_value += len(own)
    parts.starts.copy_(parts.starts.cumsum(0))
    parts.u[:, : spec.rank] = tensors["low_rank_u"]
    parts.v[:, : spec.d_in] = tensors["low_rank_v"]
    return packed


def unpack(packed: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
    """The inverse of :func:`pack`: the tensors by name."""
    parts = parts_of(packed, spec)
    mask = packed.new_empty(spec.d_out, -(-spec.d_in // 8))
    values = packed.new_empty(spec.nnz, dtype=spec.dtype)
    first_value = 0
    for rows, cells in _row_groups(spec):
        bits = decode_mask(parts.masks.view(-1, 128)[cells].reshape(-1, 1), 8)
        count = rows.stop - rows.start
        strips, strip_cells = _cells(count, spec.d_in)
        in_cells = bits.view(strips, strip_cells, 4, 8, 2, 4, 4).permute(_MASKS_BACK)
        in_order = in_cells.permute(_VALUES)
        own = parts.values[first_value : first_value + int(bits.sum())]
        laid_out = torch.zeros(in_order.shape, dtype=spec.dtype, device=packed.device)
        laid_out = laid_out.masked_scatter_(in_order, own).permute(_VALUES_BACK)
        dense = laid_out.reshape(strips * 16, strip_cells * 64)[:count, : spec.d_in]
        kept = in_cells.reshape(strips * 16, strip_cells * 64)[:count, : spec.d_in]
        mask[rows] = encode_mask(kept)
        values[first_value : first_value + len(own)] = dense.reshape(-1)[kept.reshape(-1)]
        first_value += len(own)
    return {
        **({"mask": mask} if spec.storage.mask else {}),
        "values": values,
        "low_rank_u": parts.u[:, : spec.rank].clone(),
        "low_rank_v": parts.v[:, : spec.d_in].clone(),
    }


# The axes of a weight that is cut into cells: strip, output // 8 and output % 8 in the strip; cell, lane,
# step and input in the cell. Their order in memory:
_VALUES = (0, 3, 1, 5, 2, 4, 6)  # strip, cell | half, step, output, lane, input
_VALUES_BACK = (0, 2, 4, 1, 5, 3, 6)
_MASKS = (0, 3, 5, 2, 1, 4, 6)  # strip, cell | step, output | half, lane, input
_MASKS_BACK = (0, 4, 3, 1, 5, 2, 6)


def _cells(d_out: int, d_in: int) -> tuple[int, int]:
    """Strips of the weight, and cells of a strip."""
    compiled = availability.compiled
    return -(-d_out // compiled.cell_rows), -(-d_in // compiled.cell_columns)


def _cut(matrix: Tensor) -> Tensor:
    """A matrix, with zeros up to whole cells, as the axes above."""
    d_out, d_in = matrix.shape
    strips, cells = _cells(d_out, d_in)
    filled = matrix.new_zeros(strips * 16, cells * 64)
    filled[:d_out, :d_in] = matrix
    return filled.view(strips, 2, 8, cells, 4, 4, 4)


def _row_groups(spec: LayerSpec) -> Iterator[tuple[slice, slice]]:
    """Rows that are laid out at once, and their cells; indices take up to 8 bytes an element meanwhile."""
    _, cells = _cells(spec.d_out, spec.d_in)
    strips = max(1, GROUP_ELEMENTS // max(1, cells * 1024))
    for first in range(0, spec.d_out, strips * 16):
        last = min(first + strips * 16, spec.d_out)
        yield slice(first, last), slice(first // 16 * cells, -(-last // 16) * cells)
