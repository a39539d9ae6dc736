"""Replaces the forward of modules whose bytecode we know by a fused one.

Each module becomes an instance of a subclass of its class. Its name, parameters and hooks stay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


def same_code(function: object, known: Forward) -> bool:
    """True if a function has the same bytecode, names and constants as `known`.

    >>> same_code(lambda x: x + 1, lambda y: y + 1), same_code(lambda x: x + 1, lambda x: x + 2)
    (True, False)
    """
    return hasattr(function, "__code__") and _code(function) == _code(known)


def _code(function: Any) -> tuple[object, ...]:
    code = function.__code__
    consts = [c for c in code.co_consts if c is not None and c != function.__doc__]
    return code.co_code, code.co_names, consts


def set_forward_(module: nn.Module, forward: Forward) -> None:
    """Give a module another ``forward``; :func:`known_class` still finds the old one.

    `forward` takes the module first; pickle must find it by its name.
    """
    module.__class__ = _with_forward(type(module), forward)  # type: ignore[arg-type]


def restore_forward_(module: nn.Module) -> None:
    """Undo :func:`set_forward_`; leave any other module as it is."""
    if "_known_class" in type(module).__dict__:
        module.__class__ = known_class(module)


def known_class(module: nn.Module) -> Any:
    """The class that a module had before :func:`set_forward_`."""
    # Not type(module).__base__: other libraries may have made a subclass of ours.
    return module._known_class


@functools.cache
def _with_forward(kind: type[nn.Module], forward: Forward) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # pickle finds a class by its name, and by this name it would find `kind`.
        return (_restore, (kind, forward), *kind.__reduce_ex__(self, protocol)[2:])

    # With the name, signature and docstring of what it replaces.
    @functools.wraps(kind.forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), {**body, "forward": replaced, "_known_class": kind})


def _restore(kind: type[nn.Module], forward: Forward) -> nn.Module:
    subclass = _with_forward(kind, forward)  # type: ignore[arg-type]
    return subclass.__new__(subclass)
