"""The kinds of linear layer, and those that compute several projections at once."""

from __future__ import annotations

import sys
from typing import TypeGuard, cast

from torch import Tensor, nn

FUSED = ("qkv_proj", "gate_up_proj")
"""Names of the layers that compute several projections, see :func:`fused_outputs`."""

_QUERY_KEY_VALUE = frozenset({"Phi3Attention", "Phi4MultimodalAttention"})
_GATE_UP = frozenset({"Phi3MLP", "Phi4MultimodalMLP", "GlmMLP", "Glm4MLP"})


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes ``W x + b`` and nothing else: `nn.Linear`, or GPT-2's ``Conv1D``.

    ``Conv1D`` is not an `nn.Linear`: use :func:`weight_of`, and of the rest only ``bias``.
    """
    conv1d = _conv1d()
    if conv1d is not None and isinstance(module, conv1d):
        return type(module).forward is conv1d.forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def weight_of(linear: nn.Module) -> Tensor:
    """The weight, (d_out, d_in); a view where the layer keeps it transposed.

    >>> weight_of(nn.Linear(3, 2)).shape
    torch.Size([2, 3])
    """
    weight = cast(Tensor, linear.weight)
    return weight if isinstance(linear, nn.Linear) else weight.T


def like_linear(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the kind of `linear`, with another weight (d_out, d_in) and bias."""
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


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings of a language model of transformers; None where a model has none."""
    get = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = None if get is None else get()
    return head


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model has `old`, which may be under several names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def fused_outputs(owner: nn.Module | None, name: str) -> dict[str, int]:
    """The projections that one linear layer computes together.

    Args:
        owner: the module that has the layer.
        name: of the layer in it.

    Returns:
        Name of each projection → its number of outputs, in the order of the layer's; empty for a layer that
        computes one.
    """
    kind = type(owner).__name__
    linear = getattr(owner, name, None)
    if linear is None:
        return {}
    d_out = getattr(linear, "out_features", 0)
    if name == "qkv_proj" and kind in _QUERY_KEY_VALUE:
        key = cast(int, owner.num_key_value_heads * owner.head_dim)  # type: ignore[union-attr, operator]
        return {"q": d_out - 2 * key, "k": key, "v": key}
    if name == "gate_up_proj" and kind in _GATE_UP:
        return {"gate": d_out // 2, "up": d_out // 2}
    return {}


def _conv1d() -> type[nn.Module] | None:
    # Where nothing has imported it, no model has one.
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
