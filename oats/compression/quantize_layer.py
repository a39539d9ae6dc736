"""Storing one compressed layer as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Storage
from oats.decomposition.codes import quantize_tensors
from oats.format.bitmask import decode_mask
from oats.format.layer_spec import exact_parts
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear


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
        kept = decode_mask(tensors["mask"], layer.in_features)
        exact = {"values": sparse[kept], "low_rank_u": u, "low_rank_v": v}
        tensors = {"mask": tensors["mask"]} | {name: t.to(layer.dtype) for name, t in exact.items()}
    if storage.has_codes:
        tensors = quantize_tensors(tensors, layer.in_features, storage, hessian, weight, catch_up=catch_up)
    layer.store_(tensors, storage)


def exact_weight(layer: SparseLowRankLinear) -> Tensor:
    """S + U V in float32, whatever the layer's dtype."""
    sparse, u, v = exact_parts(layer.canonical(), layer.storage)
    return sparse.addmm_(u, v)
