"""Saves a model that is in memory to a directory, as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from oats.checkpoint.atomic import new_directory
from oats.checkpoint.companions import copy_companions
from oats.checkpoint.model_card import write_model_card
from oats.checkpoint.record import Record
from oats.compression.report import CompressionReport
from oats.errors import FormatError, OatsError, OutputExistsError, first_line


def check_output(out: str | Path, *, overwrite: bool = False, source: str | Path | None = None) -> Path:
    """Check an output directory before the long work starts.

    Args:
        out: where the result will go.
        overwrite: a model that is already there may be replaced.
        source: the model that will be read; `out` must not contain it.

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

    The files go to a hidden directory beside `out`, are flushed to disk, and then the directory gets its
    name. A killed run leaves `out` as it was, with one exception: to overwrite takes two renames, and between
    them the old model is at ``.OUT.replaced-<pid>`` and nothing is at `out`. The next run with the same `out`
    removes the hidden directory of a killed one.

    Args:
        model: a ``PreTrainedModel``.
        tokenizer: None if the model has none.
        out: the directory.
        overwrite: replace a model that is already at `out`.
        report: of the compression; each layer's error goes to the record (``oats_report.json``).
        record: of a model that was compressed earlier, for which there is no `report`.
        known: more for the model card, see :func:`oats.checkpoint.model_card.write_model_card`. If `source`
            is a local directory, its files for image processors and sentence-transformers are copied.

    Raises:
        OutputExistsError: `out` is in use, see :func:`check_output`.
        OatsError: the files cannot be written.
    """
    out = check_output(out, overwrite=overwrite)
    try:
        with new_directory(out, overwrite=overwrite) as hidden:
            model.save_pretrained(hidden)
            if tokenizer is not None:
                tokenizer.save_pretrained(hidden)
            if "source" in known:
                copy_companions(known["source"], hidden)
            if report is not None or getattr(model, "quantization_method", None) == "oats":
                if record is not None:
                    record.write(hidden)
                # A model class that transformers does not have may rename layers in files. Headers then do
                # not tell which tensors belong to which layer, and the model gets no card.
                with contextlib.suppress(FormatError):
                    write_model_card(hidden, report, name=out.name, **known)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OatsError(f"cannot write {out}: {reason}; nothing was changed there") from error
    return out
