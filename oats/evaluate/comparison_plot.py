"""The picture of a comparison: scores against stored bytes, and against parameters or speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats.bench.plots import STYLE
from oats.evaluate.cells import DENSE, Cell, is_dense
from oats.evaluate.comparison import CODES, split_codes
from oats.evaluate.comparison_table import is_accuracy, is_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ours in greens; the others in colours that stay distinct for colour-blind readers (Okabe and Ito).
_OURS = ("#0b6e4f", "#7cb518", "#2a9d8f", "#74c69d")
_OTHERS = ("#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vPX*"
# Codes of the kept values → style of the line, and filling of the marker. Colour and marker show the method.
_STORED = {"": ("-", "full"), **dict(zip(CODES, (("--", "none"), (":", "bottom")), strict=True))}

OFF_SCALE = 10
"""A perplexity above this many times the dense model's is named, not drawn."""

Speeds = Mapping[tuple[str, float], float]
"""Method and compression of a cell → decoded tokens a second."""


def draw(cells: Sequence[Cell], files: Sequence[Path], speeds: Speeds | None = None) -> None:
    """Write the picture to each of the files; the suffix says the format."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        picture = figure(cells, speeds)
        for file in files:
            picture.savefig(file, dpi=160)


def figure(cells: Sequence[Cell], speeds: Speeds | None = None) -> Figure:
    """A row of panels for each score: left against bytes of the compressed layers, right their parameters.

    Args:
        cells: of :func:`oats.evaluate.comparison.complete`.
        speeds: if given, the right panels show these instead of parameters, and leave out cells without one.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    methods = list(dict.fromkeys(cell.method for cell in cells if not is_dense(cell)))
    dense = next((cell for cell in cells if cell.method == DENSE), None)
    names = list(cells[0].scores)
    made = Figure(figsize=(10.5, 3.6 * len(names) + 0.4), layout="constrained")
    grid = made.subplots(len(names), 2, squeeze=False, sharey="row")
    handles = {}
    megabytes = {(cell.method, cell.compression): cell.layer_bytes / 1e6 for cell in cells}
    parameters = {(cell.method, cell.compression): cell.layer_parameters / 1e6 for cell in cells}
    sides: tuple[tuple[Mapping[tuple[str, float], float], str], ...] = (
        (megabytes, "MB of the linear layers, as stored"),
        (parameters, "million parameters of the linear layers")
        if speeds is None
        else (speeds, "decoded tokens a second"),
    )
    for name, panels in zip(names, grid, strict=True):
        scale = 100 if is_accuracy(name) else 1
        for axes, (position, label) in zip(panels, sides, strict=True):
            points = {
                (cell.method, cell.compression): (at, scale * cell.scores[name])
                for cell in cells
                if (at := position.get((cell.method, cell.compression))) is not None
            }
            for method in methods:
                line = sorted(point for (which, _), point in points.items() if which == method)
                if not line:
                    continue
                (handles[method],) = axes.plot(
                    *zip(*line, strict=True), label=method, markersize=6, **_look(method, methods)
                )
            if dense is not None:
                handles[DENSE] = axes.axhline(
                    scale * dense.scores[name], color="#555555", linestyle=":", linewidth=1.2, label=DENSE
                )
            rounded = {
                method: point for (method, _), point in points.items() if method.startswith(f"{DENSE}+")
            }
            for i, (method, point) in enumerate(sorted(rounded.items(), key=lambda item: item[1])):
                axes.plot(*point, "*", color="#222222", markersize=8, label=method, zorder=4)
                # Above and below in turn: formats with as many bits are neighbours.
                axes.annotate(method, point, (5, -9 if i % 2 else 3), textcoords="offset points", fontsize=7)
            axes.set(xlabel=label)
            axes.margins(x=0.12)  # room for names beside the points
            # The right panel has the same vertical axis.
            if axes is panels[0]:
                axes.set(ylabel=_axis(name), title=name)
            if not is_accuracy(name) and not is_cosine(name):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
                if dense is not None:
                    _cut(axes, OFF_SCALE * dense.scores[name])
    made.legend(list(handles.values()), list(handles), loc="outside right upper")
    return made


def _axis(name: str) -> str:
    if is_accuracy(name):
        return "accuracy, %"
    return "cosine" if is_cosine(name) else "perplexity"


def _cut(axes: Any, highest: float) -> None:
    """End the vertical axis at `highest`, and name the lines that go beyond it."""
    beyond = [line.get_label() for line in axes.lines if max(line.get_ydata()) > highest]
    if beyond:
        inside = [y for line in axes.lines for y in line.get_ydata() if y <= highest]
        axes.set_ylim(min(inside) / 1.1, max(inside) * 1.25)
        axes.annotate(
            f"off the scale: {', '.join(beyond)}", (0.98, 0.96), ha="right", va="top",
            xycoords="axes fraction", fontsize=8, color="#555555",
        )  # fmt: skip


def _look(method: str, methods: Sequence[str]) -> dict[str, Any]:
    plain, codes = split_codes(method)
    ours = plain.startswith("oats")
    named = dict.fromkeys(split_codes(each)[0] for each in methods)
    alike = [each for each in named if each.startswith("oats") == ours]
    palette = _OURS if ours else _OTHERS
    return {
        "color": palette[alike.index(plain) % len(palette)],
        "marker": _MARKERS[list(named).index(plain) % len(_MARKERS)],
        "linestyle": _STORED[codes][0], "fillstyle": _STORED[codes][1],
        "linewidth": 2 if ours else 1.2, "zorder": 3 if ours else 2,
    }  # fmt: skip
