"""Names of layers and tensors.

A layer has up to three names, since transformers renames tensors when it loads and saves:

- its *stored* name, with which its tensors' names begin in safetensors files;
- its *saved* name in ``config.json``: the name in the model that was saved;
- its name in the model that is loaded. A model with a head loads the files of its base model, and the
  reverse, so a prefix may come or go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from oats.checkpoint.config_json import saved_class
from oats.checkpoint.stored_tensor import StoredTensor, read_header


class ModelNames:
    """Stored names → names in one model, as transformers maps them on loading.

    Args:
        model: a ``PreTrainedModel``.

    Attributes:
        only_renamed: True if transformers changes nothing but names. False if it makes some tensors out of
            others, for example stacks experts.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        # DINOv2's files have the biases of gate and up in one tensor.
        self._chunks = [
            entry
            for entry in conversions
            if isinstance(entry, WeightConverter) and [type(step) for step in entry.operations] == [Chunk]
        ]
        self.only_renamed = len(self._renamings) == len(conversions)
        self._prefix = model.base_model_prefix
        self._state_dict = model.state_dict()

    def of(self, stored_name: str) -> list[str]:
        """Names of the tensors that one stored tensor fills: one, or several that get equal parts of it."""
        from transformers.core_model_loading import rename_source_key

        name, chunk = rename_source_key(
            stored_name, self._renamings, self._chunks, self._prefix, self._state_dict
        )
        if chunk is not None:
            parts = next(entry.target_patterns for entry in self._chunks if chunk in entry.source_patterns)
            return [name.replace(parts[0], part) for part in parts]
        if name not in self._state_dict and stored_name in self._state_dict:
            return [stored_name]
        return [name]


def stored_tensors(names: ModelNames, files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Name in the model → the tensor, or part of one, that fills it.

    Raises:
        FormatError: a file is damaged.
    """
    stored = {}
    for file in files:
        for stored_name, tensor in read_header(file).items():
            filled = names.of(stored_name)
            if len(filled) > 1:
                shape = (tensor.shape[0] // len(filled), *tensor.shape[1:])
                tensor = replace(tensor, shape=shape, nbytes=tensor.nbytes // len(filled))
            stored.update(dict.fromkeys(filled, tensor))
    return stored


def names_in_model(model: Any, saved_name: str) -> tuple[str, str, str]:
    """Names that a layer of a checkpoint may have in a model: with the prefix of a base model or without."""
    prefix = f"{model.base_model_prefix}."
    return saved_name, saved_name.removeprefix(prefix), prefix + saved_name


def stored_layer_names(directory: Path, stored: Iterable[str]) -> dict[str, str]:
    """Saved name → stored name of each compressed layer, by the renames of the model's class.

    Empty if transformers does not have the class, or cannot make a model of the configuration.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            names = ModelNames(saved_class(config.architectures)(config))
    except (OSError, ValueError, TypeError, AttributeError, ImportError):
        return {}
    return {
        name.removesuffix(".low_rank_u"): tensor.removesuffix(".low_rank_u")
        for tensor in stored
        if tensor.endswith(".low_rank_u")
        for name in names.of(tensor)
    }


def similar_stored_name(saved_name: str, table: Collection[str], stored: Mapping[str, object]) -> str | None:
    """The one stored name that is like `saved_name`; None if there is none, or more than one.

    It is equal; or it has a prefix more (a base model was compressed, and saved as a part of a model with a
    head); or one part of it differs (Mixtral's "mlp"). The saved names in `table` are no candidates.

    >>> similar_stored_name("layers.0.up", ["layers.0.up"], {"model.layers.0.up.low_rank_u": 0})
    'model.layers.0.up'
    """
    end = ".low_rank_u"
    if saved_name + end in stored:
        return saved_name
    others = {key.removesuffix(end) for key in stored if key.endswith(end)} - set(table)
    longer = [other for other in others if other.endswith(f".{saved_name}")]
    if len(longer) == 1:
        return longer[0]
    respelled = [other for other in others if _one_part_differs(other, saved_name)]
    return respelled[0] if len(respelled) == 1 else None


def _one_part_differs(name: str, other: str) -> bool:
    parts, others = name.split("."), other.split(".")
    return len(parts) == len(others) and sum(a != b for a, b in zip(parts, others, strict=True)) == 1
