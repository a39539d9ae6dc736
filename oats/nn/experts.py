"""Experts of a mixture of experts, as linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from oats.kernels.sparse_low_rank_linear import linear_many
from oats.nn.projections import projections_of
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear


class Expert(nn.Module):
    """``down(act(gate x) * up x)``.

    Args:
        gate_up: (2 d_ff, d), the weights of gate and up.
        down: (d, d_ff).
        activation: of the gate.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate, self.up, self.down = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``down(act(gate x) * up x)``, (tokens, d), of x, (tokens, d)."""
        projections = projections_of((self.gate, self.up), x)
        gate, up = (self.gate(x), self.up(x)) if projections is None else linear_many(x, projections)
        return cast(Tensor, self.down(self.act_fn(gate) * up))


class SplitExperts(nn.ModuleList):
    """Replaces experts that were 3-D parameters: one :class:`Expert` for each.

    Attributes:
        routed: (n,), the indices of the tokens that the running expert got, for hooks inside it; None while
            no expert runs.
    """

    routed: Tensor | None = None

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.register_state_dict_post_hook(_save_dense_experts_fused)  # type: ignore[no-untyped-call]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the outputs of each token's chosen experts, times their weights.

        Args:
            hidden_states: (tokens, d).
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k), what their outputs are multiplied by.

        Returns:
            (tokens, d), in the dtype of `hidden_states`; summed in float32.
        """
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for index in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == index)
            self.routed = token
            output = self[index](hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, output.float())
        self.routed = None
        return total.to(hidden_states.dtype)


def fused_weights(experts: SplitExperts) -> dict[str, Tensor]:
    """The 3-D parameters that experts were made from, by name; their layers need a ``weight``."""
    each: list[Any] = list(experts)
    return {
        "gate_up_proj": torch.stack([torch.cat([e.gate.weight, e.up.weight]) for e in each]).detach(),
        "down_proj": torch.stack([e.down.weight for e in each]).detach(),
    }


def _save_dense_experts_fused(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """If no expert is compressed, as after an interrupted walk, save the 3-D parameters as before."""
    if not any(isinstance(layer, SparseLowRankLinear) for layer in module.modules()):
        for name in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[name]
        weights = fused_weights(cast(SplitExperts, module))
        state_dict.update({prefix + name: weight for name, weight in weights.items()})


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made
