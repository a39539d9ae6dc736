"""What a model directory holds, read from its config and the headers of its safetensors files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oats.errors import CheckpointError, FormatError
from oats.format import FORMAT_VERSION, TENSORS


def directory_bytes(directory: str | Path) -> int:
    """Size of all files of a directory, in bytes."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


@dataclass(frozen=True)
class StoredLayer:
    """One compressed layer on disk; sizes are those of its weight, without the bias."""

    name: str
    d_out: int
    d_in: int
    rank: int
    nnz: int
    dtype: str
    stored_bytes: int

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
    parameters_elsewhere: int  # elements of the tensors that belong to no compressed layer
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
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(
            f"{config_file} is not valid JSON ({error}); download or compress the model again"
        ) from error
    tensors: dict[str, dict[str, Any]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(_read_header(file))
    if not tensors:
        raise CheckpointError(f"{directory} has no .safetensors file; there is nothing to describe")

    quantization = config.get("quantization_config") or {}
    is_oats = quantization.get("quant_method") == "oats"
    layers = []
    if is_oats:
        if quantization.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{directory} has format version {quantization.get('format_version')}, this release reads "
                f"{FORMAT_VERSION}; install a newer oats, or compress the model again"
            )
        names = sorted(quantization.get("layers", {}), key=_natural)
        layers = [_stored_layer(directory, name, tensors) for name in names]
    return StoredModel(
        directory=str(directory),
        model_type=str(config.get("model_type", "unknown")),
        config=quantization if is_oats else None,
        layers=tuple(layers),
        parameters_elsewhere=sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        bytes_elsewhere=sum(_nbytes(tensor) for tensor in tensors.values()),
        disk_bytes=directory_bytes(directory),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which layer 2 comes before layer 10; config.json is sorted by text."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _stored_layer(directory: Path, name: str, tensors: dict[str, dict[str, Any]]) -> StoredLayer:
    """The layer of that name; its tensors are taken out of `tensors`."""
    parts = {}
    for part in TENSORS:
        if f"{name}.{part}" not in tensors:
            raise FormatError(
                f"{name}: {directory} has no tensor {name}.{part}; the checkpoint is incomplete, download or "
                "compress it again"
            )
        parts[part] = tensors.pop(f"{name}.{part}")
    d_out, rank = parts["low_rank_u"]["shape"]
    return StoredLayer(
        name=name,
        d_out=d_out,
        d_in=parts["low_rank_v"]["shape"][1],
        rank=rank,
        nnz=math.prod(parts["values"]["shape"]),
        dtype={"BF16": "bf16", "F32": "fp32"}.get(parts["values"]["dtype"], parts["values"]["dtype"]),
        stored_bytes=sum(_nbytes(part) for part in parts.values()),
    )


def _nbytes(tensor: dict[str, Any]) -> int:
    start, end = tensor["data_offsets"]
    return int(end) - int(start)


def _read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name → dtype, shape and offsets. The format is one length, one JSON object, and the data."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, expected {8 + length + end}")
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file} is damaged ({error}); download or compress the model again") from error
    return header
