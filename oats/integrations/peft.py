"""LoRA adapters (PEFT) beside compressed layers.

Importing this module lets PEFT put LoRA beside a :class:`~oats.nn.SparseLowRankLinear`; if torch's entry
points are on, that happens by itself when PEFT is imported (:mod:`oats._autoload`). ``get_peft_model``,
``PeftModel.from_pretrained``, ``model.add_adapter`` and ``target_modules="all-linear"`` then work as on a
dense model.

``y = S x + U (V x) + b + scaling · B (A x)``: gradients reach A, B and the input; S, U and V are fixed. So
everything that would change the weight is refused: merging an adapter, and initialisations that subtract
from the weight (PiSSA, OLoRA, …). Call ``model.dequantize()`` before adding an adapter that you want to
merge.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import layer as lora
from peft.tuners.lora import model as lora_model
from torch import nn

from oats.checkpoint.layer_table import replacements
from oats.errors import ConfigError
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear

INITIALISATIONS = (True, False, "gaussian")
"""Values of ``init_lora_weights`` that do not change the weight."""


class SparseLowRankLoraLinear(lora.Linear):
    """A compressed layer with LoRA adapters; made by PEFT.

    Raises:
        ConfigError: the adapter reads or changes the weight: DoRA and other variants, some initialisations.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only: other variants read the weight at every step."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; called by PEFT."""
        if config.init_lora_weights not in INITIALISATIONS:
            raise ConfigError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight, and a compressed one is "
                'fixed; choose True, False or "gaussian"'
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """Refuse variants of LoRA."""
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise ConfigError(
                f"a compressed layer takes plain LoRA only ({error}); turn the variant off"
            ) from error

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: a sum of S + U V and another matrix has neither the sparsity nor the rank."""
        raise ConfigError(
            "an adapter cannot be merged into a compressed layer, whose weight is fixed; keep it beside the "
            "model, or call model.dequantize() before adding it"
        )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        # PEFT would ask for `weight`, which is computed at each access.
        layer = next(m for m in base_layer.modules() if isinstance(m, SparseLowRankLinear))
        return torch.device("cpu"), layer.dtype


def _register() -> None:
    """Make PEFT know compressed layers; does nothing the second time."""
    create_new_module = lora_model.LoraModel._create_new_module
    if getattr(create_new_module, "_knows_oats", False):
        return
    replace_module = lora_model.LoraModel._replace_module
    all_linear = tuners_utils._maybe_include_all_linear_layers

    # A dispatcher of our own in PEFT's list would come too late: those before it ask for `weight`, which is
    # computed at each access.
    @functools.wraps(create_new_module)
    def create(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, tuners_utils.BaseTunerLayer) else target
        if isinstance(base, (SparseLowRankLinear, SplitLinear)):
            return SparseLowRankLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        return create_new_module(lora_config, adapter_name, target, **kwargs)  # type: ignore[no-any-return]

    @functools.wraps(replace_module)
    def replace(
        self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(new_module, SparseLowRankLoraLinear):
            setattr(parent, child_name, new_module)  # its adapter is on the CPU already, like the layer
        else:
            replace_module(self, parent, child_name, new_module, child)

    @functools.wraps(all_linear)
    def include_all_linear_layers(config: Any, model: nn.Module) -> Any:
        asked = getattr(config, "target_modules", None)
        config = all_linear(config, model)
        if isinstance(asked, str) and config.target_modules != asked:
            config.target_modules |= replacements(model).keys()
        return config

    create._knows_oats = True  # type: ignore[attr-defined]
    lora_model.LoraModel._create_new_module = staticmethod(create)
    lora_model.LoraModel._replace_module = replace
    tuners_utils._maybe_include_all_linear_layers = include_all_linear_layers


_register()
