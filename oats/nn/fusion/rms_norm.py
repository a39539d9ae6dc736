"""Root mean square norms in one call of the core, where torch takes ten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oats.kernels.eager import is_plain
from oats.kernels.rms_norm import rms_norm
from oats.nn.fusion.known_forward import known_class, same_code, set_forward_


def fuse_norms_(model: nn.Module) -> None:
    """Let each norm of a model take one call: Python takes most of the time of decoding a small model.

    The results differ at most by the rounding of a sum. A norm computes as before if autograd or a compiler
    follows its input, or the input is not contiguous or not on the CPU. Only modules with the ``forward`` of
    transformers' Llama or Gemma, which many models share, are replaced.
    """
    for module in model.modules():
        kind = type(module)
        if same_code(kind.forward, _llama):
            set_forward_(module, round_then_scale)
        elif same_code(kind.forward, _gemma) and same_code(getattr(kind, "_norm", None), _gemma_norm):
            set_forward_(module, scale_by_one_plus)


# Exactly as in transformers: we know a class by the bytecode of its forward.


def _llama(self: Any, hidden_states: Tensor) -> Tensor:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)  # type: ignore[no-any-return]


def _gemma(self: Any, x: Tensor) -> Tensor:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)  # type: ignore[no-any-return]


def _gemma_norm(self: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def round_then_scale(self: Any, hidden_states: Tensor) -> Tensor:
    """The fused forward of Llama's norm: round to the dtype, then multiply by the weight."""
    weight = self._parameters.get("weight")
    if _fusible(hidden_states, weight):
        return rms_norm(hidden_states, weight, self.variance_epsilon, one_plus=False)
    return known_class(self).forward(self, hidden_states)  # type: ignore[no-any-return]


def scale_by_one_plus(self: Any, x: Tensor) -> Tensor:
    """The fused forward of Gemma's norm: multiply by one plus the weight, then round."""
    weight = self._parameters.get("weight")
    if _fusible(x, weight):
        return rms_norm(x, weight, self.eps, one_plus=True)
    return known_class(self).forward(self, x)  # type: ignore[no-any-return]


def _fusible(x: Tensor, weight: Tensor | None) -> bool:
    return (
        weight is not None
        and is_plain(x)
        and x.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in (torch.bfloat16, torch.float32)
        and weight.is_cpu
        and x.dim() > 0
        and x.shape[-1] == weight.numel()
        and x.is_contiguous()
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
