"""The picture of a comparison: scores by stored bytes and by parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats.evaluate.comparison import DENSE, Cell, is_accuracy, is_cosine
from oats.evaluate.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Ours in greens, the others in colours that differ also without colour vision (Okabe and Ito).
_OURS = ("#0b6e4f", "#7cb518", "#2a9d8f", "#74c69d")
_OTHERS = ("#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "osD^vPX*"

OFF_SCALE = 10
"""Perplexities of more than this many times the dense model's are named, and not drawn."""


def draw(cells: Sequence[Cell], files: Sequence[Path]) -> None:
    """Write the picture to each of the files, whose suffix says the kind."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        picture = figure(cells)
        for file in files:
            picture.savefig(file, dpi=160)


def figure(cells: Sequence[Cell]) -> Figure:
    """A row of panels for each score; left by bytes, right by parameters of the compressed layers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    methods = list(dict.fromkeys(cell.method for cell in cells if cell.method != DENSE))
    dense = next((cell for cell in cells if cell.method == DENSE), None)
    names = list(cells[0].scores)
    made = Figure(figsize=(10.5, 3.6 * len(names) + 0.4), layout="constrained")
    grid = made.subplots(len(names), 2, squeeze=False, sharey="row")
    handles = {}
    for name, panels in zip(names, grid, strict=True):
        scale = 100 if is_accuracy(name) else 1
        for axes, (attribute, label) in zip(
            panels,
            (
                ("layer_bytes", "MB of the linear layers, as stored"),
                ("layer_parameters", "million parameters of the linear layers"),
            ),
            strict=True,
        ):
            for method in methods:
                line = sorted(
                    (getattr(cell, attribute) / 1e6, scale * cell.scores[name])
                    for cell in cells
                    if cell.method == method
                )
                ours = method.startswith("oats")
                (handles[method],) = axes.plot(
                    *zip(*line, strict=True), color=_colour(method, methods), label=method, markersize=5,
                    marker=_MARKERS[methods.index(method) % len(_MARKERS)], linewidth=2 if ours else 1.2,
                    zorder=3 if ours else 2,
                )  # fmt: skip
            if dense is not None:
                handles[DENSE] = axes.axhline(
                    scale * dense.scores[name], color="#555555", linestyle=":", linewidth=1.2, label=DENSE
                )
            axes.set(xlabel=label)
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
    """End the vertical axis at `highest`, and name the lines that have points beyond it."""
    beyond = [line.get_label() for line in axes.lines if max(line.get_ydata()) > highest]
    if beyond:
        inside = [y for line in axes.lines for y in line.get_ydata() if y <= highest]
        axes.set_ylim(min(inside) / 1.1, max(inside) * 1.25)
        axes.annotate(
            f"off the scale: {', '.join(beyond)}",
            (0.98, 0.96),
            ha="right",
            va="top",
            xycoords="axes fraction",
            fontsize=8,
            color="#555555",
        )


def _colour(method: str, methods: Sequence[str]) -> str:
    ours = method.startswith("oats")
    alike = [each for each in methods if each.startswith("oats") == ours]
    palette = _OURS if ours else _OTHERS
    return palette[alike.index(method) % len(palette)]
