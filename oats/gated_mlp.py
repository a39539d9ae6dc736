"""Gated MLPs, ``down(act(gate(x)) * up(x))``, that compute gate and up in one call of the kernels."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from oats import ops
from oats.nn import SparseLowRankLinear, projections_of


def merge_gated_mlps_(model: nn.Module) -> None:
    """Let the compressed gated MLPs of a model read their input once.

    They stay what they are: names, parameters, hooks, and what they return, bit for bit. Each gets a subclass
    of its class, whose ``forward`` computes gate and up together where :func:`oats.nn.projections_of` allows
    it, and is that of the class elsewhere. Nothing is kept from one call to the next.

    Args:
        model: changed in place; only where a module's ``forward`` is, instruction by instruction, that of
            transformers' Llama and its many relatives.
    """
    for module in model.modules():
        gate, up = (module._modules.get(name) for name in ("gate_proj", "up_proj"))
        if (
            isinstance(gate, SparseLowRankLinear)
            and isinstance(up, SparseLowRankLinear)
            and _is_gated_mlp(type(module))
        ):
            module.__class__ = _merged(type(module))  # type: ignore[arg-type]


def _is_gated_mlp(kind: type[nn.Module]) -> bool:
    code, known = getattr(kind.forward, "__code__", None), _forward.__code__
    return code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)


def _forward(self: Any, x: Tensor) -> Tensor:
    # Written as transformers' classes have it: a class is known by the code of its forward.
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # type: ignore[no-any-return]


@functools.cache
def _merged(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `kind`."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        modules: dict[str, Any] = self._modules
        projections = projections_of((modules["gate_proj"], modules["up_proj"]), x)
        if projections is None:
            return kind.forward(self, x)  # type: ignore[no-any-return]
        gate, up = ops.linear_many(x, projections)
        return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return, operator]

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, and this one has the name of another.
        return (_restore, (kind,), *kind.__reduce_ex__(self, protocol)[2:])

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {**body, "forward": forward, "__reduce_ex__": reduce})


def _restore(kind: type[nn.Module]) -> nn.Module:
    merged = _merged(kind)  # type: ignore[arg-type]
    return merged.__new__(merged)
