"""The safetensors files of a model that is written block by block."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from oats.checkpoint.atomic import write_file, write_text
from oats.checkpoint.dense_source import DenseSource
from oats.checkpoint.layer_table import layer_table, storable
from oats.checkpoint.staging import Staging
from oats.checkpoint.stored_tensor import read_header

JOINED_BYTES = 1_000_000_000
"""A model whose files hold no more than this in all becomes one file."""

SHARD_BYTES = 1_500_000_000
"""Tensors outside the blocks go to files of about this size."""


class Shards:
    """Writes one file for each block, and further files for what is outside the blocks.

    Its methods raise OatsError if a file cannot be written.

    Args:
        source: its model has the compressed block while :meth:`write_block` runs.
        staging: whose `model` directory gets the files.
    """

    def __init__(self, source: DenseSource, staging: Staging) -> None:
        self._source, self._staging = source, staging

    def write_block(self, index: int) -> dict[str, dict[str, Any]]:
        """Write a compressed block; returns its layers' entries in ``quantization_config.layers``."""
        block, prefix = self._source.blocks[index], f"{self._source.path}.{index}."
        self._write_part(index, storable(self._source.model, block, prefix))
        return layer_table(block, prefix)

    def write_rest(self) -> dict[str, dict[str, Any]]:
        """Write what is outside the blocks, and then the index, or one file instead of all for a small model.

        Returns the entries of compressed layers outside the blocks: of the head, if it has codes.
        """
        model, single = self._source.model, self._staging.model / "model.safetensors"
        if not single.is_file():
            tensors = storable(model, model)
            for number, group in enumerate(self._rest, len(self._source.blocks)):
                self._write_part(number, {name: tensors[name] for name in group if name in tensors})
            self._index_or_join(single)
        if single.is_file():
            for shard in self._staging.model.glob("model-*.safetensors"):
                shard.unlink()
        return layer_table(model)

    def _index_or_join(self, single: Path) -> None:
        from safetensors.torch import load_file

        headers = {shard: read_header(shard) for shard in sorted(single.parent.glob("model-*.safetensors"))}
        total = sum(tensor.nbytes for header in headers.values() for tensor in header.values())
        if total <= JOINED_BYTES:
            self._write(single, {k: v for shard in headers for k, v in load_file(shard).items()})
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

    def _write_part(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a file, with the names that ``save_pretrained`` gives the tensors."""
        from transformers.core_model_loading import revert_weight_conversion

        model, files = self._source.model, len(self._source.blocks) + len(self._rest)
        for name in model._keys_to_ignore_on_save or ():
            tensors.pop(name, None)
        saved = revert_weight_conversion(model, tensors)
        self._write(
            self._staging.model / f"model-{number + 1:05}-of-{files:05}.safetensors",
            {name: tensor.contiguous() for name, tensor in saved.items()},
        )

    def _write(self, file: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with self._staging.writing():
            write_file(file, lambda path: save_file(tensors, path, {"format": "pt"}), alone=True)
