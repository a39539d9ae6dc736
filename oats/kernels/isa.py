"""Instruction sets of this CPU."""

from __future__ import annotations

import os

from oats import _core
from oats.errors import ConfigError


def active_isa() -> str:
    """The instruction set that new weights are packed for: the best one, or what ``OATS_ISA`` allows.

    Raises:
        ConfigError: ``OATS_ISA`` is not a name that oats knows.
    """
    wanted = os.environ.get("OATS_ISA")
    if wanted is not None and wanted not in _core.isa_names():
        raise ConfigError(f"OATS_ISA is {wanted!r}, expected one of {', '.join(_core.isa_names())}")
    return _core.active_isa()


def available_isas() -> list[str]:
    """The instruction sets that this machine supports, from the most general to the best.

    >>> available_isas()[0]
    'scalar'
    """
    names = _core.isa_names()
    return names[: names.index(_core.best_isa()) + 1]
