"""Prepares a model for loading: puts empty compressed layers into it, and checks the files' headers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from oats.checkpoint.config_json import EMBEDDING, RETRY
from oats.checkpoint.layer_table import layers_of
from oats.checkpoint.names import ModelNames, names_in_model, stored_tensors
from oats.checkpoint.stored_tensor import check_sizes, check_tensors
from oats.config import Storage
from oats.errors import ConfigError, FormatError
from oats.models.architecture import fused_outputs
from oats.models.experts import split_all_
from oats.models.linear import is_linear, replace_, weight_of
from oats.nn.head import rows_of_head
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes = Mapping[str, Any]
"""One entry of ``quantization_config.layers``."""


def prepare_(model: PreTrainedModel, table: Mapping[str, Sizes], files: list[str] | None) -> dict[str, str]:
    """Replace the linear layers in `table` by compressed ones on the meta device, and check `files`.

    Args:
        model: on the meta device; changed in place.
        table: ``quantization_config.layers``.
        files: of the checkpoint; only their headers are read.

    Returns:
        Name of each compressed layer → the file that holds its mask.

    Raises:
        ConfigError: `files` are no safetensors files.
        FormatError: model, table and files do not fit together, or a file is damaged.
    """
    saved_names = [name for each in table for name in names_in_model(model, each)]
    split_all_(model, lambda name: any(saved.startswith(f"{name}.") for saved in saved_names))
    parts: dict[str, dict[str, Sizes]] = {}
    markers, absent = set(), set()
    present = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for saved_name, sizes in table.items():
        if sizes.get(EMBEDDING, "") is None and not present & set(names_in_model(model, saved_name)):
            absent.add(saved_name)  # a base model has no head
            continue
        name, part = _find_linear(model, saved_name)
        parts.setdefault(name, {})[part] = sizes
        for place in (saved_name, f"{name}.{part}".rstrip(".")):
            for owner in (place, place.removesuffix(f".{part}")):
                markers.add(f"{re.escape(owner)}\\.weight$")
    # A layer that the model has under several names is stored under each, and stays one layer.
    linears = {name: model.get_submodule(name) for name in parts}
    made: dict[nn.Module, nn.Module] = {}
    for name, linear in linears.items():
        if linear not in made:
            made[linear] = _unfilled(model, name, parts[name])
    for name, linear in linears.items():
        model.set_submodule(name, made[linear])
    tied_embedding = _replace_tied_embedding_(model, table)
    ignored = model._keys_to_ignore_on_load_unexpected
    # transformers 5.0 has a list, and adds lists to it; later versions have a set.
    kind = set if isinstance(ignored, set) else list
    model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), *markers])
    return _check_headers(model, files, absent, tied_embedding)


def _find_linear(model: PreTrainedModel, saved_name: str) -> tuple[str, str]:
    """Name of a linear layer in the model, and the part of it that `saved_name` means ("" for all of it)."""
    for name in names_in_model(model, saved_name):
        for place, part in ((name, ""), name.rpartition(".")[::2]):
            try:
                module = model.get_submodule(place)
            except AttributeError:
                continue
            if is_linear(module) and (not part or part in _fused_outputs(model, place)):
                return place, part
            if not part:
                raise FormatError(
                    f"config.json: quantization_config.layers names {saved_name!r}, which is a "
                    f"{type(module).__name__} in {type(model).__name__}, not a linear layer; {RETRY}"
                )
    raise FormatError(
        f"config.json: quantization_config.layers names {saved_name!r}, which is not in "
        f"{type(model).__name__}; load the checkpoint with the class it was saved from, or {RETRY}"
    )


def _fused_outputs(model: nn.Module, name: str) -> dict[str, int]:
    owner, _, attribute = name.rpartition(".")
    return fused_outputs(model.get_submodule(owner), attribute)


def _unfilled(model: nn.Module, name: str, parts: Mapping[str, Sizes]) -> nn.Module:
    """The empty layer for one linear layer. `parts`: projection → sizes, "" for the whole layer."""
    linear = model.get_submodule(name)
    weight, bias = weight_of(linear), linear.bias is not None
    d_out, d_in = weight.shape
    outputs = {"": d_out} if "" in parts else _fused_outputs(model, name)
    if outputs.keys() != parts.keys():
        raise FormatError(
            f"config.json: quantization_config.layers has the parts {sorted(parts)} of {name!r}, expected "
            f"{sorted(outputs)}; {RETRY}"
        )
    layers = {}
    for part, rows in outputs.items():
        rank, nnz, storage = parts[part]["rank"], parts[part]["nnz"], Storage.from_dict(parts[part])
        check_sizes(f"{name}.{part}" if part else name, rows, d_in, rank=rank, nnz=nnz)
        layers[part] = SparseLowRankLinear(
            d_in, rows, rank, nnz, bias=bias, dtype=weight.dtype, device="meta", storage=storage
        )
    return layers[""] if "" in parts else SplitLinear(layers)


def _replace_tied_embedding_(model: PreTrainedModel, table: Mapping[str, Sizes]) -> str | None:
    """Replace the embedding that reads the rows of a compressed output head; returns its name."""
    for saved_name, sizes in table.items():
        if EMBEDDING not in sizes:
            continue
        what = f"config.json: quantization_config.layers[{saved_name!r}]"
        head, saved_embedding = model.get_output_embeddings(), sizes[EMBEDDING]
        modules = dict(model.named_modules(remove_duplicate=False))
        found = [modules[name] for name in names_in_model(model, saved_name) if name in modules]
        if saved_embedding is None and not found:
            continue
        if not isinstance(head, SparseLowRankLinear) or head not in found:
            raise FormatError(f"{what} has an {EMBEDDING}, but is not the output head; {RETRY}")
        if head.nnz != head.in_features * head.out_features:
            raise FormatError(f"{what} keeps {head.nnz} values, not all of the output head; {RETRY}")
        if saved_embedding is None:
            continue
        name = next((name for name in names_in_model(model, saved_embedding) if name in modules), "")
        embedding, shape = modules.get(name), (head.out_features, head.in_features)
        if not name or not isinstance(embedding, nn.Embedding) or embedding.weight.shape != shape:
            raise FormatError(
                f"{what} has the embedding {saved_embedding!r}, which is none of {shape[0]} rows and "
                f"{shape[1]} columns in {type(model).__name__}; {RETRY}"
            )
        replace_(model, embedding, rows_of_head(embedding, head))
        return name
    return None


def _check_headers(
    model: PreTrainedModel, files: list[str] | None, absent: Collection[str], tied_embedding: str | None
) -> dict[str, str]:
    """Check names, shapes and dtypes of every layer's tensors; returns name of each layer → file of its
    values.

    transformers would only warn about a missing tensor, and fill it with random values. `absent` are layers
    of the checkpoint that the model does not have.
    """
    if not files or not all(path.endswith(".safetensors") for path in files):
        raise ConfigError(
            "an OATS checkpoint is loaded from safetensors files; from_pretrained was given "
            f"{files or 'a state dict'}. Pass the directory that save_pretrained wrote"
        )
    layers, stored = layers_of(model), stored_tensors(ModelNames(model), files)
    for key, tensor in stored.items():
        name, _, part = key.rpartition(".")
        if part in ("low_rank_u", "low_rank_v") and name not in layers and name not in absent:
            raise FormatError(
                f"{tensor.path}: {key} belongs to a layer that config.json (quantization_config.layers) does "
                f"not list for {type(model).__name__}; the files do not belong together, {RETRY}"
            )
    weight = f"{tied_embedding}.weight"
    if weight in stored:
        raise FormatError(
            f"{stored[weight].path}: {tied_embedding} has a weight, but config.json says that it reads the "
            f"rows of the output head; {RETRY}"
        )
    for name, layer in layers.items():
        shapes = {part: tuple(tensor.shape) for part, tensor in layer.state_dict().items()}
        found = {part: stored[f"{name}.{part}"] for part in shapes if f"{name}.{part}" in stored}
        check_tensors(name, shapes, found, ", ".join(files), layer.storage)
    return {name: stored[f"{name}.values"].path for name in layers}
