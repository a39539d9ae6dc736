"""The compressed layers of a model in memory: their table for ``config.json``, and their tensors to write."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from oats.checkpoint.config_json import EMBEDDING
from oats.compression.head import head_of
from oats.format.layer_spec import MARKER
from oats.nn import SparseLowRankLinear, SplitLinear


def storable(model: Any, part: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that go to the files, by their names in the model.

    Args:
        model: a ``PreTrainedModel``.
        part: of it, or all of it.
        prefix: of the names in `part`, such as ``"model.layers.0."``.
    """
    state_dict = {prefix + name: tensor for name, tensor in part.state_dict().items()}
    for name in (prefix + name for name in {**layers_of(part), **replacements(part)}):
        # save_pretrained writes a shared tensor once. But a shared layer needs all of its tensors under
        # each of its names: a model that has two layers there can load them only then.
        if f"{name}.bias" in state_dict:
            state_dict[f"{name}.bias"] = state_dict[f"{name}.bias"].clone()
        # transformers would fuse some markers with other weights: leave them out.
        if not _is_saved_unchanged(model, f"{name}.weight", MARKER):
            state_dict.pop(f"{name}.weight", None)
    return state_dict


def layers_of(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """Every name of every compressed layer; a layer in several places has several names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SparseLowRankLinear)}


def layer_table(part: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Name of each compressed layer → its entry in ``quantization_config.layers``; see :func:`storable`."""
    head, embedding = head_of(part)
    return {
        prefix + name: {"rank": layer.rank, "nnz": layer.nnz, **layer.storage.to_dict()}
        | ({EMBEDDING: embedding} if layer is head else {})
        for name, layer in layers_of(part).items()
    }


def replacements(model: nn.Module) -> dict[str, SparseLowRankLinear | SplitLinear]:
    """Every name of every module that replaced a linear layer: a compressed layer, or several for one."""
    splits = [module for module in model.modules() if isinstance(module, SplitLinear)]
    parts = {part for split in splits for part in split.values()}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (SparseLowRankLinear, SplitLinear)) and module not in parts
    }


def _is_saved_unchanged(model: Any, key: str, tensor: Tensor) -> bool:
    """True if ``save_pretrained`` writes `tensor` alone; it may fuse it with others."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        saved = revert_weight_conversion(model, {key: tensor})
    except Exception:
        return False
    return [value.shape for value in saved.values()] == [tensor.shape]
