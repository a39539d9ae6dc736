"""Makes transformers and PEFT know OATS layers in each process, without ``import oats``.

torch calls :func:`register` at the end of ``import torch`` (entry point group ``torch.backends``). It
imports neither torch nor transformers. It installs an import hook: after
``transformers.quantizers.auto`` the hook imports :mod:`oats.integrations.transformers`, which registers the
format; after PEFT's LoRA it imports :mod:`oats.integrations.peft`.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns torch's entry points off. Then ``import oats`` or ``import
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

# Hooked module → the last name that it defines, and the module of oats that is imported after it.
_INTEGRATIONS = {
    "transformers.quantizers.auto": ("register_quantizer", "oats.integrations.transformers"),
    "peft.tuners.lora.model": ("LoraModel", "oats.integrations.peft"),
}

# auto alone is not enough: if it is the first module to import torch, it is half executed when `register`
# runs, and the hook misses it. modeling_utils, which has `from_pretrained`, is executed after auto.
_HOOKED = frozenset({*_INTEGRATIONS, "transformers.modeling_utils"})


def register() -> None:
    """Install the hook; called by torch.

    Takes much less than a millisecond and may be called again. It never raises: an exception here would
    break ``import torch``, and one in the hook would break ``import transformers``.
    """
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())
    _register_if_ready()


class _Hook(importlib.abc.MetaPathFinder):
    """Finds hooked modules with the other finders, and registers after they have been executed."""

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

    # Set on the instance, so that the loader keeps its type and its other methods (get_source, …).
    try:
        loader.exec_module = exec_module  # type: ignore[method-assign]
    except AttributeError:
        _warn("its loader cannot be hooked")


def _register_if_ready() -> None:
    for name, (last, integration) in _INTEGRATIONS.items():
        # Without its last name, the module is not imported or still being executed.
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
