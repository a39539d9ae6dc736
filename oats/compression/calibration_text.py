"""The texts that models are calibrated and evaluated on."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oats.errors import CalibrationError


@dataclass(frozen=True)
class Text:
    """A text, and where it is from.

    Attributes:
        content: the text itself.
        name: of the whole that `content` is from, such as a path.
        split: which part of that whole `content` is.
    """

    content: str
    name: str
    split: str

    @property
    def sha256(self) -> str:
        """The first 12 digits of the SHA-256 of the content."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """What identifies the text, as plain JSON values."""
        characters = len(self.content)
        return {"text": self.name, "split": self.split, "characters": characters, "sha256": self.sha256}

    def identity(self) -> dict[str, Any]:
        """What identifies the text in a saved model: without its path on this machine."""
        return {"text": Path(self.name).name, "split": self.split, "sha256": self.sha256}


def builtin_text(half: Literal["first", "second"]) -> Text:
    """Half of ``pydoc_data.topics``: English prose about Python, in every CPython.

    Models are calibrated on the first half and evaluated on the second. The text differs between versions of
    Python, so its name holds the version.

    >>> builtin_text("second").split
    'second half'
    """
    from pydoc_data.topics import topics

    content = "\n\n".join(topics.values())
    middle = len(content) // 2
    part = content[:middle] if half == "first" else content[middle:]
    return Text(part, f"pydoc_data.topics (Python {platform.python_version()})", f"{half} half")


def calibration_text(path: str | Path | None) -> Text:
    """The text of a file, as :func:`read_text` reads it; for None the first half of the built-in one."""
    return builtin_text("first") if path is None else read_text(path)


def read_text(path: str | Path) -> Text:
    """Read a UTF-8 text file.

    Raises:
        CalibrationError: the file cannot be read, is not UTF-8, or holds nothing but white space.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text file {path}: {error.strerror}") from error
    if not content.strip():
        raise CalibrationError(f"the text file {path} is empty; give one with text in it")
    return Text(content, str(path), "whole file")
