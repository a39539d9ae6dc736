"""The record, ``oats_report.json``, for programs: errors, calibration and evaluations of a compressed model.

``oats info``, ``oats report`` and the model card (:mod:`oats.checkpoint.model_card`) show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from oats._version import __version__
from oats.checkpoint.atomic import write_text
from oats.compression.report import CompressionReport
from oats.config import Storage
from oats.errors import ConfigError, FormatError

RECORD_FILE = "oats_report.json"
RECORD_VERSION = 1


@dataclass
class Record:
    """What is known about a compressed model beside its weights and ``config.json``. Loading ignores it.

    Attributes:
        source: the dense model: a hub name, or the last part of a path.
        calibration: describes the calibration data; {} if unknown.
        seconds: duration of the compression; None if unknown.
        errors: layer → relative error of its output on the calibration data, in the metric of the method,
            before its numbers became codes.
        left_dense: weight in a transformer block that was not compressed → why.
        matched: block → loss before and after it was matched (:mod:`oats.compression.matching`).
        evaluations: results of ``oats eval --save``, each with its settings.
        quantizations: one entry for each later ``oats quantize``, in order; see :meth:`quantized`.
        software: package → version that compressed the model.
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
        """Make the record of one compression.

        Args:
            report: of :func:`oats.compress_`.
            source: the dense model; only the last part of a path is kept.
            calibration: describes the calibration data, in plain JSON values.
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
        """Read the record in a model directory; None if there is none.

        Raises:
            FormatError: the file is damaged.
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
        """Layer → its error, for those of the layers `stored` whose error is known.

        Names may differ by a prefix: a base model was compressed and saved with its head, or the reverse.

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
        """The record of the model after :func:`oats.quantize_`. Evaluations of other weights are dropped.

        `storage` is how its numbers are stored now; `errors` is the relative change of each layer's output on
        the data that `calibration` describes, if known.
        """
        numbers = {
            "values": storage.values,
            "low_rank": storage.low_rank,
            "scale_columns": storage.scale_columns,
        }
        step = {"storage": numbers, "calibration": dict(calibration or {}), "errors": dict(errors)}
        return replace(self, evaluations=[], quantizations=[*self.quantizations, step])

    def errors_were_taken(self, has_codes: bool) -> str:
        """What changed the model after its errors were measured, as words to append; "" if nothing did.

        >>> Record(matched={"layers.0": [0.2, 0.1]}).errors_were_taken(has_codes=True)
        ', before blocks were matched and numbers became codes'
        """
        since = ["blocks were matched"] * bool(self.matched)
        since += ["numbers became codes"] * (has_codes or bool(self.quantizations))
        return ", before " + " and ".join(since) if since else ""

    def quantizations_in_words(self) -> list[str]:
        """One line for each ``oats quantize``: how it stored the numbers, and its calibration data."""
        return [
            f"{storage_in_words(Storage(**step['storage']))}; "
            + (in_words(step["calibration"]) or "no calibration")
            for step in self.quantizations
        ]

    def add_evaluation(self, result: Mapping[str, Any]) -> None:
        """Add a perplexity with its settings; it replaces an earlier one with the same settings."""
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
    """How the numbers of a layer are stored, in words.

    >>> storage_in_words(Storage("int4", "int8", 128))
    'kept values int4, low-rank factors int8, a scale for 128 columns of a row'
    """
    if not storage.has_codes:
        return "all exact"
    return (
        f"kept values {storage.values}, low-rank factors {storage.low_rank}, "
        f"a scale for {storage.scale_columns} columns of a row"
    )
