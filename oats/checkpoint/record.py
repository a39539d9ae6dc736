"""``oats_report.json``: what a compression run found out, kept beside the weights that it made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oats._version import __version__
from oats.checkpoint.atomic_file import write_text
from oats.config import Storage
from oats.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from oats.compression.report import CompressionReport

RECORD_FILE = "oats_report.json"
RECORD_VERSION = 1


@dataclass
class Record:
    """What is known of a compressed model beyond its weights and ``config.json``. No reader needs it.

    Attributes:
        source: the dense model: a hub name, or the last part of a path.
        calibration: what identifies the calibration data, for people; {} where it is not known.
        seconds: that the compression took; None where it is not known.
        errors: layer → relative error of its output on the calibration data, in the metric of the method,
            before its numbers became codes.
        left_dense: weight of a transformer block that was not compressed → why.
        matched: block → loss before and after it was matched (:mod:`oats.compression.matching`).
        evaluations: results of ``oats eval --save``, each with its settings.
        quantizations: what ``oats quantize`` did since, in turn; see :meth:`quantized`.
        software: name → version of what computed it.
    """

    source: str | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    left_dense: dict[str, str] = field(default_factory=dict)
    matched: dict[str, list[float]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    quantizations: list[dict[str, Any]] = field(default_factory=list)
    software: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        report: CompressionReport,
        *,
        source: str | Path | None = None,
        calibration: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> Record:
        """Take what is worth keeping from the report of :func:`oats.compress_`.

        Args:
            report: of the run.
            source: the dense model; of a path only the last part is kept.
            calibration: what identifies the calibration data, as plain JSON values.
            seconds: of the whole run; None means the sum over the layers.
        """
        if source is not None:
            source = Path(source).resolve().name if Path(source).exists() else str(source)
        return cls(
            source=source,
            calibration=dict(calibration or {}),
            seconds=sum(layer.seconds for layer in report.layers) if seconds is None else seconds,
            errors={layer.name: layer.relative_error for layer in report.layers},
            left_dense=dict(report.left_dense),
            matched={block: list(losses) for block, losses in report.matched.items()},
            software={"oats-torch": __version__, "torch": torch.__version__},
        )

    @classmethod
    def read(cls, directory: str | Path) -> Record | None:
        """The record of a model directory; None where it has none.

        Raises:
            FormatError: the file is not one.
        """
        file = Path(directory) / RECORD_FILE
        if not file.is_file():
            return None
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            if given.pop("version") != RECORD_VERSION:
                raise ValueError(f"its version is not {RECORD_VERSION}")
            record = cls(**given)
            if not all(math.isfinite(error) for error in record.errors.values()):
                raise ValueError("an error is not a finite number")
            for name in ("calibration", "errors", "left_dense", "matched", "software"):
                dict(getattr(record, name))
            for quantization in record.quantizations:
                Storage(**quantization["storage"])
                dict(quantization["calibration"])
                if not all(math.isfinite(error) for error in quantization["errors"].values()):
                    raise ValueError("an error of codes is not a finite number")
            return record
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
            raise FormatError(
                f"{file} cannot be read ({error}); it is not needed to use the model, so it can be deleted"
            ) from error

    def write(self, directory: str | Path) -> Path:
        """Write the record into a model directory, all or nothing."""
        text = json.dumps({"version": RECORD_VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        return write_text(Path(directory) / RECORD_FILE, text + "\n")

    def errors_of(self, stored: Sequence[str]) -> dict[str, float]:
        """Layer of a saved model → its error, for those that are known.

        The names may differ by a prefix: a base model was compressed and saved with its head, or the reverse.

        >>> Record(errors={"layers.0.up": 0.1}).errors_of(["model.layers.0.up", "model.layers.1.up"])
        {'model.layers.0.up': 0.1}
        """
        errors = {}
        for name in stored:
            error = self.errors.get(name)
            if error is None:
                same = (e for k, e in self.errors.items() if name.endswith(f".{k}") or k.endswith(f".{name}"))
                error = next(same, None)
            if error is not None:
                errors[name] = error
        return errors

    def quantized(
        self, storage: Storage, errors: Mapping[str, float], calibration: Mapping[str, Any] | None = None
    ) -> Record:
        """The record of what :func:`oats.quantize_` makes of this model; it loses this one's evaluations.

        Args:
            storage: how its numbers are stored now.
            errors: layer → how far that moved its output on the calibration data, for those that are known.
            calibration: what identifies that data; None where there was none.
        """
        step = {"storage": asdict(storage), "calibration": dict(calibration or {}), "errors": dict(errors)}
        return replace(self, evaluations=[], quantizations=[*self.quantizations, step])

    def errors_were_taken(self, has_codes: bool) -> str:
        """What happened to the model since its errors were known, to be said behind them; "" for nothing.

        Args:
            has_codes: whether numbers of it are stored as codes.

        >>> Record(matched={"layers.0": [0.2, 0.1]}).errors_were_taken(has_codes=True)
        ', before blocks were matched and numbers became codes'
        """
        since = ["blocks were matched"] * bool(self.matched)
        since += ["numbers became codes"] * (has_codes or bool(self.quantizations))
        return ", before " + " and ".join(since) if since else ""

    def quantizations_in_words(self) -> list[str]:
        """How each ``oats quantize`` stored the numbers, and what it fitted them on."""
        words = []
        for step in self.quantizations:
            stored = storage_in_words(Storage(**step["storage"]))
            words.append(f"{stored}; {in_words(step['calibration']) or 'no calibration'}")
        return words

    def add_evaluation(self, result: Mapping[str, Any]) -> None:
        """Add a perplexity with its settings, in the place of an earlier one with the same settings."""
        measured = {"perplexity", "nll", "accuracy", "seconds", "threads"}

        def settings(evaluation: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in evaluation.items() if name not in measured}

        others = [entry for entry in self.evaluations if settings(entry) != settings(result)]
        self.evaluations = [*others, dict(result)]


def in_words(settings: Mapping[str, Any]) -> str:
    """Names and values on one line.

    >>> in_words({"samples": 64, "length": 512})
    'samples 64, length 512'
    """
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def storage_in_words(storage: Storage) -> str:
    """How the numbers of a layer are stored, for people.

    >>> storage_in_words(Storage("int4", "int8", 128))
    'kept values int4, low-rank factors int8, a scale for 128 columns of a row'
    """
    if not storage.has_codes:
        return "all exact"
    return (
        f"kept values {storage.values}, low-rank factors {storage.low_rank}, "
        f"a scale for {storage.scale_columns} columns of a row"
    )
