"""Pictures of measured rows: latency by batch, and the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats.errors import ConfigError, OutputExistsError
from oats.evaluate.contenders import DTYPES, Dtype, peak_gflops
from oats.evaluate.latency import Row, Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("latency.png", "latency.svg", "roofline.png", "roofline.svg")

_OURS = "#0b6e4f"
# Distinguishable also without colour vision (Okabe and Ito), in the order in which contenders come.
_COLOURS = ("#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#7f7f7f", "#8c6d31", "#5b3a8c", "#000000")
_MARKERS = "osD^vP<>X"
"""Of the batches, in the roofline."""


def prepare(directory: Path) -> None:
    """Check that the pictures can be drawn and written, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, or the directory cannot be made.
        OutputExistsError: a picture is there already.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'oats-torch[plot]'") from None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory {directory}: {error.strerror}") from None
    for name in FILES:
        if (directory / name).exists():
            raise OutputExistsError(f"{directory / name} exists; give another directory, or remove it")


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write both pictures as PNG and SVG.

    Returns:
        The files.
    """
    import matplotlib

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "savefig.bbox": "tight",
    }
    files = []
    with matplotlib.rc_context(style):
        for name, figure in (("latency", latency(rows)), ("roofline", roofline(rows))):
            for kind in ("png", "svg"):
                files.append(directory / f"{name}.{kind}")
                figure.savefig(files[-1], dpi=160)
    return files


def latency(rows: Sequence[Row]) -> Figure:
    """Milliseconds by batch, a panel for each layer, compression and dtype of ours; bands are p10 to p90."""
    from matplotlib.figure import Figure

    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.d_out, row.d_in, row.compression, row.ours.dtype)
        panels.setdefault(key, []).append(row)
    colours = _colours(rows)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns + 2.2, 3.6 * lines + 0.4), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, ((d_out, d_in, compression, dtype), panel) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(f"{d_out} × {d_in}, {compression:.0%} removed, {dtype}")
        for name, points in _series(panel).items():
            batches = sorted(points)
            spreads = [points[batch].ms for batch in batches]
            ours = name.startswith("oats")
            (handle,) = axes.plot(
                batches, [spread.median for spread in spreads], color=colours[name], marker="o",
                markersize=3.5 if ours else 2.8, linewidth=2.2 if ours else 1.2, zorder=3 if ours else 2,
                linestyle="-" if name in ("oats", "oats rank 0") or not ours else "--", label=name,
            )  # fmt: skip
            axes.fill_between(
                batches, [spread.p10 for spread in spreads], [spread.p90 for spread in spreads],
                color=colours[name], alpha=0.15, linewidth=0,
            )  # fmt: skip
            handles.setdefault(name, handle)
        _log_axes(axes, sorted({row.batch for row in panel}))
        axes.set_xlabel("batch (rows of the input)")
        axes.set_ylabel("milliseconds of one call")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def roofline(rows: Sequence[Row]) -> Figure:
    """Effective GFLOP/s by arithmetic intensity, every timing a point, under the roofs of this machine.

    The roofs are the read bandwidth of the rows' own run (median) and torch's dense product, measured here.
    Work is that of the dense product, so a kernel that skips zeros can be above the second roof; bytes are
    those of the weight as stored, the input and the output.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    colours = _colours(rows)
    bandwidth = float(np.median([row.read_gb_per_s for row in rows]))
    dtypes: list[Dtype] = [d for d in DTYPES if any(row.ours.dtype == d for row in rows)]
    figure = Figure(figsize=(9.4, 5.4), layout="constrained")
    axes = figure.subplots()
    batches = sorted({row.batch for row in rows})
    points: dict[tuple[Any, ...], tuple[str, int, float, float]] = {}
    for row in rows:
        for timing in (row.ours, row.peer):
            key = (row.d_out, row.d_in, row.batch, row.compression, timing.label)
            points[key] = (timing.label, row.batch, _intensity(row, timing), row.gflops(timing))
    for name, batch, intensity, gflops in points.values():
        ours = name.startswith("oats")
        axes.scatter(
            intensity, gflops, color=colours[name], marker=_marker(batches.index(batch)),
            s=34 if ours else 20, alpha=0.9 if ours else 0.65, linewidths=0.4, edgecolors="white",
            zorder=4 if ours else 3,
        )  # fmt: skip
    intensities = [point[2] for point in points.values()]
    left, right = min(intensities) / 1.6, max(intensities) * 1.6
    x = np.geomspace(left, right, 200)
    peaks = {dtype: peak_gflops(dtype) for dtype in dtypes}
    top = max(peaks.values())
    slope = x * bandwidth
    axes.plot(x[slope <= top], slope[slope <= top], color="#333333", linewidth=1.3, zorder=2)
    axes.annotate(
        f"memory: {bandwidth:.0f} GB/s read", (left * 1.15, left * 1.15 * bandwidth), xytext=(0, 9),
        textcoords="offset points", rotation=34, rotation_mode="anchor", color="#333333",
    )  # fmt: skip
    for dtype, peak in peaks.items():
        start = peak / bandwidth
        axes.plot([start, right], [peak, peak], color="#333333", linewidth=1.3, zorder=2)
        axes.annotate(
            f"torch dense {dtype}, 2048³: {peak:.0f} GFLOP/s", (right, peak), xytext=(0, 4),
            textcoords="offset points", ha="right", color="#333333",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right))
    axes.set_xlabel("dense floating-point operations a byte of weight, input and output")
    axes.set_ylabel("effective GFLOP/s")
    axes.set_title("Roofline")
    names = list(dict.fromkeys(point[0] for point in points.values()))
    kinds = [Line2D([], [], marker="o", linestyle="", color=colours[name], label=name) for name in names]
    sizes = [
        Line2D([], [], marker=_marker(i), linestyle="", color="#555555", label=f"batch {batch}")
        for i, batch in enumerate(batches)
    ]
    figure.legend(handles=[*kinds, *sizes], loc="outside right upper")
    return figure


def _intensity(row: Row, timing: Timing) -> float:
    """Dense operations a byte that one call has to move."""
    width = 4 if timing.dtype == "fp32" else 2
    # Where the format is not public, what it must hold at least: its non-zeros.
    weight = timing.weight_bytes if timing.weight_bytes is not None else width * timing.nnz
    return 2 * row.d_out * row.d_in * row.batch / (weight + width * row.batch * (row.d_out + row.d_in))


def _series(rows: Iterable[Row]) -> dict[str, dict[int, Timing]]:
    """Name → batch → timing, ours first."""
    series: dict[str, dict[int, Timing]] = {}
    for row in rows:
        series.setdefault(row.ours.label, {})[row.batch] = row.ours
    for row in rows:
        series.setdefault(row.peer.label, {})[row.batch] = row.peer
    return series


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    names = list(_series(rows))
    peers = [name for name in names if not name.startswith("oats")]
    ours = [name for name in names if name.startswith("oats")]
    greens = (_OURS, "#58a55c", "#9bc53d", "#2e4600", "#3bb3a0", "#7bc8a4")
    return {
        **{name: greens[i % len(greens)] for i, name in enumerate(ours)},
        **{name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(peers)},
    }


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _log_axes(axes: Axes, batches: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set(xscale="log", yscale="log")
    # Labels that do not run into each other: powers of four, where there are many.
    shown = (
        batches if len(batches) <= 6 else [b for b in batches if b.bit_count() == 1 and b.bit_length() % 2]
    )
    axes.set_xticks(shown or batches, [str(batch) for batch in shown or batches])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="minor", axis="y", linewidth=0.3)
