"""The compressed layers of a model in memory: their table for ``config.json``, and their tensors to write."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from oats.checkpoint.quantization_config import EMBEDDING
from oats.compression.head import head_of
from oats.format.layer_spec import MARKER
from oats.nn import SparseLowRankLinear, SplitLinear


def storable(model: Any, state_dict: dict[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a compressed model, or of a part of it, that go to its files.

    Args:
        model: that the tensors belong to.
        state_dict: full name → tensor; changed in place.
        layers: full names of the compressed layers, and of the fused projections that they are parts of.
    """
    for name in layers:
        # save_pretrained writes a shared tensor once. But a shared layer needs all of its tensors under
        # each of its names: a model that has two layers there can load them only then.
        if f"{name}.bias" in state_dict:
            state_dict[f"{name}.bias"] = state_dict[f"{name}.bias"].clone()
        # transformers would fuse some markers with other weights: leave them out.
        if not _is_saved_unchanged(model, f"{name}.weight", MARKER):
            state_dict.pop(f"{name}.weight", None)
    return state_dict


def compressed_layers(module: nn.Module, prefix: str = "") -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Find the compressed layers of a model, or of a part of it.

    Args:
        module: the model or part.
        prefix: put before the names, such as ``"model.layers.0."``.

    Returns:
        Name of each layer → its entry in ``quantization_config.layers``; and the set of these names and of
        those of fused projections.
    """
    table = {prefix + name: sizes for name, sizes in layer_table(module).items()}
    return table, {*table, *(prefix + name for name in replacements(module))}


def layers_of(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """Every name of every compressed layer; a layer in several places has several names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, SparseLowRankLinear)}


def layer_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of each compressed layer → its entry in ``quantization_config.layers``."""
    head, embedding = head_of(model)
    return {
        name: {"rank": layer.rank, "nnz": layer.nnz, **layer.storage.to_dict()}
        | ({EMBEDDING: embedding} if layer is head else {})
        for name, layer in layers_of(model).items()
    }


def replacements(model: nn.Module) -> dict[str, SparseLowRankLinear | SplitLinear]:
    """Every name of every module that replaced a linear layer: a compressed layer, or several for one."""
    parts = {
        part for module in model.modules() if isinstance(module, SplitLinear) for part in module.values()
    }
    modules = model.named_modules(remove_duplicate=False)
    return {
        name: module
        for name, module in modules
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
