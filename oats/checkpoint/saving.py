"""Saving a model so that only a finished directory has the name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats.checkpoint.atomic_file import flush
from oats.errors import FormatError, OatsError, OutputExistsError

if TYPE_CHECKING:
    from oats.checkpoint.record import Record
    from oats.compression.report import CompressionReport

from oats.checkpoint.loading import _first_line


def check_output(out: str | Path, *, overwrite: bool = False, source: str | Path | None = None) -> Path:
    """Refuse an output directory before the long work rather than after it.

    Args:
        out: where the result shall go.
        overwrite: whether a model that is already there may be replaced.
        source: the model that is being read; `out` must not contain it.

    Returns:
        The resolved path.

    Raises:
        OutputExistsError: `out` is in use, or cannot be written.
    """
    out = Path(out).resolve()
    if source is not None and Path(source).exists():
        model = Path(source).resolve()
        if out == model or out in model.parents:
            raise OutputExistsError(f"the output directory {out} holds the model itself; choose another")
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"the output {out} is a file; choose a directory")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputExistsError(
                f"the output directory {out} is not empty; choose another, or overwrite it (--overwrite)"
            )
        if not (out / "config.json").is_file():
            raise OutputExistsError(
                f"the output directory {out} holds files but no model (no config.json), so it is not "
                "overwritten; choose another, or empty it yourself"
            )
    existing = next(parent for parent in out.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputExistsError(f"the output directory {out} cannot be made: {existing} is not writable")
    return out


def save_model(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    overwrite: bool = False,
    report: CompressionReport | None = None,
    record: Record | None = None,
    **known: Any,
) -> Path:
    """Save a model and its tokenizer as a Hugging Face directory, with a model card, all or nothing.

    The files are written to a hidden directory beside `out` and flushed to disk, which then gets the name.
    A run that is killed leaves `out` as it was, with one exception: to overwrite takes two renames, and
    between them the old model is at ``.OUT.replaced-<pid>`` and nothing at `out`. What a killed run left
    of its own files is removed by the next one with the same `out`.

    Args:
        overwrite: replace a model that is already at `out`.
        report: of the compression, whose errors are kept beside the weights.
        record: what is known without a report, of a model that was compressed before.
        known: what else the model card says, see :func:`oats.checkpoint.model_card.write_model_card`. From
            a local directory `source`, files for image processors and sentence-transformers are copied.

    Raises:
        OutputExistsError: `out` is in use, see :func:`check_output`.
        OatsError: the files cannot be written.
    """
    from safetensors import SafetensorError

    from oats.checkpoint.companions import copy_companions
    from oats.checkpoint.model_card import write_model_card

    out = check_output(out, overwrite=overwrite)
    try:
        with _new_directory(out, overwrite) as partial:
            model.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            if "source" in known:
                copy_companions(known["source"], partial)
            if report is not None or getattr(model, "quantization_method", None) == "oats":
                if record is not None:
                    record.write(partial)
                # Where a class that transformers does not have gives layers other names in files, headers
                # do not tell which tensors are whose, and the card is left out.
                with contextlib.suppress(FormatError):
                    write_model_card(partial, report, name=out.name, **known)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise OatsError(f"cannot write {out}: {reason}; nothing was changed there") from error
    return out


@contextlib.contextmanager
def _new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `out` that gets its name if the body succeeds, and is removed if not."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    aside = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(out)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            flush(path)
        if overwrite and out.exists():
            out.rename(aside)
        elif out.exists():
            out.rmdir()  # fails if something was put there since it was checked
        partial.rename(out)
        flush(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_partial(out: Path) -> None:
    """Remove what runs that are no longer alive, or this process, left unfinished beside `out`."""
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
        pass  # somebody else's
    return True
