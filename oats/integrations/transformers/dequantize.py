"""Turns a compressed model back into a dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from oats.checkpoint.layer_table import replacements
from oats.models.experts import split_all_
from oats.models.linear import like_linear, replace_
from oats.nn.experts import SplitExperts, fused_weights
from oats.nn.fusion import unfuse_
from oats.nn.head import RowsOfHead, own_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantize_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put dense layers with the weights ``S + U V``, in `dtype`, in the places of compressed ones."""
    with torch.device("meta"):
        original = type(model)(model.config)  # has the right kind of linear layer in each place
    experts = {name: m for name, m in model.named_modules() if isinstance(m, SplitExperts)}
    fused = split_all_(original, experts.__contains__)
    dense: dict[nn.Module, nn.Module] = {}
    for name, layer in replacements(model).items():
        if layer not in dense:
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            dense[layer] = like_linear(original.get_submodule(name), layer.weight.to(dtype), bias)
        model.set_submodule(name, dense[layer])
    for name, module in experts.items():
        for parameter, weight in fused_weights(module).items():
            fused[name].register_parameter(parameter, nn.Parameter(weight.to(dtype)))
        model.set_submodule(name, fused[name])
    for embedding in [module for module in model.modules() if isinstance(module, RowsOfHead)]:
        replace_(model, embedding, own_rows(embedding, model.get_output_embeddings().weight))
        model.config.tie_word_embeddings = True
        model.tie_weights()
    unfuse_(model)
