"""The report: one HTML file about a compressed model, with sizes, errors, spectra and sparsity.

It needs no network: figures and style are in the file.
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from oats._version import __version__
from oats.bench.plots import require_matplotlib
from oats.checkpoint.config_json import parse_quantization_config
from oats.checkpoint.record import Record, in_words
from oats.checkpoint.stored_model import StoredModel
from oats.config import OatsConfig
from oats.errors import ConfigError
from oats.inspection.anatomy import Anatomy, anatomies, pictures
from oats.inspection.report_figures import bytes_figure, errors_figure, pictures_figure, spectra_figure, svg

if TYPE_CHECKING:
    from oats.bench.layer_latency import Row, Timing

MOST_PICTURES = 8
DISTURBED = 0.1  # the report warns if other processes took more than this share of the CPUs

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left } .scroll { max-height: 30rem; overflow: auto }
.wide { overflow-x: auto } p.note { color: #555 } code { font-size: .9em } table.about td { text-align: left }
table.about td:last-child { white-space: normal }
"""


def html_report(
    model: StoredModel, record: Record | None, *, speed: Sequence[Row] = (),
    progress: Callable[[int, int], None] | None = None,
) -> str:  # fmt: skip
    """Draw the report of a compressed model.

    Args:
        record: with the errors of the layers; None if they were not kept.
        speed: rows of :func:`oats.inspection.layer_speed.time_layers`; without rows the report has no section
            about speed.
        progress: called as progress(layers done, layers in all).

    Returns:
        The text of one HTML file, with the figures as SVG.

    Raises:
        ConfigError: the model is not a compressed one, or matplotlib is missing.
    """
    if not model.layers or model.config is None:
        raise ConfigError(f"{model.directory} has no compressed layer; there is nothing to draw")
    require_matplotlib()
    record = record or Record()
    layers = []
    for done, anatomy in enumerate(anatomies(model), 1):
        layers.append(anatomy)
        if progress is not None:
            progress(done, len(model.layers))
    errors = record.errors_of([anatomy.layer.name for anatomy in layers])
    shown = _layers_to_picture(layers, errors)
    name = record.source or model.model_type
    sections = [
        f"<h1>{html.escape(name)}, compressed</h1>",
        _table(("", ""), _summary(model, record, errors), head=False),
        "<h2>Where the bytes are</h2>",
        svg(bytes_figure(layers, model.bytes_elsewhere), "bytes by kind of layer"),
        "<h2>Errors of the layers</h2>",
        *_errors_section(model, record, layers, errors),
        "<h2>Spectra of the low-rank parts</h2>",
        "<p class=note>Singular values of U V by kind of layer, divided by the largest one; first block "
        "dark, last block light. A layer whose curve is still high at its end would gain from a higher "
        "rank.</p>",
        svg(spectra_figure(layers), "singular values"),
        "<h2>Sparsity</h2>",
        "<p class=note>Share of elements that the sparse part keeps, in each cell of a grid over the weight; "
        "rows are outputs, columns are inputs. Dark columns are inputs that matter.</p>",
        svg(pictures_figure(pictures(model, shown)), "sparsity pictures"),
        "<h2>Layers</h2>",
        '<div class="scroll">' + _table(*_layer_table(layers, errors)) + "</div>",
    ]
    if speed:
        table = '<div class="wide">' + _table(*_speed_table(speed)) + "</div>"
        sections += ["<h2>Speed</h2>", _speed_note(speed), table]
    title = html.escape(f"{name}: oats report")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _errors_section(
    model: StoredModel, record: Record, layers: Sequence[Anatomy], errors: dict[str, float]
) -> list[str]:
    if not errors:
        return [
            "<p class=note>The errors of this model's layers were not kept. <code>oats compress</code> and "
            "<code>oats.write_model_card(directory, report)</code> keep them.</p>"
        ]
    taken = record.errors_were_taken(any(layer.storage.has_codes for layer in model.layers))
    note = f"<p class=note>Relative error of a layer's output on the calibration data{taken}.</p>"
    return [note, svg(errors_figure(layers, errors), "relative error by block")]


def _layers_to_picture(layers: Sequence[Anatomy], errors: dict[str, float]) -> list[str]:
    """One layer of each kind: the one with the largest error, or the first if errors are not known."""
    chosen: dict[str, str] = {}
    for anatomy in layers:
        name, kind = anatomy.layer.name, anatomy.kind
        if kind not in chosen or errors.get(name, 0) > errors.get(chosen[kind], 0):
            chosen[kind] = name
    return list(chosen.values())[:MOST_PICTURES]


def _speed_note(rows: Sequence[Row]) -> str:
    others = max(row.others for row in rows)
    busy = f" Other processes took up to {others:.0%} of the CPUs: measure again on an idle machine."
    disturbed = busy if others > DISTURBED else ""
    return (
        f"<p class=note>Milliseconds of one call on {rows[0].threads} threads, with random weights of the "
        "same size that no cache holds; both layers take turns. Median (10th to 90th percentile). The last "
        f"column says how many times as fast as the dense layer ours is.{disturbed}</p>"
    )


def _speed_table(rows: Sequence[Row]) -> tuple[Sequence[str], list[Sequence[str]]]:
    def milliseconds(timing: Timing) -> str:
        return f"{timing.ms.median:.3g} ({timing.ms.p10:.3g}–{timing.ms.p90:.3g})"

    head = ("layer", "shape", "batch", rows[0].ours.label, rows[0].peer.label, "times as fast")
    cells: list[Sequence[str]] = []
    for row in rows:
        times = milliseconds(row.ours), milliseconds(row.peer)
        cells.append((row.layer, f"{row.d_out} × {row.d_in}", str(row.batch), *times, f"{row.ratio:.2f}"))
    return head, cells


def _summary(model: StoredModel, record: Record, errors: dict[str, float]) -> list[tuple[str, str]]:
    assert model.config is not None
    settings: OatsConfig = parse_quantization_config(model.config)[0]
    stored, dense = model.layer_bytes, model.dense_bf16_bytes
    shares = f"compression {settings.compression:g}, rank ratio {settings.rank_ratio:g}"
    rows = [
        ("linear layers", f"{len(model.layers)}, {stored / 1e6:,.1f} MB, {stored / dense:.3f} of dense bf16")
    ]
    if model.head:
        rows.append(("output head", f"{model.head.stored_bytes / 1e6:,.1f} MB, {model.head.dtype}"))
    rows.append(("everything else", f"{model.bytes_elsewhere / 1e6:,.1f} MB"))
    rows.append(("settings", f"{settings.method}, {shares}, pattern {settings.pattern}"))
    if record.calibration:
        rows.append(("calibration", in_words(record.calibration)))
    rows += [("quantised", words) for words in record.quantizations_in_words()]
    if errors:
        worst, median = max(errors, key=errors.__getitem__), statistics.median(errors.values())
        rows.append(("error", f"median {median:.3f}, largest {errors[worst]:.3f} in {worst}"))
    for entry in record.evaluations:
        text = f"{entry['text']} ({entry['split']}, context {entry['context']})"
        rows.append(("perplexity", f"{entry['perplexity']:.2f} on {text}"))
    return [*rows, ("made by", f"oats {__version__}")]


def _layer_table(
    layers: Sequence[Anatomy], errors: dict[str, float]
) -> tuple[Sequence[str], list[Sequence[str]]]:
    head = ("layer", "shape", "rank", "density", "kB", "of bf16", "error")
    rows: list[Sequence[str]] = []
    for anatomy in layers:
        layer = anatomy.layer
        error = errors.get(layer.name)
        rows.append((
            layer.name, f"{layer.d_out} × {layer.d_in}", str(layer.rank), f"{layer.density:.3f}",
            f"{layer.stored_bytes / 1e3:,.1f}", f"{layer.share_of_dense_bf16:.3f}",
            "–" if error is None else f"{error:.4f}",
        ))  # fmt: skip
    return head, rows


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], head: bool = True) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line(names, "th")] * head + [line(row, "td") for row in rows]
    return ("<table>" if head else '<table class="about">') + "".join(lines) + "</table>"
