"""What differs between architectures: where the blocks are, which layers are fused, the head, the context.

Most architectures need one entry in one table here: a path in `BLOCK_PATHS`, or a class in `FUSED`.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from oats.errors import UnsupportedModelError

BLOCK_PATHS = {
    "model.layers": "Llama, Phi-3, Qwen, Gemma, Mistral and Mixtral with a language-model head",
    "model.language_model.layers": "multimodal Gemma and Qwen",
    "model.decoder.layers": "OPT with a head",
    "transformer.h": "GPT-2 with a head",
    "bert.encoder.layer": "BERT with a head",
    "roberta.encoder.layer": "RoBERTa with a head",
    "distilbert.transformer.layer": "DistilBERT with a head",
    "transformer.layer": "DistilBERT without a head",
    "vit.layers": "ViT with a head",
    "vit.encoder.layer": "ViT with a head",
    "dinov2.layers": "DINOv2 with a head",
    "dinov2.encoder.layer": "DINOv2 with a head",
    "language_model.layers": "multimodal models without a head",
    "decoder.layers": "OPT without a head",
    "encoder.layer": "BERT, MiniLM, RoBERTa, ViT and DINOv2 without a head",
    "encoder.layers": "Wav2Vec2 without a head, and torchvision's vision transformers",
    "layers": "Llama, Phi-3, Qwen, Gemma, Mistral and ViT without a head",
    "h": "GPT-2 without a head",
    "timm_model.blocks": "timm's vision transformers in transformers' TimmWrapper",
    "blocks": "timm's vision transformers",
}
"""Dotted path of the list of blocks → the architectures that have it there. The first that fits is taken."""

FUSED = {
    "qkv_proj": frozenset({"Phi3Attention", "Phi4MultimodalAttention"}),
    "gate_up_proj": frozenset({"Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP"}),
}
"""Name of a linear layer that computes several projections → the classes in which it does.
:func:`fused_outputs` says how its outputs are divided among them."""


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The dotted path of a model's list of transformer blocks, and the list; None tries :data:`BLOCK_PATHS`.

    Raises:
        UnsupportedModelError: there is no list of modules at `path`, or at any known path, or the list holds
            the same block twice.

    >>> model = nn.Module()
    >>> model.layers = nn.ModuleList([nn.Linear(2, 2)])
    >>> find_blocks(model)[0]
    'layers'
    """
    for candidate in [path] if path is not None else BLOCK_PATHS:
        try:
            blocks = model.get_submodule(candidate)
        except AttributeError:
            continue
        if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks):
            if len(set(blocks)) < len(blocks):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: {candidate} holds the same block more than once; a block is "
                    "compressed for the inputs of one place, so each must be a module of its own"
                )
            return candidate, blocks
    kinds = (nn.ModuleList, nn.Sequential)
    lists = [name for name, module in model.named_modules() if isinstance(module, kinds) and len(module) > 1]
    found = f"it has lists at {', '.join(lists[:5])}" if lists else "it has no list of modules"
    looked = f"no blocks at any of {', '.join(BLOCK_PATHS)}"
    if path is not None:
        looked = f"no list of modules at {path!r}"
    raise UnsupportedModelError(
        f"{type(model).__name__}: {looked}; {found}. Pass the dotted path of the list of transformer blocks "
        'as blocks="…" (compress_) or --blocks (oats compress)'
    )


def fused_outputs(owner: nn.Module | None, name: str) -> dict[str, int]:
    """The projections that the linear layer `name` of `owner` computes together.

    Returns:
        Name of each projection → number of its outputs, in the order of the layer's outputs. Empty for a
        layer that computes one projection.
    """
    linear = getattr(owner, name, None)
    if linear is None or type(owner).__name__ not in FUSED.get(name, ()):
        return {}
    d_out = getattr(linear, "out_features", 0)
    if name == "gate_up_proj":
        return {"gate": d_out // 2, "up": d_out // 2}
    key = cast(int, owner.num_key_value_heads * owner.head_dim)  # type: ignore[union-attr, operator]
    return {"q": d_out - 2 * key, "k": key, "v": key}


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a language model of transformers; None if the model has none."""
    get = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = None if get is None else get()
    return head


def context_limit(model: Any) -> int | None:
    """Most tokens that a model of transformers takes; None if its configuration does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
