"""The safetensors files of a model that is written block by block."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from oats.checkpoint.atomic_file import write_file, write_text
from oats.checkpoint.dense_source import DenseSource
from oats.checkpoint.layer_table import compressed_layers, storable
from oats.checkpoint.staging import Staging
from oats.checkpoint.stored_tensor import read_header

JOINED_BYTES = 1_000_000_000
"""A model whose files hold no more than this in all becomes one file."""

SHARD_BYTES = 1_500_000_000
"""Tensors outside the blocks go to files of about this size."""


class Shards:
    """Writes one file for each block, and further files for what is outside the blocks.

    Args:
        source: its model has the compressed block while :meth:`write_block` runs.
        staging: whose `model` directory gets the files.
    """

    def __init__(self, source: DenseSource, staging: Staging) -> None:
        self._source, self._staging = source, staging

    def write_block(self, index: int) -> dict[str, dict[str, Any]]:
        """Write a compressed block; returns its layers' entries in ``quantization_config.layers``.

        Raises:
            OatsError: the file cannot be written.
        """
        source = self._source
        model, block, prefix = source.model, source.blocks[index], f"{source.path}.{index}."
        entries, names = compressed_layers(block, prefix)
        tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        self._write(self._name(index), _as_saved(model, storable(model, tensors, names)))
        return entries

    def write_rest(self) -> dict[str, dict[str, Any]]:
        """Write what is outside the blocks, and then the index, or one file instead of all for a small model.

        Returns:
            The entries of compressed layers outside the blocks: of the head, if it has codes.

        Raises:
            OatsError: a file cannot be written.
        """
        model, single = self._source.model, self._staging.model / "model.safetensors"
        entries, names = compressed_layers(model)
        if not single.is_file():
            for number, group in enumerate(self._rest):
                tensors = storable(model, model.state_dict(), names)
                rest = _as_saved(model, {name: tensors[name] for name in group if name in tensors})
                self._write(self._name(len(self._source.blocks) + number), rest)
            self._index_or_join(single)
        if single.is_file():
            for shard in self._staging.model.glob("model-*.safetensors"):
                shard.unlink()
        return entries

    def _index_or_join(self, single: Path) -> None:
        from safetensors.torch import load_file

        headers = {shard: read_header(shard) for shard in sorted(single.parent.glob("model-*.safetensors"))}
        total = sum(tensor.nbytes for header in headers.values() for tensor in header.values())
        if total <= JOINED_BYTES:
            self._write(single.name, {k: v for shard in headers for k, v in load_file(shard).items()})
            return
        weight_map = {name: shard.name for shard, header in headers.items() for name in header}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        with self._staging.writing():
            write_text(single.with_name("model.safetensors.index.json"), text, alone=True)

    @functools.cached_property
    def _rest(self) -> list[list[str]]:
        """Names of the tensors outside the blocks, in groups of about `SHARD_BYTES`; tied ones once."""
        model = self._source.model
        tied = getattr(model, "all_tied_weights_keys", {})
        groups: list[list[str]] = []
        room = 0
        for name, tensor in model.state_dict().items():
            if name.startswith(f"{self._source.path}.") or name in tied:
                continue
            if not groups or tensor.nbytes > room:
                groups.append([])
                room = SHARD_BYTES
            groups[-1].append(name)
            room -= tensor.nbytes
        return groups

    def _name(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self._source.blocks) + len(self._rest):05}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with self._staging.writing():
            write_file(
                self._staging.model / name,
                lambda path: save_file(tensors, path, {"format": "pt"}),
                alone=True,
            )


def _as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that ``save_pretrained`` gives them."""
    from transformers.core_model_loading import revert_weight_conversion

    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}
