"""Gated MLPs, ``down(act(gate(x)) * up(x))``, that compute gate and up in one call of the kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from oats.kernels.sparse_low_rank_linear import linear_many
from oats.nn.fusion.known_forward import known_class, same_code, set_forward_
from oats.nn.projections import projections_of
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear


def merge_gated_mlps_(model: nn.Module) -> None:
    """Let each compressed gated MLP of a model compute gate and up in one call.

    They return the same as before, bit for bit: gate and up are computed together where
    :func:`oats.nn.projections.projections_of` allows it. Nothing is kept from one call to the next. Only
    modules with the ``forward`` of transformers' Llama, which many models share, are replaced.
    """
    for module in model.modules():
        gate, up = (module._modules.get(name) for name in ("gate_proj", "up_proj"))
        if (
            isinstance(gate, SparseLowRankLinear)
            and isinstance(up, SparseLowRankLinear)
            and same_code(type(module).forward, _forward)
        ):
            set_forward_(module, merged_forward)


def _forward(self: Any, x: Tensor) -> Tensor:
    # Exactly as in transformers: we know a class by the bytecode of its forward.
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # type: ignore[no-any-return]


def merged_forward(self: Any, x: Tensor) -> Tensor:
    """The fused forward of a gated MLP."""
    modules: dict[str, Any] = self._modules
    projections = projections_of((modules["gate_proj"], modules["up_proj"]), x)
    if projections is None:
        return known_class(self).forward(self, x)  # type: ignore[no-any-return]
    gate, up = linear_many(x, projections)
    return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]
