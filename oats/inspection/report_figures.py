"""The figures of the HTML report, as SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from oats.inspection.anatomy import Anatomy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

PARTS = {"values": "#0b6e4f", "mask": "#8fbc8f", "low_rank_u": "#0072b2", "low_rank_v": "#56b4e9"}
"""Tensor of a layer → its colour: greens for the sparse part, blues for the low-rank part."""

MOST_POINTS = 200  # of a spectrum
MOST_NAMES = 40  # on an axis


def svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element. Equal figures give equal bytes."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # A page holds several figures: give their ids a prefix, so that they differ.
    prefix = re.sub(r"\W+", "-", label)
    text = buffer.getvalue()
    text = re.sub(r'\bid="', f'id="{prefix}-', text[text.index("<svg") :])
    text = re.sub(r'((?:xlink:)?href="|url\()#', rf"\1#{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def bytes_figure(layers: Sequence[Anatomy], elsewhere: int) -> Figure:
    """Bytes of each tensor by kind of layer, beside those of dense bf16 weights."""
    kinds = _kinds(layers)[:MOST_NAMES]
    figure = _figure(9, 1.2 + 0.3 * (len(kinds) + 1))
    axes = figure.subplots()
    left = [0.0] * len(kinds)
    for part, colour in PARTS.items():
        sizes = [sum(a.part_bytes[part] for a in layers if a.kind == kind) / 1e6 for kind in kinds]
        axes.barh(kinds, sizes, left=left, color=colour, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    dense = [sum(a.layer.dense_bf16_bytes for a in layers if a.kind == kind) / 1e6 for kind in kinds]
    axes.plot(dense, kinds, "k|", markersize=12, label="dense bf16")
    axes.barh(["everything else"], [elsewhere / 1e6], color="#999999")
    axes.invert_yaxis()
    axes.set_xlabel("MB, all blocks together")
    axes.legend(loc="best", fontsize="small")
    return figure


def errors_figure(layers: Sequence[Anatomy], errors: dict[str, float]) -> Figure:
    """Relative error by block, a line for each kind of layer."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(9, 4)
    axes = figure.subplots()
    for kind in _kinds(layers)[:MOST_NAMES]:
        same = [a for a in layers if a.kind == kind and a.layer.name in errors]
        points = [(anatomy.block or 0, errors[anatomy.layer.name]) for anatomy in same]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=kind)
    axes.set(xlabel="block", ylabel="relative error")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small", ncols=2)
    return figure


def spectra_figure(layers: Sequence[Anatomy]) -> Figure:
    """Singular values of U V, a panel for each kind of layer, a line for each block."""
    import matplotlib

    kinds = _kinds(layers)[:MOST_NAMES]
    figure, panels = _grid(len(kinds), 3, 3, 2.2, sharey=True)
    colours = matplotlib.colormaps["viridis"]
    for axes, kind in zip(panels, kinds, strict=True):
        same = [anatomy for anatomy in layers if anatomy.kind == kind]
        for index, anatomy in enumerate(same):
            values = anatomy.spectrum
            if values.numel() == 0 or values[0] == 0:
                continue
            step = max(1, values.numel() // MOST_POINTS)
            places, heights = range(1, values.numel() + 1, step), (values / values[0])[::step].tolist()
            axes.plot(places, heights, color=colours(0.9 * index / max(1, len(same) - 1)), linewidth=0.8)
        axes.set_title(kind, fontsize="small")
        axes.set_ylim(0, 1.05)
        axes.tick_params(labelsize="x-small")
    return figure


def pictures_figure(images: dict[str, Tensor]) -> Figure:
    """Densities of sparse parts, a panel for each layer."""
    figure, panels = _grid(len(images), 4, 2.6, 2.6)
    highest = max(float(image.max()) for image in images.values())
    for axes, (name, image) in zip(panels, images.items(), strict=True):
        drawn = axes.imshow(
            image.numpy(), cmap="Greens", vmin=0, vmax=highest, aspect="auto", interpolation="none"
        )
        axes.set_title(name.removeprefix("model."), fontsize="x-small")
        axes.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=figure.axes, shrink=0.6, label="kept")
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(count: int, most_columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure with `count` panels, each `width` by `height` inches, and the panels."""
    columns = min(count, most_columns)
    rows = -(-count // columns)
    figure = _figure(width * columns, height * rows)
    panels = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _kinds(layers: Sequence[Anatomy]) -> list[str]:
    return list(dict.fromkeys(anatomy.kind for anatomy in layers))
