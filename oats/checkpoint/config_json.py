"""``config.json`` of a model directory, and the class of transformers that it names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oats.checkpoint.quantization_config import RETRY, shortened
from oats.errors import FormatError


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
    """The class that saved a model; None if transformers has no class of that name.

    Args:
        architectures: of ``config.json``.
    """
    import transformers

    return getattr(transformers, str(next(iter(architectures or []), "")), None)
