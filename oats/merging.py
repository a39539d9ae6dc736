"""One call of the kernels for the projections that read the same input: q, k and v; gate and up."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from oats import ops
from oats.models.linear import read_together
from oats.nn import SparseLowRankLinear, projections_of


def merge_projections_(model: nn.Module) -> None:
    """Let the attentions and gated MLPs that oats knows compute their input projections in one call.

    The modules of a model stay what they are: names, parameters, hooks, and what they return, bit for bit.
    Each gets a subclass of its class, which computes the projections first and runs the class's own
    ``forward`` with the results in the place of the projections. The results live as long as that call and
    are known to it alone. A projection that is asked for anything else than the input that was multiplied
    computes it; all do where :func:`oats.nn.projections_of` finds a reason to call them one by one.

    Args:
        model: changed in place; what oats does not know, or has not compressed, is left alone.
    """
    for module in model.modules():
        names = read_together(type(module))
        layers = [module._modules.get(name) for name in names]
        if layers and all(isinstance(layer, SparseLowRankLinear) for layer in layers):
            module.__class__ = _merged(type(module))  # type: ignore[arg-type]


@functools.cache
def _merged(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `kind`; of itself where it is one."""
    if "merged_from" in kind.__dict__:
        return kind
    names = read_together(kind)
    first = next(name for name in inspect.signature(kind.forward).parameters if name != "self")

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get(first)
        layers = [self._modules[name] for name in names]
        projections = projections_of(layers, x) if isinstance(x, Tensor) else None
        if x is None or projections is None:
            return kind.forward(self, *args, **kwargs)
        # All of the module but its projections, for this call only: nothing is left behind, whatever happens.
        view = kind.__new__(kind)
        view.__dict__.update(self.__dict__)
        view.__dict__.update(
            (name, _once(layer, x, y))
            for name, layer, y in zip(names, layers, ops.linear_many(x, projections), strict=True)
        )
        return kind.forward(view, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class has no name that pickle could find.
        return (_restore, (kind,), *kind.__reduce_ex__(self, protocol)[2:])

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__, "merged_from": kind}
    merged = type(kind.__name__, (kind,), body)
    merged.__qualname__ = kind.__qualname__
    return merged


def _once(layer: nn.Module | None, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """`layer`, which has computed `y` from `x` and gives it away at the first call."""
    computed = [y]

    def project(given: Tensor) -> Tensor:
        return computed.pop() if computed and given is x else layer(given)  # type: ignore[misc]

    return project


def _restore(kind: type[nn.Module]) -> nn.Module:
    merged = _merged(kind)  # type: ignore[arg-type]
    return merged.__new__(merged)
