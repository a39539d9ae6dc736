"""Mixtures of experts: transformers holds those of a block as two 3-D parameters; here each is layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from oats import ops
from oats.nn import SparseLowRankLinear, projections_of

# What `transformers.integrations.use_experts_implementation` says of a class whose experts compute
# down(act(gate x) * up x), from parameters (experts, 2 d_ff, d) and (experts, d, d_ff).
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds gated experts as 3-D parameters that :func:`split_experts` understands."""
    weights = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    if any(weight is None or weight.dim() != 3 for weight in weights):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    return (
        all(getattr(module, name, None) is value for name, value in _PLAIN.items())
        and getattr(gate, "__name__", None) == "_default_apply_gate"
        and len(module._parameters) == 2
    )


class Expert(nn.Module):
    """``down(act(gate x) * up x)``.

    Args:
        gate_up: (2 d_ff, d), the weights of gate and up.
        down: (d, d_ff).
        activation: of the gate.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        """Hold the weights, which are not copied."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate, self.up, self.down = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        """Compute it.

        Args:
            x: (tokens, d).

        Returns:
            (tokens, d).
        """
        projections = projections_of((self.gate, self.up), x)
        gate, up = (self.gate(x), self.up(x)) if projections is None else ops.linear_many(x, projections)
        return cast(Tensor, self.down(self.act_fn(gate) * up))


class SplitExperts(nn.ModuleList):
    """What stands in the place of experts that were 3-D parameters; an :class:`Expert` each.

    Attributes:
        routed: (n,), which tokens the expert that is running has been given, for hooks inside it; None while
            none is.
    """

    routed: Tensor | None = None

    def __init__(self, experts: list[Expert]) -> None:
        """Hold the experts."""
        super().__init__(experts)
        self.register_state_dict_post_hook(_as_it_was)  # type: ignore[no-untyped-call]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of what the chosen experts make of each token, times their weights.

        Args:
            hidden_states: (tokens, d).
            top_k_index: (tokens, k), which experts each token goes to.
            top_k_weights: (tokens, k).

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


def split_experts(module: Any) -> SplitExperts:
    """The same experts as linear layers, which share the memory of the parameters.

    Args:
        module: for which :func:`is_fused_experts` is true.
    """
    return SplitExperts(
        [
            Expert(gate_up.detach(), down.detach(), module.act_fn)
            for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True)
        ]
    )


def fused_weights(experts: SplitExperts) -> dict[str, Tensor]:
    """The way back: the 3-D parameters of experts, by their names.

    Args:
        experts: whose layers have a ``weight``.
    """
    each: list[Any] = list(experts)
    return {
        "gate_up_proj": torch.stack([torch.cat([e.gate.weight, e.up.weight]) for e in each]).detach(),
        "down_proj": torch.stack([e.down.weight for e in each]).detach(),
    }


def _as_it_was(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Experts of which none is compressed, as after a walk that was interrupted, are saved as before."""
    if not any(isinstance(layer, SparseLowRankLinear) for layer in module.modules()):
        for name in [key for key in state_dict if key.startswith(prefix)]:
            del state_dict[name]
        weights = fused_weights(cast(SplitExperts, module))
        state_dict.update({prefix + name: weight for name, weight in weights.items()})


def split_all_(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    """Split the experts of a model in place.

    Args:
        model: any module.
        wanted: whether experts of that name are to be split.

    Returns:
        Name → the module that was replaced.
    """
    found = {
        name: module for name, module in model.named_modules() if is_fused_experts(module) and wanted(name)
    }
    for name, module in found.items():
        model.set_submodule(name, split_experts(module))
    return found


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made
