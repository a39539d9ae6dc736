"""What a model directory holds, from its ``config.json`` and the headers of its files. Reads no weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from oats.checkpoint.config_json import EMBEDDING, RETRY, parse_quantization_config, read_config
from oats.checkpoint.names import similar_stored_name, stored_layer_names
from oats.checkpoint.stored_tensor import StoredTensor, check_sizes, check_tensors, read_header
from oats.config import EXACT, Storage
from oats.errors import CheckpointError, FormatError
from oats.format.layer_spec import LayerSpec, tensor_names

_STORED_AS = {"BF16": "bf16", "F32": "fp32"}


def directory_bytes(directory: str | Path) -> int:
    """Size of all files in a directory, in bytes."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


@dataclass(frozen=True)
class StoredLayer:
    """One compressed layer on disk. Sizes are those of its weight, without the bias.

    The names of its tensors begin with `stored_name`, which differs from `name` if transformers renames it.
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
        """Share of the weight's elements that the sparse part keeps."""
        return self.nnz / (self.d_out * self.d_in)

    @property
    def dense_bf16_bytes(self) -> int:
        """Bytes of the dense weight in bf16."""
        return 2 * self.d_out * self.d_in

    @property
    def share_of_dense_bf16(self) -> float:
        """Stored bytes, divided by those of the dense weight in bf16."""
        return self.stored_bytes / self.dense_bf16_bytes


@dataclass(frozen=True)
class StoredModel:
    """What a model directory holds."""

    directory: str
    model_type: str
    config: dict[str, Any] | None  # quantization_config; None if the model is not compressed by oats
    layers: tuple[StoredLayer, ...]
    head: StoredLayer | None  # the output head, if it has codes
    parameters_elsewhere: int  # elements of all tensors outside `layers` and `head`
    bytes_elsewhere: int
    disk_bytes: int  # all files of the directory
    architecture: dict[str, Any]  # config.json

    @property
    def layer_bytes(self) -> int:
        """Stored bytes of `layers`."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def dense_bf16_bytes(self) -> int:
        """Bytes of the dense weights of `layers` in bf16."""
        return sum(layer.dense_bf16_bytes for layer in self.layers)

    @property
    def share_of_dense_bf16(self) -> float | None:
        """`layer_bytes` divided by `dense_bf16_bytes`; None if no layer is compressed."""
        return self.layer_bytes / self.dense_bf16_bytes if self.layers else None


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
        similar = {name: similar_stored_name(name, table, tensors) for name in table}
        renamed = stored_layer_names(directory, tensors) if None in similar.values() else {}
        for name in sorted(table, key=_natural):
            stored_name = similar[name] or renamed.get(name, name)
            layer = _take_layer(name, stored_name, table[name], tensors, origin=str(directory))
            layer = replace(layer, name=similar[name] or name)
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
        architecture=config,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10; config.json is sorted by text."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _take_layer(
    name: str, stored_name: str, sizes: Mapping[str, Any], tensors: dict[str, StoredTensor], origin: str
) -> StoredLayer:
    """Describe a layer, and remove its tensors from `tensors`."""
    # The markers: of the layer, and of a fused projection that it is a part of.
    for place in (stored_name, stored_name.rpartition(".")[0]):
        marker = tensors.get(f"{place}.weight")
        if marker is not None and (marker.dtype, marker.shape) == ("U8", (1,)):
            del tensors[f"{place}.weight"]
    storage = Storage.from_dict(sizes)
    parts = {part: tensors.pop(f"{stored_name}.{part}", None) for part in tensor_names(storage)}
    found = {part: tensor for part, tensor in parts.items() if tensor is not None}
    for part, tensor in found.items():
        is_matrix = len(tensor.shape) == 2 and not (part == "mask" and 0 in tensor.shape)
        if part in ("mask", "low_rank_u", "low_rank_v") and not is_matrix:
            raise FormatError(
                f"{tensor.path}: {name}: {part} has shape {tensor.shape}, expected a matrix; {RETRY}"
            )
    # The factors tell the layer's shape; on loading, the model does.
    d_out = found["low_rank_u"].shape[0] if "low_rank_u" in found else 0
    d_in = found["low_rank_v"].shape[1] if "low_rank_v" in found else 0
    rank, nnz = sizes["rank"], sizes["nnz"]
    expected = LayerSpec(d_out, d_in, rank, nnz, torch.float32, storage).tensors()
    shapes = {part: shape for part, (_, shape) in expected.items()}
    check_tensors(name, shapes, found, origin, storage)
    check_sizes(name, d_out, d_in, rank=rank, nnz=nnz)
    dtype = _STORED_AS.get(found["values"].dtype) or storage.values
    stored_bytes = sum(tensor.nbytes for tensor in found.values())
    return StoredLayer(name, stored_name, d_out, d_in, rank, nnz, dtype, stored_bytes, storage)
