"""The two kinds of linear layer, `nn.Linear` and GPT-2's ``Conv1D``, behind the same functions."""

from __future__ import annotations

import sys
from typing import TypeGuard, cast

from torch import Tensor, nn


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """True if a module computes ``W x + b`` and nothing else: `nn.Linear`, or GPT-2's ``Conv1D``.

    The type guard says `nn.Linear`, but a ``Conv1D`` is none: use only its ``bias``, and :func:`weight_of`.
    """
    conv1d = _conv1d()
    if conv1d is not None and isinstance(module, conv1d):
        return type(module).forward is conv1d.forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def weight_of(linear: nn.Module) -> Tensor:
    """The weight, (d_out, d_in). ``Conv1D`` stores it transposed; then this is a view.

    >>> weight_of(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    """
    weight = cast(Tensor, linear.weight)
    return weight if isinstance(linear, nn.Linear) else weight.T


def like_linear(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the same kind as `linear`, with another weight (d_out, d_in) and bias."""
    d_out, d_in = weight.shape
    conv1d = _conv1d()
    made: nn.Module
    if conv1d is not None and isinstance(linear, conv1d):
        made = conv1d(d_out, d_in)
        made.weight = nn.Parameter(weight.T.contiguous())
    else:
        made = nn.Linear(d_in, d_out, bias=False, device="meta")
        made.weight = nn.Parameter(weight)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return made


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` everywhere in place of `old`; a shared module has several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def _conv1d() -> type[nn.Module] | None:
    # If nobody has imported this module, no model has a Conv1D.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
