"""Mixtures of experts: transformers holds those of a block as two 3-D parameters; here each is layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from oats.nn.experts import Expert, SplitExperts

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
