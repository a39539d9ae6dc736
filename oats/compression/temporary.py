"""Changes to a model that last as long as a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward function of one module."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and no key-value cache: a cache would hold the keys of every block at once."""
    training = [module for module in model.modules() if module.training]
    configuration = getattr(model, "config", None)
    use_cache = getattr(configuration, "use_cache", None)
    model.eval()
    if use_cache is not None:
        configuration.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if use_cache is not None:
            configuration.use_cache = use_cache  # type: ignore[union-attr]
