"""Makes transformers and PEFT know OATS layers in every process of an environment that has this package.

torch calls :func:`register` at the end of ``import torch`` (entry point group ``torch.backends``). It
imports neither torch nor transformers: it only arranges that once ``transformers.quantizers.auto`` has
been imported, :mod:`oats.integrations.transformers` is imported too, which registers the format. So
``AutoModelForCausalLM.from_pretrained`` loads an OATS checkpoint without ``import oats``. PEFT gets
:mod:`oats.integrations.peft` in the same way.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns torch's entry points off; then ``import
oats.integrations.transformers`` before loading does the same.
"""

from __future__ import annotations

import importlib
import importlib.abc
import logging
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.quantizers.auto"

# Module that must have been executed → a name that it defines, and what of oats is then imported.
_INTEGRATIONS = {
    _AUTO: ("register_quantizer", "oats.integrations.transformers"),
    "peft.tuners.lora.model": ("LoraModel", "oats.integrations.peft"),
}

# `from_pretrained` lives in modeling_utils, which imports auto. auto alone would not do: where it is the
# first module to import torch, it is half executed when `register` runs and is not imported a second time.
_HOOKED = frozenset({*_INTEGRATIONS, "transformers.modeling_utils"})


def register() -> None:
    """Arrange the registration; called by torch.

    Costs well under a millisecond, may be called any number of times, and never raises: an exception
    here would break ``import torch``, and one in the hook ``import transformers``.
    """
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
    _register_if_ready()


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the other finders find a hooked module, and acts after the module has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _HOOKED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _run_after_exec(spec)
                return spec
        return None


def _run_after_exec(spec: ModuleSpec) -> None:
    loader = spec.loader
    if loader is None:
        return
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        _register_if_ready()

    # On the instance, so that the loader keeps its type and whatever else it can do (get_source, …).
    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError:
        _warn("its loader cannot be hooked")


def _register_if_ready() -> None:
    for name, (last, integration) in _INTEGRATIONS.items():
        # Defined after what the integration fills in: absent while the module is being executed.
        if not hasattr(sys.modules.get(name), last):
            continue
        try:
            importlib.import_module(integration)
        except Exception as error:
            _warn(f"{type(error).__name__}: {error}", integration)


def _warn(reason: str, integration: str = "oats.integrations.transformers") -> None:
    # Not warnings.warn(), which raises under `python -W error`.
    lost = "put adapters beside OATS layers" if integration.endswith("peft") else "load OATS checkpoints"
    logging.getLogger("oats").warning(
        "oats could not register itself with %s (%s), which will not %s in this process. `import %s` shows "
        "the whole error",
        integration.rpartition(".")[2],
        reason,
        lost,
        integration,
    )
