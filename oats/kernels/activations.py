"""How products with codes take activations where many rows meet them."""

from __future__ import annotations

from typing import Literal, get_args

from oats import _core
from oats.errors import ConfigError

Activations = Literal["exact", "int8"]


def set_activations(activations: Activations) -> None:
    """Choose how layers with codes take bf16 activations of more than 16 rows, for this process.

    Prompts are bound by arithmetic. With "int8", activations that meet the codes of S are rounded to int8,
    with a scale for each row and 64 inputs; the low-rank part takes them as before. With "exact" they become
    16-bit integers, which rounds less than bf16 does. Only CPUs with AMX have products of int8; on others,
    and for fewer rows, both are the same. What it gains and costs: docs/kernels.md.

    Args:
        activations: "exact", which is the default, or "int8".

    Raises:
        ConfigError: it is neither.

    >>> set_activations("int8")
    >>> activations()
    'int8'
    >>> set_activations("exact")
    """
    if activations not in get_args(Activations):
        raise ConfigError(f"activations are {activations!r}, expected 'exact' or 'int8'")
    _core.set_activation_codes(activations == "int8")


def activations() -> Activations:
    """What :func:`set_activations` chose."""
    return "int8" if _core.activation_codes() else "exact"
