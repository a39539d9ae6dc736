"""`compress_`: the walk over a model, block by block."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from oats.calibrate import TOKENS_PER_BATCH, BlockRunner, Calibration, as_batches, rehearse
from oats.config import OatsConfig
from oats.errors import ConfigError, UnsupportedModelError
from oats.format import DTYPES, storage_dtype
from oats.gated_mlp import merge_gated_mlps_
from oats.matching import TOKENS_PER_STEP, match_block
from oats.methods import decompose_by_method, input_statistics
from oats.models import find_blocks
from oats.models.experts import split_all_
from oats.models.linear import FUSED
from oats.nn import SparseLowRankLinear, SplitLinear
from oats.targets import SKIPPED, SPLIT, Target, find_targets, is_skipped, reasons

Progress = Callable[[int, int, str, float], None]
"""Called after each layer with: layers done, layers in all, the layer's name, its relative error."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer."""

    name: str
    d_out: int
    d_in: int
    rank: int
    nnz: int
    relative_error: float
    seconds: float


@dataclass
class CompressionReport:
    """What `compress_` did."""

    config: OatsConfig
    layers: list[LayerReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    """Weights of transformer blocks that were not compressed → why."""
    matched: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Block → the loss of :func:`oats.matching.match_block` before and after; where blocks were matched."""

    @property
    def parameters_before(self) -> int:
        """Of the compressed layers."""
        return sum(layer.d_out * layer.d_in for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Non-zeros and entries of the low-rank factors."""
        return sum(layer.nnz + layer.rank * (layer.d_out + layer.d_in) for layer in self.layers)


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
    data; inside a block the moments are those of its dense weights (arXiv 2409.13652, section 2.3). Only
    one block's hidden states are held beyond the model. Embeddings and the head stay as they are. A layer
    that the model has in several places stays one layer, fitted to the first block that it is in.

    With `OatsConfig.block_matching`, each block is then tuned to return, on what the compressed blocks before
    it return, what the dense block returns in the dense model; twice the hidden states are held.

    What cannot work is found before the model is changed, as far as one sequence shows it.

    The model is converted to the dtype in which its layers are stored (`OatsConfig.dtype`; by default its
    own, and bf16 for fp16).

    Args:
        model: with a list of transformer blocks.
        calibration: token ids (sequences, length), or an iterable of batches: tensors, or dicts of keyword
            arguments for the model; or one such dict.
        config: None means the defaults.
        blocks: dotted path of the list of blocks, for a model that :mod:`oats.models` does not know.
        split: names of fused projections whose parts are decomposed one by one: ``"qkv_proj"`` (Phi-3; what
            the paper does), ``"gate_up_proj"`` (Phi-3, GLM).
        progress: called after each layer.

    Raises:
        UnsupportedModelError: the blocks, or linear layers inside them, were not found.
        CalibrationError: the calibration data is empty, too short, or does not fit the model.
        WeightError: a weight or its inputs are not finite; the message names the layer.
        ConfigError: the settings cannot be met for a layer's shape.
    """
    if config is None:
        config = OatsConfig()
    if not isinstance(config, OatsConfig):
        raise ConfigError(f"config is {config!r}; pass oats.OatsConfig(compression=0.5, …), or None")
    if isinstance(split, str) or not set(split) <= set(FUSED):
        raise ConfigError(f"split is {split!r}, expected a collection of names out of {', '.join(FUSED)}")
    path, block_list = find_blocks(model, blocks)
    batches = as_batches(model, calibration, TOKENS_PER_STEP if config.block_matching else TOKENS_PER_BATCH)
    experts = split_all_(
        model,
        lambda name: name.startswith(f"{path}.") and not is_skipped(f"{name}.gate_up_proj", config),
    )
    try:
        targets = find_targets(model, path, block_list, config, split)
        targets.check(config)
        with _evaluating(model):
            rehearse(model, list(block_list), batches)
    except BaseException:
        for name, module in experts.items():
            model.set_submodule(name, module)
        raise
    experts.clear()  # the memory of each is free once its layers are replaced
    report = CompressionReport(config, left_dense=dict(targets.left_dense))

    with _evaluating(model):
        dtype = _dtype_of(model)
        stored = DTYPES[config.dtype] if config.dtype else storage_dtype(dtype)
        _convert(model, stored)
        # Images and the like come in the model's dtype.
        batches = [
            {k: v.to(stored) if getattr(v, "dtype", None) == dtype else v for k, v in batch.items()}
            for batch in batches
        ]
        runner = BlockRunner(model, list(block_list), batches)
        # What the dense blocks make of the data; only matching asks for it.
        dense = BlockRunner(model, list(block_list), batches)
        done = 0
        for index, block in enumerate(targets.blocks):
            modules = {name: target.module for name, target in block.items()}
            statistics = input_statistics(runner, index, modules, config)
            if config.block_matching:
                dense.advance(index)
            made: list[SparseLowRankLinear] = []
            for name, target in block.items():
                if name not in statistics:
                    done += len(target.outputs) or 1
                    report.left_dense[name] = "it did not run on the calibration data"
                    continue
                layer, parts = _decompose(name, target, statistics.pop(name), config)
                if not report.layers and hasattr(model, "save_pretrained"):
                    from oats.integrations.transformers import attach

                    # Before the first layer is replaced: saved without it, a checkpoint would load random
                    # weights, and from here on the walk may be interrupted.
                    attach(model, config)
                _replace(model, target.module, layer)
                made += [part for part in layer.modules() if isinstance(part, SparseLowRankLinear)]
                for part in parts:
                    done += 1
                    report.layers.append(part)
                    if progress is not None:
                        progress(done, len(targets), part.name, part.relative_error)
            if config.block_matching and made:
                losses = match_block(runner, index, made, dense.held, config.block_matching)
                report.matched[f"{path}.{index}"] = losses
            if index + 1 < len(targets.blocks):
                runner.advance(index)
    merge_gated_mlps_(model)
    if not report.layers:
        raise UnsupportedModelError(
            f"{type(model).__name__}: nothing was compressed; {reasons(report.left_dense)}"
        )
    unwanted = {name: why for name, why in report.left_dense.items() if why != SKIPPED}
    if unwanted:
        warnings.warn(f"left dense: {reasons(unwanted)}", stacklevel=2)
    return report


def _decompose(
    name: str, target: Target, statistic: Tensor, config: OatsConfig
) -> tuple[nn.Module, list[LayerReport]]:
    """The layer that replaces the target, and what became of each of its matrices."""
    layers: dict[str, SparseLowRankLinear] = {}
    reports = []
    for part, (weight, bias) in target.matrices().items():
        part_name = f"{name}.{part}" if part else name
        start = time.perf_counter()
        result = decompose_by_method(weight.contiguous(), statistic, config, part_name)
        layers[part] = layer = SparseLowRankLinear.from_decomposition(result, bias)
        seconds = time.perf_counter() - start
        d_out, d_in = weight.shape
        reports.append(
            LayerReport(part_name, d_out, d_in, layer.rank, layer.nnz, result.relative_error, seconds)
        )
    return SplitLinear(layers) if target.outputs else layers[""], reports


def _replace(model: nn.Module, linear: nn.Module, layer: nn.Module) -> None:
    """Put `layer` wherever the model has `linear`, which may be under several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is linear:
            model.set_submodule(name, layer)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint holds; the rest (rotary frequencies) stays precise, as it does in loading."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no key-value cache: a cache would hold every block's keys at once."""
    training = [module for module in model.modules() if module.training]
    configuration = getattr(model, "config", None)
    use_cache = getattr(configuration, "use_cache", None)
    model.eval()
    if use_cache is not None:
        configuration.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if use_cache is not None:
            configuration.use_cache = use_cache  # type: ignore[union-attr]
