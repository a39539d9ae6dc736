"""What must be told that a model is about to be compressed, so that its own ``save_pretrained`` works.

The library that a model comes from is above this package: its integration registers a hook here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from oats.config import OatsConfig
from oats.errors import UnsupportedModelError

SavingHook = Callable[[nn.Module, OatsConfig], None]

_hook: SavingHook | None = None


def register_saving_hook(hook: SavingHook) -> None:
    """Set what :func:`prepare_saving_` calls; :mod:`oats.integrations.transformers` does at import."""
    global _hook
    _hook = hook


def prepare_saving_(model: nn.Module, config: OatsConfig) -> None:
    """Tell a model that can save itself of the settings, before its first layer is replaced.

    A compression may be interrupted, and a checkpoint that was saved without this would load random weights.

    Raises:
        UnsupportedModelError: the model can save itself, and no hook is registered.
    """
    if not hasattr(model, "save_pretrained"):
        return
    if _hook is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has save_pretrained, which does not know compressed layers yet; "
            "`import oats.integrations.transformers` before compressing it"
        )
    _hook(model, config)
