"""The model card, ``README.md``, for people: what the model is, how large, how good, and how to load it.

It is written from the model's files and its record (:mod:`oats.checkpoint.record`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from oats._version import __version__
from oats.checkpoint.atomic import write_text
from oats.checkpoint.config_json import parse_quantization_config, read_config
from oats.checkpoint.record import Record, in_words, storage_in_words
from oats.checkpoint.stored_model import StoredModel, read_stored_model
from oats.compression.report import CompressionReport
from oats.config import OatsConfig

CARD = "README.md"
MARK = "<!-- written by oats: delete this line to keep your own text -->"
"""A card without this line is somebody else's, and is never overwritten."""


def write_model_card(
    directory: str | Path,
    report: CompressionReport | None = None,
    *,
    source: str | Path | None = None,
    name: str | None = None,
    **known: Any,
) -> Path | None:
    """Write the model card of a compressed model that has been saved.

    With `report`, first write the record, ``oats_report.json``. ``oats info`` and ``oats report`` read each
    layer's error from it.

    Args:
        directory: that ``save_pretrained`` wrote.
        report: of :func:`oats.compress_`.
        source: the dense model, a hub name or a path.
        name: of the model; None means the name of the directory.
        known: `calibration` and `seconds` of :meth:`oats.checkpoint.record.Record.of`.

    Returns:
        The file; None if there is a ``README.md`` that oats did not write, which stays.

    Raises:
        CheckpointError: there is no model in the directory.
        FormatError: a file is damaged.
    """
    directory = Path(directory)
    stored = read_stored_model(directory)
    if report is not None:
        Record.of(report, source=source, **known).write(directory)
    card = directory / CARD
    if card.exists() and MARK not in card.read_text(encoding="utf-8", errors="replace"):
        return None
    return write_text(
        card, _render(stored, Record.read(directory) or Record(), name or directory.resolve().name)
    )


def _render(stored: StoredModel, record: Record, name: str) -> str:
    config = read_config(Path(stored.directory) / "config.json")
    architecture = next(iter(config.get("architectures") or []), "")
    causal = architecture.endswith("ForCausalLM")
    settings = parse_quantization_config(stored.config)[0] if stored.config else None
    tokens = causal or (Path(stored.directory) / "tokenizer_config.json").is_file()
    sections = [
        _front_matter(record, causal),
        MARK,
        f"# {name}",
        _summary(stored, record, settings),
        "## Use\n\n"
        + _usage(name, "AutoModelForCausalLM" if causal else architecture or "AutoModel", tokens),
        "## Size\n\n" + _sizes(stored),
    ]
    if record.evaluations:
        sections.append("## Perplexity\n\n" + _perplexities(record.evaluations))
    if settings is not None:
        sections.append("## How it was made\n\n" + _settings(settings, record))
    if record.errors:
        has_codes = any(layer.storage.has_codes for layer in stored.layers)
        sections.append("## Error of the layers\n\n" + _errors(record, has_codes))
    return "\n\n".join(sections) + "\n"


def _front_matter(record: Record, causal: bool) -> str:
    lines = ["library_name: transformers", "tags:", "- oats", "- sparse", "- low-rank", "- cpu"]
    if causal:
        lines.insert(1, "pipeline_tag: text-generation")
    if record.source is not None and record.source.count("/") == 1:
        lines += [f"base_model: {record.source}", "base_model_relation: quantized"]
    return "\n".join(["---", *lines, "---"])


def _summary(stored: StoredModel, record: Record, settings: OatsConfig | None) -> str:
    if settings is None:
        return f"A dense {stored.model_type} model, not compressed."
    origin = f"`{record.source}`" if record.source else f"A {stored.model_type} model"
    return (
        f"{origin} with {settings.compression:.0%} of the parameters of its {len(stored.layers)} linear "
        "layers removed, without retraining: each weight is the sum of a sparse and a low-rank matrix "
        "([OATS](https://arxiv.org/abs/2409.13652)), computed by kernels that skip the zeros. "
        "It runs on CPUs."
    )


def _usage(name: str, kind: str, tokens: bool) -> str:
    causal = kind == "AutoModelForCausalLM"
    lines = [
        f'    pip install "oats-torch[hf]>={__version__}"',
        "",
        "```python",
        f"from transformers import {kind}" + (", AutoTokenizer" if tokens else ""),
        "",
        f'model = {kind}.from_pretrained("{name}")  # the path of this directory',
    ]
    if tokens:
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    if causal:
        lines += [
            'tokens = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))",
        ]
    lines += ["```", ""]
    if causal:
        lines += [f'or `oats generate {name} "Once upon a time"`, `oats chat {name}`, `oats serve {name}`.']
    return "\n".join(lines).rstrip()


def _sizes(stored: StoredModel) -> str:
    layers, head, rest, rows = stored.layer_bytes, 0, stored.bytes_elsewhere, []
    if stored.layers:
        share = f"{stored.share_of_dense_bf16:.3f}"
        rows.append((f"{len(stored.layers)} linear layers", _megabytes(layers), share))
    if stored.head:
        head, share = stored.head.stored_bytes, f"{stored.head.share_of_dense_bf16:.3f}"
        rows.append((f"output head, {stored.head.dtype}", _megabytes(head), share))
    rows.append(("everything else", _megabytes(rest), ""))
    rows.append(("all weights", _megabytes(layers + head + rest), ""))
    return _table(("", "stored", "of dense bf16"), rows)


def _perplexities(evaluations: Iterable[dict[str, Any]]) -> str:
    rows = [
        (
            f"{entry['perplexity']:.2f}",
            f"{entry['text']}, {entry['split']}, sha256 {entry['sha256']}",
            str(entry["tokens"]),
            str(entry["context"]),
            str(entry["stride"]),
            entry["dtype"],
        )
        for entry in evaluations
    ]
    return _table(("perplexity", "text", "tokens scored", "context", "stride", "dtype"), rows)


def _settings(settings: OatsConfig, record: Record) -> str:
    shown: dict[str, Any] = {
        "method": settings.method,
        "compression": f"{settings.compression:g}",
        "rank ratio": f"{settings.rank_ratio:g}",
        "pattern": settings.pattern,
        "low-rank step": f"{settings.svd}, {settings.resolved_iterations} iterations at most, "
        f"momentum {settings.resolved_momentum:g}, seed {settings.seed}",
    }
    if settings.skip:
        shown["left dense"] = ", ".join(f"`{pattern}`" for pattern in settings.skip)
    if settings.moments != OatsConfig.moments:
        shown["moments"] = f"of the {settings.moments} model"
    if settings.block_matching:
        shown["block matching"] = f"{settings.block_matching} passes"
    if settings.storage.has_codes:
        shown["codes"] = storage_in_words(settings.storage)
    if record.calibration:
        shown["calibration"] = in_words(record.calibration)
    if record.seconds is not None:
        shown["time"] = f"{record.seconds:.0f} s"
    if record.software:
        shown["software"] = in_words(record.software)
    rows = [(name, str(value)) for name, value in shown.items()]
    rows += [("quantised", words) for words in record.quantizations_in_words()]
    return _table(("setting", "value"), rows)


def _errors(record: Record, has_codes: bool) -> str:
    worst = sorted(record.errors, key=record.errors.__getitem__, reverse=True)[:5]
    parts = [
        f"Relative error of a layer's output on the calibration data{record.errors_were_taken(has_codes)}: "
        f"median {statistics.median(record.errors.values()):.3f}. The largest:",
        _table(("layer", "error"), [(f"`{name}`", f"{record.errors[name]:.3f}") for name in worst]),
    ]
    moved = record.quantizations[-1]["errors"] if record.quantizations else {}
    if moved:
        most = max(moved, key=moved.__getitem__)
        parts.append(
            "How far codes moved a layer's output, relative, on the text that they were fitted on: "
            f"median {statistics.median(moved.values()):.3f}, at most {moved[most]:.3f} in `{most}`."
        )
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
