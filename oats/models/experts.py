"""Mixtures of experts. transformers stores the experts of a block as two 3-D parameters; this module splits
them into linear layers, which can be compressed like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from oats.nn.experts import Expert, SplitExperts

# The attributes that `transformers.integrations.use_experts_implementation` gives to a class whose experts
# compute down(act(gate x) * up x), with parameters (experts, 2 d_ff, d) and (experts, d, d_ff).
_PLAIN = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
    "_is_expert_parallel": False,
}


def is_fused_experts(module: nn.Module) -> bool:
    """True if a module holds gated experts as 3-D parameters that :func:`split_experts` can split."""
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
    """The same experts (see :func:`is_fused_experts`) as linear layers that share the parameters' memory."""
    pairs = zip(module.gate_up_proj, module.down_proj, strict=True)
    return SplitExperts([Expert(gate_up.detach(), down.detach(), module.act_fn) for gate_up, down in pairs])


def split_all_(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Module]:
    """Split the experts of a model in place, where `wanted` is True for their name.

    Returns:
        Name → the module that was replaced, for those that were split.
    """
    found = {name: old for name, old in model.named_modules() if is_fused_experts(old) and wanted(name)}
    for name, module in found.items():
        model.set_submodule(name, split_experts(module))
    return found
