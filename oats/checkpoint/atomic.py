"""Files and directories that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path


def write_file(file: Path, write: Callable[[Path], object], *, alone: bool = False) -> Path:
    """Call `write` with a hidden path, flush that file to disk, and rename it to `file`, which is returned.

    With `alone`, no other process writes this file. The hidden name is then always the same, so that this
    process overwrites what a killed one left.
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


@contextlib.contextmanager
def new_directory(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Make a hidden directory beside `out`. It gets the name `out` if the body succeeds, else it is removed.

    Also removes the hidden directories that killed processes left. Other arguments and errors are those of
    :func:`swap_in`.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "out"
    >>> with new_directory(out, overwrite=False) as hidden:
    ...     _ = (hidden / "note.txt").write_text("kept")
    >>> [file.name for file in out.iterdir()]
    ['note.txt']
    """
    hidden = out.with_name(f".{out.name}.partial-{os.getpid()}")
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(out)
    hidden.mkdir()
    try:
        yield hidden
        swap_in(hidden, out, aside, overwrite=overwrite)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def swap_in(new: Path, out: Path, aside: Path, *, overwrite: bool) -> None:
    """Flush the directory `new` to disk and give it the name `out`.

    With `overwrite`, what is at `out` moves to `aside`, which the caller removes; else there may be only an
    empty directory. A process that is killed between the two renames leaves nothing at `out`. All three are
    on one file system.

    Raises:
        OSError: `out` is not empty, or a rename failed; `out` is then as it was.
    """
    for path in [*new.rglob("*"), new]:
        flush(path)
    try:
        if overwrite and out.exists():
            out.rename(aside)
        elif out.exists():
            out.rmdir()  # fails if somebody has put something there
        new.rename(out)
        flush(out.parent)
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise


def _remove_unfinished(out: Path) -> None:
    """Remove the hidden directories of processes that are dead, and of this one."""
    prefix = f".{out.name}.partial-"
    for path in out.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdecimal() and not _is_another_process(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True
