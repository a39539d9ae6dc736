"""What a model directory says of itself: its config, and the headers of its safetensors files.

Loading and ``oats info`` share these checks, which read no weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from oats.checkpoint.quantization_config import EMBEDDING, RETRY, parse_quantization_config, shortened
from oats.config import EXACT, Storage
from oats.errors import CheckpointError, FormatError
from oats.format.layer_spec import LayerSpec, tensor_names

_DTYPE_NAMES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
_STORED_AS = {"BF16": "bf16", "F32": "fp32"}


def directory_bytes(directory: str | Path) -> int:
    """Size of all files of a directory, in bytes."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def read_config(file: Path) -> dict[str, Any]:
    """Read a ``config.json``.

    Raises:
        FormatError: it is not JSON, or not an object, or its ``quantization_config`` is none.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}); {RETRY}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    for what, value in (("", config), ("quantization_config ", {} if quantization is None else quantization)):
        if not isinstance(value, dict):
            raise FormatError(f"{file}: {what}is {shortened(value)}, expected a JSON object; {RETRY}")
    return config  # type: ignore[no-any-return]


def check_sizes(name: str, d_out: int, d_in: int, *, rank: int, nnz: int) -> None:
    """Check the sizes that ``config.json`` gives against the shape of the layer.

    Raises:
        FormatError: no such layer can have them.
    """
    if rank > min(d_out, d_in) or nnz > d_out * d_in:
        raise FormatError(
            f"config.json: quantization_config.layers[{name!r}] has rank {rank} and {nnz} non-zeros, more "
            f"than a {d_out} x {d_in} layer can have; {RETRY}"
        )


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a safetensors file, by its header."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: str | Path) -> dict[str, StoredTensor]:
    """Name → what the header of a safetensors file says of the tensor.

    Raises:
        FormatError: the file is not one, or is truncated.
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
        name: StoredTensor(
            str(path),
            tensor["dtype"],
            tuple(tensor["shape"]),
            tensor["data_offsets"][1] - tensor["data_offsets"][0],
        )
        for name, tensor in header.items()
    }


def check_tensors(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, StoredTensor],
    origin: str,
    storage: Storage = EXACT,
) -> None:
    """Check that the tensors of a layer are stored, with their shapes and dtypes.

    Args:
        name: of the layer.
        shapes: name of each tensor → the shape it must have.
        found: name → what is stored, for those that are.
        origin: where they were looked for.
        storage: which of them hold codes.

    Raises:
        FormatError: one is missing or is another one.
    """
    for part in shapes:
        if part not in found:
            raise FormatError(
                f"{origin}: {name}: {part} is missing; the file does not match its config.json, {RETRY}"
            )
    # Float32 stands for the dtype of the layer.
    kinds = {
        part: kind for part, (kind, _) in LayerSpec(0, 0, 0, 0, torch.float32, storage).tensors().items()
    }
    for part, shape in shapes.items():
        tensor = found[part]
        if tensor.shape != shape:
            raise FormatError(
                f"{tensor.path}: {name}: {part} has shape {tensor.shape}, but config.json says {shape}; "
                f"{RETRY}"
            )
        kind = kinds.get(part, torch.float16)
        if part == "bias":
            allowed: tuple[str, ...] = ("F32", "BF16", "F16")
        elif kind != torch.float32:
            allowed = tuple(code for code, dtype in _DTYPE_NAMES.items() if dtype == kind)
        else:
            allowed = ("F32", "BF16")
            first = next(other for other in shapes if kinds.get(other) == torch.float32)
            if part != first and found[first].dtype in allowed:
                allowed = (found[first].dtype,)
        if tensor.dtype not in allowed:
            expected = " or ".join(str(_DTYPE_NAMES[dtype]) for dtype in allowed)
            raise FormatError(
                f"{tensor.path}: {name}: {part} is {_DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}, "
                f"expected {expected}; {RETRY}"
            )


@dataclass(frozen=True)
class StoredLayer:
    """One compressed layer on disk; sizes are those of its weight, without the bias.

    `stored_name` is what its tensors' names begin with, which is `name` but where files spell it otherwise.
    """

    name: str
    stored_name: str
    d_out: int
    d_in: int
    rank: int
    nnz: int
    dtype: str
    stored_bytes: int
    storage: Storage = EXACT

    @property
    def density(self) -> float:
        """Share of the elements that the sparse part keeps."""
        return self.nnz / (self.d_out * self.d_in)

    @property
    def dense_bf16_bytes(self) -> int:
        """What the dense weight would take in bf16."""
        return 2 * self.d_out * self.d_in

    @property
    def share_of_dense_bf16(self) -> float:
        """Stored bytes against dense bf16."""
        return self.stored_bytes / self.dense_bf16_bytes


@dataclass(frozen=True)
class StoredModel:
    """What a model directory holds, from its config and the headers of its safetensors files."""

    directory: str
    model_type: str
    config: dict[str, Any] | None  # quantization_config, None where the model is not an oats one
    layers: tuple[StoredLayer, ...]
    head: StoredLayer | None  # the output head, where it has codes
    parameters_elsewhere: int  # elements of the tensors that belong to none of these
    bytes_elsewhere: int
    disk_bytes: int  # all files of the directory


def read_stored_model(directory: str | Path) -> StoredModel:
    """Describe a model directory without reading a weight.

    Raises:
        CheckpointError: there is no model in the directory.
        FormatError: a file is damaged, or the files do not hold what the config says.
    """
    directory = Path(directory)
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CheckpointError(f"{directory} is no model directory: it has no config.json; check the path")
    config = read_config(config_file)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(read_header(file))
    if not tensors:
        raise CheckpointError(f"{directory} has no .safetensors file; there is nothing to describe")

    quantization = config.get("quantization_config") or {}
    is_oats = quantization.get("quant_method") == "oats"
    layers: list[StoredLayer] = []
    heads: list[StoredLayer] = []
    if is_oats:
        _, table = parse_quantization_config(quantization, str(config_file))
        spellings: dict[str, str] = {}
        if any(_stored_name(name, table, tensors) is None for name in table):
            spellings = _spellings(directory, tensors)
        for name in sorted(table, key=_natural):
            layer = _stored_layer(directory, name, table, tensors, spellings)
            (heads if EMBEDDING in table[name] else layers).append(layer)
    return StoredModel(
        directory=str(directory),
        model_type=str(config.get("model_type", "unknown")),
        config=quantization if is_oats else None,
        layers=tuple(layers),
        head=next(iter(heads), None),
        parameters_elsewhere=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        bytes_elsewhere=sum(tensor.nbytes for tensor in tensors.values()),
        disk_bytes=directory_bytes(directory),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 2 comes before layer 10; config.json is sorted by text."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _stored_layer(
    directory: Path,
    name: str,
    table: Mapping[str, Mapping[str, Any]],
    tensors: dict[str, StoredTensor],
    spellings: Mapping[str, str],
) -> StoredLayer:
    """The layer of that name; its tensors are taken out of `tensors`."""
    sizes = table[name]
    found_name = _stored_name(name, table, tensors)
    stored_name = found_name or spellings.get(name, name)
    # The markers: of the layer, and of a fused projection that it is a part of.
    for place in (stored_name, stored_name.rpartition(".")[0]):
        marker = tensors.get(f"{place}.weight")
        if marker is not None and (marker.dtype, marker.shape) == ("U8", (1,)):
            del tensors[f"{place}.weight"]
    storage = Storage.from_dict(sizes)
    names = tensor_names(storage)
    parts = {part: tensors.pop(f"{stored_name}.{part}", None) for part in names}
    found = {part: tensor for part, tensor in parts.items() if tensor is not None}
    for part, tensor in found.items():
        if part in ("mask", "low_rank_u", "low_rank_v") and (
            len(tensor.shape) != 2 or (part == "mask" and 0 in tensor.shape)
        ):
            raise FormatError(
                f"{tensor.path}: {name}: {part} has shape {tensor.shape}, expected a matrix; {RETRY}"
            )
    # The factors give the layer's shape, which loading takes from the model's own configuration.
    d_out = found["low_rank_u"].shape[0] if "low_rank_u" in found else 0
    d_in = found["low_rank_v"].shape[1] if "low_rank_v" in found else 0
    rank, nnz = sizes["rank"], sizes["nnz"]
    expected = LayerSpec(d_out, d_in, rank, nnz, torch.float32, storage).tensors()
    shapes = {part: shape for part, (_, shape) in expected.items()}
    check_tensors(name, shapes, found, str(directory), storage)
    check_sizes(name, d_out, d_in, rank=rank, nnz=nnz)
    return StoredLayer(
        name=found_name or name,
        stored_name=stored_name,
        d_out=d_out,
        d_in=d_in,
        rank=rank,
        nnz=nnz,
        dtype=_STORED_AS.get(found["values"].dtype) or storage.values,
        stored_bytes=sum(tensor.nbytes for tensor in found.values()),
        storage=storage,
    )


def _stored_name(
    name: str, table: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, StoredTensor]
) -> str | None:
    """The name that a layer of `table` has in files; None where it is not there."""
    if f"{name}.mask" in tensors:
        return name
    masked = [key.removesuffix(".mask") for key in tensors if key.endswith(".mask")]
    # A base model was compressed, and saved as a part of a model with a head; or transformers gives a
    # part of the name another spelling in files (Mixtral's "mlp").
    for fits in (lambda other: other.endswith(f".{name}"), lambda other: _one_part_differs(other, name)):
        found = [other for other in masked if other not in table and fits(other)]
        if len(found) == 1:
            return found[0]
    return None


def _spellings(directory: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name of a layer in the model → in files, where transformers spells several parts otherwise (ViT)."""
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        kind = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            mapping = get_model_conversion_mapping(kind(config))
    except (OSError, ValueError, TypeError, AttributeError, ImportError):
        return {}  # a class or a configuration that transformers does not have
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return {
        rename_source_key(name, renamings, [])[0].removesuffix(".mask"): name.removesuffix(".mask")
        for name in tensors
        if name.endswith(".mask")
    }


def _one_part_differs(name: str, other: str) -> bool:
    parts, others = name.split("."), other.split(".")
    return len(parts) == len(others) and sum(a != b for a, b in zip(parts, others, strict=True)) == 1
