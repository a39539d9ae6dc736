"""A dense model on disk that has one block in memory at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oats.checkpoint.config_json import read_config
from oats.checkpoint.names import ModelNames, stored_tensors
from oats.checkpoint.stored_tensor import FLOATS, read_header
from oats.format.layer_spec import DTYPES, storage_dtype
from oats.models.architecture import find_blocks


class DenseSource:
    """A model whose blocks have no weights until they are read from its safetensors files.

    The files are mapped into memory: the system reads pages when they are used, and frees them once the block
    is released. :meth:`open` makes it.

    Attributes:
        directory: of the model.
        model: has weights outside the blocks.
        path: dotted path of the list of blocks.
        blocks: that list.
        files: the safetensors files.
    """

    def __init__(self, directory: Path, model: Any, path: str, places: dict[str, tuple[Path, str]]) -> None:
        self.directory, self.model, self.path = directory, model, path
        self.blocks: nn.ModuleList = model.get_submodule(path)
        self.files = checkpoint_files(directory)
        self._places = places
        for index in range(len(self.blocks)):
            self.release(index)

    @staticmethod
    def open(directory: Path, model: Any, blocks: str | None = None) -> DenseSource | None:
        """Release the blocks of a ``PreTrainedModel`` that has just been loaded from `directory`.

        Args:
            blocks: dotted path of its list of blocks; None tries the known paths.

        Returns:
            None where blocks cannot be read one at a time: transformers makes their weights out of several
            stored tensors, or they share weights with each other or with the rest of the model.

        Raises:
            UnsupportedModelError: the list of blocks was not found.
        """
        path, _ = find_blocks(model, blocks)
        if getattr(model, "is_quantized", False):
            return None
        names = ModelNames(model)
        if not names.only_renamed:
            return None
        stored = stored_tensors(names, checkpoint_files(directory))
        for name, tensor in model.state_dict().items():
            inside = name.startswith(f"{path}.")
            if inside and (name not in stored or stored[name].shape != tuple(tensor.shape)):
                return None
        places_of = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        if any(places_of[id(parameter)] > 1 for parameter in model.get_submodule(path).parameters()):
            return None
        places = {name: (Path(tensor.path), tensor.name) for name, tensor in stored.items()}
        return DenseSource(directory, model, path, places)

    def fill(self, index: int, dtype: torch.dtype) -> None:
        """Read the weights of a block, and cast them to `dtype`."""
        from safetensors import safe_open

        for name in self._names(index):
            file, key = self._places[name]
            with safe_open(file, framework="pt") as opened:
                tensor = opened.get_tensor(key)
            self._set(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def release(self, index: int) -> None:
        """Take the weights of a block away; buffers that files do not hold (rotary frequencies) stay."""
        for name in self._names(index):
            owner, _, attribute = name.rpartition(".")
            tensor = getattr(self.model.get_submodule(owner), attribute)
            self._set(name, torch.empty_like(tensor, device="meta"))

    def _names(self, index: int) -> list[str]:
        prefix = f"{self.path}.{index}."
        return [prefix + name for name in self.blocks[index].state_dict()]

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if attribute in module._parameters:
            module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[attribute] = tensor


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of the checkpoint in a directory; empty if it has none.

    Raises:
        FormatError: the index is damaged.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    # transformers looks in this order.
    if single.is_file():
        return [single]
    weight_map = read_config(index).get("weight_map") if index.is_file() else None
    return sorted({directory / str(name) for name in weight_map.values()}) if weight_map else []


def stored_float_dtype(directory: Path) -> torch.dtype:
    """The floating-point dtype that takes most bytes of a checkpoint's files."""
    sizes: Counter[torch.dtype] = Counter()
    for file in checkpoint_files(directory):
        for tensor in read_header(file).values():
            if tensor.dtype in FLOATS:
                sizes[FLOATS[tensor.dtype]] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def compressed_dtype(directory: Path, dtype: str | None) -> torch.dtype:
    """The dtype of the compressed model: ``"bf16"`` or ``"fp32"``; None means that of the dense one."""
    if dtype is not None:
        return DTYPES[dtype]
    config = read_config(directory / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    named = getattr(torch, name, None) if isinstance(name, str) else None
    return storage_dtype(named if isinstance(named, torch.dtype) else stored_float_dtype(directory))
