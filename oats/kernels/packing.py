"""From the tensors of a layer to the layout that kernels read, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from oats import _core
from oats.config import Storage
from oats.errors import FormatError
from oats.format.layer_spec import LayerSpec
from oats.kernels.cuda import packing as cuda
from oats.kernels.isa import active_isa

_VALUE_BYTES = {torch.float32: 4, torch.bfloat16: 2}
_DTYPES = {bytes_: dtype for dtype, bytes_ in _VALUE_BYTES.items()}

# The CPU's kernels read the packed layout with aligned loads of one cache line.
_ALIGNMENT = 64


def pack(tensors: Mapping[str, Tensor], spec: LayerSpec, *, isa: str | None = None) -> Tensor:
    """Lay a layer out for the kernels of the device that its tensors are on.

    Args:
        tensors: those of ``spec.tensors()``, validated (:mod:`oats.format.validation`).
        spec: the layer's sizes and storage. On a CUDA device nothing may be stored as codes.
        isa: on the CPU, a name from :func:`oats.kernels.isa.available_isas`; None means
            :func:`~oats.kernels.isa.active_isa`.

    Returns:
        uint8 (n,), opaque: it depends on the device and the instruction set, and is never saved.
    """
    if tensors["values"].is_cuda:
        return cuda.pack(tensors, spec)
    isa = active_isa() if isa is None else isa
    packed = _aligned(_core.packed_bytes(_shape(spec), isa))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _core.pack(_shape(spec), _addresses(tensors), isa, packed.data_ptr(), torch.get_num_threads())
    return packed


def unpack(packed: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
    """The inverse of :func:`pack`: the tensors by name, on the device of `packed`.

    Raises:
        FormatError: `packed` was not made by :func:`pack` of this spec, or for another kind of CPU.
    """
    if packed.is_cuda:
        return cuda.unpack(packed, spec)
    found = spec_of_packed(packed)
    if found != spec:
        raise FormatError(f"the packed weight is of {found}, expected {spec}; pack the weight again")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in spec.tensors().items()}
    _core.unpack(packed.data_ptr(), _addresses(tensors), torch.get_num_threads())
    return tensors


def clone_packed(packed: Tensor) -> Tensor:
    """A copy of a packed weight, aligned as the kernels need it."""
    # CUDA's allocator always aligns.
    clone = torch.empty_like(packed) if packed.is_cuda else _aligned(packed.numel())
    return clone.copy_(packed)


def packed_isa(packed: Tensor) -> str:
    """The instruction set that a packed weight was laid out for, or ``"cuda"``."""
    return "cuda" if packed.is_cuda else _header(packed)[1]


def spec_of_packed(packed: Tensor) -> LayerSpec:
    """The spec in the header of a weight that is packed for the CPU.

    Raises:
        FormatError: `packed` was not made by :func:`pack`, or for another kind of CPU.
    """
    shape, _ = _header(packed)
    storage = Storage(shape.values, shape.factors, shape.scale_columns, shape.masked)
    return LayerSpec(shape.d_out, shape.d_in, shape.rank, shape.nnz, _DTYPES[shape.value_bytes], storage)


def _header(packed: Tensor) -> tuple[_core.WeightShape, str]:
    """The checked header of a weight that is packed for the CPU: its sizes and its instruction set."""
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.device.type != "cpu":
        raise FormatError("a packed weight is a 1-D uint8 tensor on the CPU, as oats.kernels packs it")
    try:
        return _core.packed_header(packed.data_ptr(), packed.numel())
    except ValueError as error:
        raise FormatError(f"{error}; pack the weight again on this machine") from error


def _shape(spec: LayerSpec) -> _core.WeightShape:
    return _core.WeightShape(
        d_out=spec.d_out,
        d_in=spec.d_in,
        rank=spec.rank,
        nnz=spec.nnz,
        value_bytes=_VALUE_BYTES[spec.dtype],
        values=spec.storage.values,
        factors=spec.storage.low_rank,
        scale_columns=spec.storage.scale_columns,
        masked=spec.storage.mask,
    )


def _addresses(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _aligned(size: int) -> Tensor:
    """uint8 (size,) that starts at a cache line; torch's allocator does not promise that."""
    packed = torch.empty(size, dtype=torch.uint8)
    if packed.data_ptr() % _ALIGNMENT == 0:
        return packed
    spare = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
    return spare[-spare.data_ptr() % _ALIGNMENT :][:size]
