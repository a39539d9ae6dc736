"""`compress_`: the walk over a model, block by block."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from oats import budget
from oats.calibrate import BlockRunner, Calibration, as_batches, second_moments
from oats.config import OatsConfig
from oats.decomposition import decompose
from oats.errors import UnsupportedModelError, WeightError
from oats.format import DTYPES, storage_dtype
from oats.models import find_blocks
from oats.nn import SparseLowRankLinear

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
    """Weights inside the blocks that were not compressed → why."""

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
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress a model in place: every `nn.Linear` in its blocks becomes a `SparseLowRankLinear`.

    Blocks are compressed in order, each on what the compressed blocks before it make of the calibration
    data; inside a block the moments are those of its dense weights (arXiv 2409.13652, section 2.3). Only
    one block's hidden states are held beyond the model. Embeddings and the head stay as they are.

    The model is converted to the dtype in which its layers are stored (`OatsConfig.dtype`; by default its
    own, and bf16 for fp16).

    Args:
        model: with a list of transformer blocks.
        calibration: token ids (sequences, length), or an iterable of batches: tensors, or dicts of keyword
            arguments for the model.
        config: None means the defaults.
        blocks: dotted path of the list of blocks, for a model that :mod:`oats.models` does not know.
        progress: called after each layer.

    Raises:
        UnsupportedModelError: the blocks, or linear layers inside them, were not found.
        CalibrationError: the calibration data is empty, too short, or does not fit the model.
        WeightError: a weight or its inputs are not finite; the message names the layer.
        ConfigError: the settings cannot be met for a layer's shape.
    """
    config = config or OatsConfig()
    path, block_list = find_blocks(model, blocks)
    batches = as_batches(model, calibration)
    report = CompressionReport(config)
    linears = [
        _linears(f"{path}.{name}", block, config, report) for name, block in block_list.named_children()
    ]
    total = sum(map(len, linears))
    if total == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no nn.Linear to compress inside {path}; {_why(report)}"
        )
    _check_before_start(linears, config)

    dtype = DTYPES[config.dtype] if config.dtype else storage_dtype(_dtype_of(model))
    _convert(model, dtype)
    runner = BlockRunner(model, list(block_list), batches)
    with _evaluating(model):
        done = 0
        for index, layers in enumerate(linears):
            moments = second_moments(runner, index, layers)
            for name, linear in layers.items():
                done += 1
                if name not in moments:
                    report.left_dense[name] = "it did not run on the calibration data"
                    continue
                layer = _compress_layer(model, name, linear, moments.pop(name), config)
                report.layers.append(layer)
                if progress is not None:
                    progress(done, total, name, layer.relative_error)
            if index + 1 < len(linears):
                runner.advance(index)
    if not report.layers:
        raise UnsupportedModelError(f"{type(model).__name__}: nothing was compressed; {_why(report)}")
    unwanted = {name: why for name, why in report.left_dense.items() if why != _SKIPPED}
    if unwanted:
        warnings.warn(f"left dense: {_why(CompressionReport(config, left_dense=unwanted))}", stacklevel=2)
    if hasattr(model, "save_pretrained"):
        from oats.integrations.transformers import attach

        attach(model, config)
    return report


_SKIPPED = "it matches OatsConfig.skip"


def _linears(
    prefix: str, block: nn.Module, config: OatsConfig, report: CompressionReport
) -> dict[str, nn.Linear]:
    """The layers of a block to compress, by name; other matrices are noted in the report."""
    found: dict[str, nn.Linear] = {}
    for name, module in block.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            if any(fnmatch(name, pattern) for pattern in config.skip):
                report.left_dense[name] = _SKIPPED
            elif type(module).forward is not nn.Linear.forward:
                report.left_dense[name] = f"{type(module).__name__} computes in its own way"
            else:
                found[name] = module
        elif not isinstance(module, (nn.Embedding, SparseLowRankLinear)):
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and min(parameter.shape[-2:]) > 1:
                    report.left_dense[f"{name}.{parameter_name}"] = (
                        f"{type(module).__name__} is not an nn.Linear"
                    )
    return found


def _check_before_start(linears: list[dict[str, nn.Linear]], config: OatsConfig) -> None:
    """Find what would stop the walk before anything has been changed."""
    for layers in linears:
        for name, linear in layers.items():
            if not torch.isfinite(linear.weight).all():
                raise WeightError(
                    f"{name}: the weight has NaN or infinite entries; the checkpoint is damaged"
                )
            budget.rank_for(
                linear.out_features, linear.in_features, config.compression, config.rank_ratio, config.pattern
            )


def _compress_layer(
    model: nn.Module, name: str, linear: nn.Linear, second_moment: Tensor, config: OatsConfig
) -> LayerReport:
    start = time.perf_counter()
    decomposition = decompose(linear.weight, second_moment, **config.decompose_options(), name=name)
    layer = SparseLowRankLinear.from_decomposition(decomposition, linear.bias)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
    return LayerReport(
        name,
        linear.out_features,
        linear.in_features,
        layer.rank,
        layer.nnz,
        decomposition.relative_error,
        time.perf_counter() - start,
    )


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


def _why(report: CompressionReport) -> str:
    if not report.left_dense:
        return "they hold no matrices"
    reasons = [f"{name} ({why})" for name, why in report.left_dense.items()]
    return "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")


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
