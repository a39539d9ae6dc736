"""Headers of safetensors files, and the check that a layer's tensors are what ``config.json`` says.

``from_pretrained`` and ``oats info`` share these checks. They read no weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from oats.checkpoint.config_json import RETRY
from oats.config import EXACT, Storage
from oats.errors import FormatError
from oats.format.layer_spec import LayerSpec

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Floating-point dtypes, by the names that safetensors gives them."""

_DTYPES = {**FLOATS, "U8": torch.uint8, "I8": torch.int8}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LAYER_DTYPES = ("F32", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a safetensors file says about one tensor."""

    path: str
    name: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: str | Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: name → tensor.

    Raises:
        FormatError: the file is not a safetensors file, or is truncated.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # checks dtypes, shapes and offsets against the size of the file
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path}: cannot be read as safetensors ({error}); the file is truncated or damaged, {RETRY}"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(str(path), name, tensor["dtype"], tuple(tensor["shape"]), end - start)
        for name, tensor in header.items()
        for start, end in [tensor["data_offsets"]]
    }


def check_sizes(name: str, d_out: int, d_in: int, *, rank: int, nnz: int) -> None:
    """Check that a layer of this shape can have the sizes that ``config.json`` gives.

    Raises:
        FormatError: it cannot.
    """
    if rank > min(d_out, d_in) or nnz > d_out * d_in:
        raise FormatError(
            f"config.json: quantization_config.layers[{name!r}] has rank {rank} and {nnz} non-zeros, more "
            f"than a {d_out} x {d_in} layer can have; {RETRY}"
        )


def check_tensors(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, StoredTensor],
    origin: str,
    storage: Storage = EXACT,
) -> None:
    """Check the tensors of a layer: `shapes` says what there must be, `found` what is stored in `origin`.

    Raises:
        FormatError: a tensor is missing, or has another shape or dtype.
    """
    for part in shapes:
        if part not in found:
            raise FormatError(
                f"{origin}: {name}: {part} is missing; the file does not match its config.json, {RETRY}"
            )
    # Float32 stands for the layer's dtype: that of its first such tensor.
    spec = LayerSpec(0, 0, 0, 0, torch.float32, storage).tensors()
    kinds = {part: kind for part, (kind, _) in spec.items()}
    first = next((part for part in shapes if kinds.get(part) == torch.float32), "")
    for part, shape in shapes.items():
        tensor = found[part]
        if tensor.shape != shape:
            raise FormatError(
                f"{tensor.path}: {name}: {part} has shape {tensor.shape}, but config.json says {shape}; "
                f"{RETRY}"
            )
        if part == "bias":
            allowed: tuple[str, ...] = (*_LAYER_DTYPES, "F16")
        elif kinds[part] != torch.float32:
            allowed = (_CODES[kinds[part]],)
        elif part == first or found[first].dtype not in _LAYER_DTYPES:
            allowed = _LAYER_DTYPES
        else:
            allowed = (found[first].dtype,)
        if tensor.dtype not in allowed:
            expected = " or ".join(str(_DTYPES[dtype]) for dtype in allowed)
            raise FormatError(
                f"{tensor.path}: {name}: {part} is {_DTYPES.get(tensor.dtype, tensor.dtype)}, "
                f"expected {expected}; {RETRY}"
            )
