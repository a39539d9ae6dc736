"""Several layers that read the same input, computed in one call of the core."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from oats.kernels.eager import is_plain
from oats.kernels.sparse_low_rank_linear import Projection
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear, fits_kernel


def projections_of(layers: Iterable[nn.Module | None], x: Tensor) -> list[Projection] | None:
    """What :func:`oats.kernels.sparse_low_rank_linear.linear_many` needs to do the work of several layers.

    Returns:
        None if the caller must call each layer: one of them is of another kind, has hooks, or is not packed
        for the CPU; or `x` has another dtype or size than they expect, or autograd, a compiler or a tracer
        follows it.
    """
    if not x.is_cpu or not is_plain(x) or x.dim() == 0 or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if _has_any_global_hook():
        return None
    dtype, d_in = x.dtype, x.shape[-1]
    projections: list[Projection] = []
    for layer in layers:
        if type(layer) is not SparseLowRankLinear:
            return None
        packed, bias, spec = layer._buffers["packed"], layer._parameters["bias"], layer.spec
        if (
            packed is None
            or not packed.is_cpu
            or spec.d_in != d_in
            or spec.dtype is not dtype
            or (bias is not None and not fits_kernel(bias, spec))
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or "forward" in layer.__dict__
        ):
            return None
        projections.append((packed, bias, spec))
    return projections
