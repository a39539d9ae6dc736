"""``config.json`` of a model directory, and the ``quantization_config`` in that of a compressed model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from oats._version import __version__
from oats.config import OPTIONAL, OatsConfig, Storage
from oats.errors import ConfigError, FormatError
from oats.format.layer_spec import (
    CODES_VERSION,
    FORMAT_VERSION,
    HEAD_VERSION,
    VERSIONS,
    WIDTHS_VERSION,
)

QUANT_METHOD = "oats"
"""Its ``quant_method``."""

EMBEDDING = "embedding"
"""Key in the entry of the output head only: name of the embedding that reads its rows, or null."""

RETRY = "download the checkpoint or compress the model again"
"""How every error about a damaged checkpoint ends."""

_SETTINGS = frozenset(field.name for field in fields(OatsConfig))
_SIZES = {"rank", "nnz"}
_CODES = {"values", "low_rank", "scale_columns"}
_MASK = "mask"


def read_config(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model directory.

    Raises:
        FormatError: it is not a JSON object, or its ``quantization_config`` is not one.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}); {RETRY}") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    for what, value in (("", config), ("quantization_config ", {} if quantization is None else quantization)):
        if not isinstance(value, dict):
            raise FormatError(f"{file}: {what}is {shortened(value)}, expected a JSON object; {RETRY}")
    return config  # type: ignore[no-any-return]


def saved_class(architectures: Sequence[str] | None) -> Any:
    """The class that saved a model, by its ``architectures``; None if transformers has none of that name."""
    import transformers

    return getattr(transformers, str(next(iter(architectures or []), "")), None)


def lowest_format_version(layers: Mapping[str, Mapping[str, Any]]) -> int:
    """The lowest version of the format that can describe `layers`; see :func:`quantization_dict`."""
    if any(
        _MASK in sizes or Storage.from_dict(sizes).values in ("int3", "int2") for sizes in layers.values()
    ):
        return WIDTHS_VERSION
    if any(EMBEDDING in sizes for sizes in layers.values()):
        return HEAD_VERSION
    has_codes = any("scale_columns" in sizes for sizes in layers.values())
    return CODES_VERSION if has_codes else FORMAT_VERSION


def quantization_dict(settings: OatsConfig, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``quantization_config`` of a compressed model, as a JSON object.

    Args:
        settings: of the compression run.
        layers: name of each compressed layer → its ``rank`` and ``nnz``; if it has codes, also the fields of
            its :class:`~oats.config.Storage`; for the output head also `EMBEDDING`.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": lowest_format_version(layers),
        **settings.to_dict(),
        "layers": {name: dict(sizes) for name, sizes in layers.items()},
    }


def parse_quantization_config(
    quantization: Mapping[str, Any], origin: str = "config.json"
) -> tuple[OatsConfig, dict[str, dict[str, Any]]]:
    """Read what :func:`quantization_dict` gave: the settings and the layers. `origin` is named in errors.

    Raises:
        FormatError: an unsupported format version, an unknown or missing key, or a bad value.
    """
    origin += ": quantization_config"
    given = dict(quantization)
    given.pop("quant_method", None)
    version = given.pop("format_version", None)
    if type(version) is not int or version not in VERSIONS:
        raise FormatError(
            f"{origin}.format_version is {shortened(version)}, but oats-torch {__version__} reads versions "
            f"{VERSIONS[0]} to {VERSIONS[-1]} only; for a newer version upgrade with "
            "`pip install -U oats-torch`"
        )
    expected = _SETTINGS | {"layers"}
    problems = {"unknown": given.keys() - expected, "missing": expected - OPTIONAL - given.keys()}
    for problem, keys in problems.items():
        if keys:
            raise FormatError(
                f"{origin} has {problem} keys {sorted(keys)}; the file was edited or damaged, {RETRY}"
            )
    layers = given.pop("layers")
    if not isinstance(layers, dict):
        raise FormatError(f"{origin}.layers is {shortened(layers)}, expected an object; {RETRY}")
    heads = [name for name, sizes in layers.items() if isinstance(sizes, dict) and EMBEDDING in sizes]
    for name, sizes in layers.items():
        if (
            not isinstance(sizes, dict)
            or not _may_hold(version, sizes)
            or any(type(sizes[size]) is not int or sizes[size] < 0 for size in _SIZES)
            or not isinstance(sizes.get(EMBEDDING), str | None)
        ):
            raise FormatError(
                f"{origin}.layers[{name!r}] is {shortened(sizes)}, expected "
                f'{{"rank": a whole number, "nnz": a whole number}}; {RETRY}'
            )
        if name in heads and (sizes["rank"] > 0 or len(heads) > 1):
            raise FormatError(
                f"{origin}.layers[{name!r}] is {shortened(sizes)}, but only the output head has an "
                f"{EMBEDDING}, and rank 0; {RETRY}"
            )
        try:
            Storage.from_dict(sizes)
        except ConfigError as error:
            raise FormatError(f"{origin}.layers[{name!r}]: {error}; {RETRY}") from error
    try:
        return OatsConfig(**given), layers
    except (ConfigError, TypeError, OverflowError) as error:
        raise FormatError(f"{origin}: {error}; {RETRY}") from error


def _may_hold(version: int, sizes: Mapping[str, Any]) -> bool:
    """True if an entry of `layers` has the keys and the codes that this version of the format knows."""
    more = sizes.keys() - _SIZES
    known = [set(), _CODES, _CODES | {EMBEDDING}, _CODES | {EMBEDDING, _MASK}][version - 1]
    of_codes = more & _CODES
    return (
        sizes.keys() >= _SIZES
        and more <= known
        and of_codes in (set(), _CODES)
        and (EMBEDDING not in more or bool(of_codes))
        and (version >= WIDTHS_VERSION or sizes.get("values") not in ("int3", "int2"))
    )


def shortened(value: object) -> str:
    """A value for a message, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
