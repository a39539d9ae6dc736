"""Storing compressed layers as codes: those of a whole model, or one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from oats.compression.block_runner import BlockRunner
from oats.compression.calibration import Calibration, as_batches
from oats.compression.statistics import hessians
from oats.compression.temporary import evaluating
from oats.config import LowRank, Storage, Values
from oats.decomposition.codes import quantize_tensors
from oats.errors import WeightError
from oats.format.layer_spec import exact_parts, kept_elements
from oats.models.architecture import find_blocks, output_head
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear


@torch.no_grad()
def quantize_(
    model: nn.Module,
    values: Values = "int8",
    low_rank: LowRank = "int8",
    scale_columns: int = 128,
    *,
    calibration: Calibration | None = None,
    blocks: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float | None]:
    """Store every compressed layer of a model as codes, in place.

    A layer that holds codes already is quantised again, from the numbers that its codes stand for. With
    calibration data, the values after each code make up for its error
    (:func:`oats.decomposition.codes.quantize_tensors`). This goes block by block, on what the quantised
    blocks before return. An output head that has codes keeps them.

    Args:
        model: with `SparseLowRankLinear` layers; or such a layer.
        values: of the kept values: "exact", "int8", "int4", "int3" or "int2".
        low_rank: of the factors: "exact" or "int8".
        scale_columns: columns of a row that share a scale, 64 or 128.
        calibration: as in :func:`oats.compress_`; None rounds each code by itself.
        blocks: as there; only calibration needs it.
        progress: called after each layer with: layers done, layers in all, the layer's name.

    Returns:
        Name of each layer → relative error of its output on the calibration data, against its output before;
        None for a layer that did not run on any.

    Raises:
        ConfigError: there is no such storage.
        WeightError: a layer has NaN or infinite values; the message names it.
        UnsupportedModelError, CalibrationError: as :func:`oats.compress_`.
    """
    storage, head = Storage.of(values, low_rank, scale_columns), output_head(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLowRankLinear) and module is not head
    }
    errors: dict[str, float | None] = {}
    calibrated = () if calibration is None else _hessians(model, layers, calibration, blocks)
    # Read once all of those are done: the layers without an error did not run.
    others = ((name, None) for name in layers if name not in errors)
    for name, hessian in chain(calibrated, others):
        layer = layers[name]
        before = None if hessian is None else exact_weight(layer)
        try:
            quantize_layer_(layer, storage, hessian)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error
        errors[name] = None
        if hessian is not None and before is not None:
            errors[name] = _output_error(exact_weight(layer), before, hessian)
        if progress is not None:
            progress(len(errors), len(layers), name)
    return errors


def _output_error(weight: Tensor, reference: Tensor, hessian: Tensor) -> float:
    """``‖(weight − reference) X‖ / ‖reference X‖`` with ``X Xᵀ`` given."""
    squares = [float(((m @ hessian) * m).sum().clamp_min(0)) for m in (weight - reference, reference)]
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def _hessians(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, blocks: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Yields the name of each layer and the Hessian of its inputs, block by block.

    A block runs after the caller has quantised the block before it. A layer that is in several blocks belongs
    to the first.
    """
    path, block_list = find_blocks(model, blocks)
    runner = BlockRunner(model, list(block_list), as_batches(model, calibration))
    with evaluating(model):
        for index in range(len(block_list)):
            prefix = f"{path}.{index}."
            own = {name: layer for name, layer in layers.items() if name.startswith(prefix)}
            yield from hessians(runner, index, own).items()
            if index + 1 < len(block_list):
                runner.advance(index)


@torch.no_grad()
def quantize_layer_(
    layer: SparseLowRankLinear,
    storage: Storage,
    hessian: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    catch_up: bool = False,
) -> None:
    """Store one layer as `storage` says, in place; see :func:`oats.decomposition.codes.quantize_tensors`.

    Args:
        layer: whose values and factors change.
        storage: which of them become codes.
        hessian: of the layer's inputs, (d_in, d_in); None rounds each code by itself.
        weight: that codes are fitted to, (d_out, d_in); None means the layer's own before.
        catch_up: see there.
    """
    tensors = layer.canonical()
    if weight is None and hessian is not None:
        weight = exact_weight(layer)
    if layer.storage.has_codes:
        sparse, u, v = exact_parts(tensors, layer.storage)
        kept = kept_elements(tensors, layer.in_features)
        exact = {"values": sparse[kept], "low_rank_u": u, "low_rank_v": v}
        mask = {name: tensor for name, tensor in tensors.items() if name == "mask"}
        tensors = mask | {name: t.to(layer.dtype) for name, t in exact.items()}
    storage = replace(storage, mask=layer.storage.mask)
    if storage.has_codes:
        tensors = quantize_tensors(tensors, layer.in_features, storage, hessian, weight, catch_up=catch_up)
    layer.store_(tensors, storage)


def exact_weight(layer: SparseLowRankLinear) -> Tensor:
    """S + U V in float32, whatever the layer's dtype."""
    sparse, u, v = exact_parts(layer.canonical(), layer.storage)
    return sparse.addmm_(u, v)
