"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_file(file: Path, write: Callable[[Path], object], *, alone: bool = False) -> Path:
    """Write a file under a hidden name, flush it to disk, and rename it.

    Args:
        file: its name in the end.
        write: called with the path to write to.
        alone: no other process writes this file. The hidden name is then always the same, so that this
            process overwrites what a killed one left.

    Returns:
        `file`.
    """
    owner = "" if alone else f"-{os.getpid()}"
    partial = file.with_name(f".{file.name}.partial{owner}")
    try:
        write(partial)
        flush(partial)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(file.parent)
    return file


def write_text(file: Path, text: str, *, alone: bool = False) -> Path:
    """Like :func:`write_file`, for a text in UTF-8.

    >>> import tempfile
    >>> write_text(Path(tempfile.mkdtemp()) / "note.txt", "kept").read_text()
    'kept'
    """
    return write_file(file, lambda partial: partial.write_text(text, encoding="utf-8"), alone=alone)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
