"""`compress_`: compress a model in memory."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from oats.compression.allocation import allocate, measure_block
from oats.compression.block_runner import BlockRunner, evaluating, rehearse
from oats.compression.calibration import TOKENS_PER_BATCH, Calibration, as_batches
from oats.compression.conversion import convert, convert_batch, dtype_of
from oats.compression.head import store_head_as_codes_
from oats.compression.matching import TOKENS_PER_STEP
from oats.compression.report import CompressionReport, Progress
from oats.compression.saving_hook import prepare_saving_
from oats.compression.targets import SPLIT, find_targets, is_skipped
from oats.compression.walk import Walk
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

    Blocks are compressed in order, each on what the compressed blocks before it make of the calibration
    data; inside a block the moments are those of its dense weights (arXiv 2409.13652, section 2.3). With
    ``OatsConfig.moments="dense"`` it is what the dense blocks make of it. Only one block's hidden states are
    held beyond the model. Embeddings and the head stay as they are. A layer that the model has in several
    places stays one layer, fitted to the first block that it is in.

    With `OatsConfig.block_matching`, each block is then tuned to return, on what the compressed blocks before
    it return, what the dense block returns in the dense model; twice the hidden states are held.

    What cannot work is found before the model is changed, as far as one sequence shows it.

    The model is converted to the dtype in which its layers are stored (`OatsConfig.dtype`; by default its
    own, and bf16 for fp16).

    With `OatsConfig.head`, the output head is stored as codes first (:mod:`oats.compression.head`).

    Args:
        model: with a list of transformer blocks.
        calibration: token ids (sequences, length), or an iterable of batches: tensors, or dicts of keyword
            arguments for the model; or one such dict.
        config: None means the defaults.
        blocks: dotted path of the list of blocks, None tries the known paths.
        split: names of fused projections whose parts are decomposed one by one: ``"qkv_proj"`` (Phi-3; what
            the paper does), ``"gate_up_proj"`` (Phi-3, GLM).
        progress: called after each layer.

    Raises:
        UnsupportedModelError: the blocks, or linear layers inside them, were not found.
        CalibrationError: the calibration data is empty, too short, or does not fit the model.
        WeightError: a weight or its inputs are not finite; the message names the layer.
        ConfigError: the settings cannot be met for a layer's shape.
    """
    config = checked_config(config, split)
    path, block_list = find_blocks(model, blocks)
    batches = as_batches(model, calibration, tokens_per_batch(config))
    experts = split_all_(
        model,
        lambda name: name.startswith(f"{path}.") and not is_skipped(f"{name}.gate_up_proj", config),
    )
    try:
        targets = find_targets(model, path, block_list, config, split)
        targets.check(config)
        with evaluating(model):
            rehearse(model, list(block_list), batches)
    except BaseException:
        for name, module in experts.items():
            model.set_submodule(name, module)
        raise
    experts.clear()  # the memory of each is free once its layers are replaced

    with evaluating(model):
        dtype = dtype_of(model)
        stored = DTYPES[config.dtype] if config.dtype else storage_dtype(dtype)
        convert(model, stored)
        batches = [convert_batch(batch, dtype, stored) for batch in batches]
        if config.head:
            prepare_saving_(model, config)
            store_head_as_codes_(model, config.scale_columns)
        compressions: dict[str, float] = {}
        if config.budget != "uniform":
            dense, measures = BlockRunner(model, list(block_list), batches), []
            for index, block in enumerate(targets.blocks):
                measures.append(measure_block(dense, index, block, config))
                if index + 1 < len(block_list):
                    dense.advance(index)
            compressions = allocate(measures, config)
            del dense
        walk = Walk(model, path, targets, batches, config, compressions=compressions, progress=progress)
        for index in range(len(block_list)):
            walk.compress_block(index)
            if index + 1 < len(block_list):
                walk.advance(index)
    fuse_(model)
    walk.conclude()
    return walk.report


def checked_config(config: OatsConfig | None, split: Collection[str]) -> OatsConfig:
    """The settings of a run; None means the defaults.

    Raises:
        ConfigError: one is of the wrong type.
    """
    if config is None:
        config = OatsConfig()
    if not isinstance(config, OatsConfig):
        raise ConfigError(f"config is {config!r}; pass oats.OatsConfig(compression=0.5, …), or None")
    if isinstance(split, str) or not set(split) <= set(FUSED):
        raise ConfigError(f"split is {split!r}, expected a collection of names out of {', '.join(FUSED)}")
    return config


def tokens_per_batch(config: OatsConfig) -> int:
    """How many tokens run through a block together: with matching, those of one step of its optimiser."""
    return TOKENS_PER_STEP if config.block_matching else TOKENS_PER_BATCH
