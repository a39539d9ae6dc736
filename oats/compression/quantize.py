"""`quantize_`: the walk over a compressed model that stores its layers as codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from oats.compression.block_runner import BlockRunner, evaluating
from oats.compression.calibration import Calibration, as_batches
from oats.compression.statistics import hessians
from oats.config import LowRank, Storage, Values
from oats.errors import WeightError
from oats.format.bitmask import decode_mask
from oats.format.layer_spec import exact_parts
from oats.models.architecture import find_blocks, output_head

if TYPE_CHECKING:
    from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

from oats.decomposition.codes import quantize_tensors


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

    Layers that hold codes already are fitted anew from the numbers for which these stand. With calibration
    data, the error of each code is made good by the values after it (:func:`quantize_tensors`), block by
    block, each on what the coded blocks before it return. An output head that has codes keeps them.

    Args:
        model: with `SparseLowRankLinear` layers; or such a layer.
        values: of the kept values: "exact", "int8" or "int4".
        low_rank: of the factors: "exact" or "int8".
        scale_columns: columns of a row that share a scale, 64 or 128.
        calibration: as of :func:`oats.compress_`; None means that codes are rounded one by one.
        blocks: as there; it is needed for calibration only.
        progress: called after each layer with: layers done, layers in all, the layer's name.

    Returns:
        Name of each layer → how far its output moved, relative, on the calibration data that it saw; None
        where it saw none.

    Raises:
        ConfigError: there is no such storage.
        WeightError: a layer has values that are not finite; the message names it.
        UnsupportedModelError, CalibrationError: as :func:`oats.compress_`.
    """
    from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

    storage = Storage.of(values, low_rank, scale_columns)
    head = output_head(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseLowRankLinear) and module is not head
    }
    left = dict(layers)
    known = () if calibration is None else _hessians(model, layers, calibration, blocks)
    unknown = ((name, None) for name in layers if name in left)
    moved: dict[str, float | None] = {}
    for name, hessian in chain(known, unknown):
        layer = left.pop(name)
        before = _exact_weight(layer) if hessian is not None else None
        try:
            quantize_layer_(layer, storage, hessian)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error
        moved[name] = None
        if hessian is not None and before is not None:
            moved[name] = _output_error(_exact_weight(layer), before, hessian)
        if progress is not None:
            progress(len(layers) - len(left), len(layers), name)
    return moved


def _exact_weight(layer: SparseLowRankLinear) -> Tensor:
    """S + U V in float32, whatever the layer's dtype."""
    sparse, u, v = exact_parts(layer.canonical(), layer.storage)
    return sparse.addmm_(u, v)


def _output_error(weight: Tensor, reference: Tensor, hessian: Tensor) -> float:
    """``‖(weight − reference) X‖ / ‖reference X‖`` with ``X Xᵀ`` given."""
    squares = [float(((m @ hessian) * m).sum().clamp_min(0)) for m in (weight - reference, reference)]
    return math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0


def _hessians(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, blocks: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Name of a layer and Hessian of its inputs, block by block, each once the one before has its codes.

    A layer that is in several blocks belongs to the first.
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
    """Store one layer as `storage` says; see :func:`quantize_tensors`.

    Where no weight is given, it is what the layer computes before.
    """
    tensors = layer.canonical()
    if weight is None and hessian is not None:
        weight = _exact_weight(layer)
    if layer.storage.has_codes:
        sparse, u, v = exact_parts(tensors, layer.storage)
        kept = decode_mask(tensors["mask"], layer.in_features)
        exact = {"values": sparse[kept], "low_rank_u": u, "low_rank_v": v}
        tensors = {"mask": tensors["mask"]} | {name: t.to(layer.dtype) for name, t in exact.items()}
    if storage.has_codes:
        tensors = quantize_tensors(tensors, layer.in_features, storage, hessian, weight, catch_up=catch_up)
    layer.store_(tensors, storage)
