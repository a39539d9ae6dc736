"""`compress_`: compress a model in memory."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from oats.compression.calibration import TOKENS_PER_BATCH, Calibration, as_batches
from oats.compression.conversion import dtype_of
from oats.compression.matching import TOKENS_PER_STEP
from oats.compression.report import CompressionReport, Progress
from oats.compression.targets import SPLIT, find_targets, is_skipped
from oats.compression.walk import BlockStore, Walk
from oats.config import OatsConfig
from oats.errors import ConfigError
from oats.format.layer_spec import DTYPES, storage_dtype
from oats.models.architecture import FUSED, find_blocks
from oats.models.experts import split_all_
from oats.nn.fusion import fuse_


@torch.no_grad()
def compress_(
    model: nn.Module,
    calibration: Calibration,
    config: OatsConfig | None = None,
    *,
    blocks: str | None = None,
    split: Collection[str] = SPLIT,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress a model in place: every linear layer in its blocks becomes a `SparseLowRankLinear`.

    Blocks are compressed in order. The inputs of a block are what the compressed blocks before it return for
    the calibration data, or with ``OatsConfig.moments="dense"`` what the dense blocks return; inside a block
    all layers are fitted to inputs that its dense weights make (arXiv 2409.13652, section 2.3). Beside the
    model, memory holds the hidden states of one block. Embeddings and the head stay as they are. A layer that
    the model has in several places stays one layer; it is fitted to the first block that has it.

    With `OatsConfig.block_matching`, each compressed block is then tuned to return what the dense block
    returns in the dense model. Memory then holds twice the hidden states.

    Before the model is changed, all blocks run on one sequence, which finds most of what cannot work. Then
    the model is converted to the dtype in which its layers are stored (`OatsConfig.dtype`; by default its
    own, and bf16 for fp16). With `OatsConfig.head`, the head becomes codes first
    (:mod:`oats.compression.head`).

    Args:
        model: with a list of transformer blocks.
        calibration: token ids (sequences, length); or an iterable of batches, which are tensors or dicts of
            keyword arguments for the model; or one such dict.
        config: None means the defaults.
        blocks: dotted path of the list of blocks; None tries the known paths.
        split: names of fused projections whose parts are decomposed one by one: ``"qkv_proj"`` (Phi-3; as in
            the paper), ``"gate_up_proj"`` (Phi-3, GLM).
        progress: called after each layer.

    Raises:
        UnsupportedModelError: the blocks, or linear layers inside them, were not found.
        CalibrationError: the calibration data is empty, too short, or does not fit the model.
        WeightError: a weight or its inputs have NaN or infinite entries; the message names the layer.
        ConfigError: the settings cannot be met for a layer's shape.
    """
    config = checked_settings(config, split)
    path, block_list = find_blocks(model, blocks)
    batches = as_batches(model, calibration, tokens_per_batch(config))

    def wanted(experts: str) -> bool:
        return experts.startswith(f"{path}.") and not is_skipped(f"{experts}.gate_up_proj", config)

    experts = split_all_(model, wanted)
    try:
        targets = find_targets(model, path, block_list, config, split)
        walk = Walk(model, path, targets, batches, config, BlockStore(), progress=progress)
        walk.start()
    except BaseException:
        for name, module in experts.items():
            model.set_submodule(name, module)
        raise
    experts.clear()  # so that the memory of each is free once its layers are replaced
    report = walk.run(DTYPES[config.dtype] if config.dtype else storage_dtype(dtype_of(model)))
    fuse_(model)
    return report


def checked_settings(config: OatsConfig | None, split: Collection[str]) -> OatsConfig:
    """`config`, or the defaults for None; raises a `ConfigError` if a run's settings have wrong types."""
    config = OatsConfig() if config is None else config
    if not isinstance(config, OatsConfig):
        raise ConfigError(f"config is {config!r}; pass oats.OatsConfig(compression=0.5, …), or None")
    if isinstance(split, str) or not set(split) <= set(FUSED):
        raise ConfigError(f"split is {split!r}, expected a collection of names out of {', '.join(FUSED)}")
    return config


def tokens_per_batch(config: OatsConfig) -> int:
    """How many tokens run through a block together; with matching, the tokens of one optimiser step."""
    return TOKENS_PER_STEP if config.block_matching else TOKENS_PER_BATCH
