"""A hook that makes a model's own ``save_pretrained`` work before the model is compressed.

Modules here may not import the integration of the model's library, which registers the hook at its import.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from oats.config import OatsConfig
from oats.errors import UnsupportedModelError

SavingHook = Callable[[nn.Module, OatsConfig], None]

_hook: SavingHook | None = None


def register_saving_hook(hook: SavingHook) -> None:
    """Set what :func:`prepare_saving_` calls."""
    global _hook
    _hook = hook


def prepare_saving_(model: nn.Module, config: OatsConfig) -> None:
    """Give the settings to a model that can save itself, before its first layer is replaced.

    A model whose compression was interrupted may be saved: without the settings, its checkpoint would load
    random weights.

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
