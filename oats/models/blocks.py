"""Where each architecture keeps its list of transformer blocks."""

from __future__ import annotations

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
"""Dotted path of the list of blocks → the architectures that keep it there, longest path first."""


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The list of transformer blocks of a model.

    Args:
        model: any module.
        path: dotted path of the list, for a model that is not in :data:`BLOCK_PATHS`.

    Returns:
        The path and the list.

    Raises:
        UnsupportedModelError: there is no list of modules at `path`, or at any known path, or it holds the
            same block twice.

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
                    "compressed on the inputs of one place, so that each must be a module of its own"
                )
            return candidate, blocks
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
    ]
    found = f"it has lists at {', '.join(lists[:5])}" if lists else "it has no list of modules"
    looked = (
        f"no list of modules at {path!r}"
        if path is not None
        else f"no blocks at any of {', '.join(BLOCK_PATHS)}"
    )
    raise UnsupportedModelError(
        f"{type(model).__name__}: {looked}; {found}. Pass the dotted path of the list of transformer blocks "
        'as blocks="…" (compress_) or --blocks (oats compress)'
    )
