"""Pictures of measured rows: latency against batch size, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats.bench.contenders import DTYPES, Dtype, peak_gflops
from oats.bench.layer_latency import Row, Timing, contender_label
from oats.errors import ConfigError, OutputExistsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none", "savefig.bbox": "tight",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
}  # fmt: skip
"""matplotlib settings of every picture."""

FILES = ("latency.png", "latency.svg", "roofline.png", "roofline.svg")

# Ours in greens, the best instruction set first. Peers in colours that stay distinct for colour-blind readers
# (Okabe and Ito), then in greys and browns.
_OURS = ("#0b6e4f", "#7cb518", "#2a9d8f", "#8fbc8f", "#4f772d", "#74c69d")
_PEERS = (
    "#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#7f7f7f", "#8c6d31", "#5b3a8c",
    "#e63946", "#bcbd22",
)  # fmt: skip
# Markers of the roofline: least batch of each group → marker, label. The horizontal axis shows the rest.
_MARKERS = {
    1: ("o", "batch 1"), 2: ("s", "batch 2 to 8"), 9: ("^", "batch 9 to 64"), 65: ("D", "batch over 64"),
}  # fmt: skip


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'oats-torch[plot]'") from None


def prepare(directory: Path) -> None:
    """Check that the pictures can be drawn and written, before anything is measured.

    Raises:
        ConfigError: matplotlib is missing, or the directory cannot be made.
        OutputExistsError: a picture is there already.
    """
    require_matplotlib()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory {directory}: {error.strerror}") from None
    for name in FILES:
        if (directory / name).exists():
            raise OutputExistsError(f"{directory / name} exists; give another directory, or remove it")


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write both pictures as PNG and SVG, and return the files."""
    import matplotlib

    files = [directory / name for name in FILES]
    with matplotlib.rc_context(STYLE):
        figures = {"latency": latency(rows), "roofline": roofline(rows)}
        for file in files:
            figures[file.stem].savefig(file, dpi=160)
    return files


def latency(rows: Sequence[Row]) -> Figure:
    """Milliseconds against batch, a panel for each layer, compression and input dtype; bands: p10 to p90."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.d_out, row.d_in, row.compression, row.ours.input_dtype)
        panels.setdefault(key, []).append(row)
    names, colours = _names(rows), _colours(rows)
    columns = min(len({row.ours.input_dtype for row in rows}) if len(panels) > 1 else 1, 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns + 2.4, 3.5 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes, ((d_out, d_in, compression, dtype), panel) in zip(grid.flat, panels.items(), strict=False):
        series: dict[str, dict[int, Timing]] = {}
        for row in panel:
            for timing in (row.ours, row.peer):
                series.setdefault(names[timing.label], {})[row.batch] = timing
        for name, by_batch in series.items():
            batches = sorted(by_batch)
            spreads = [by_batch[batch].ms for batch in batches]
            ours = name.startswith("oats")
            (handle,) = axes.plot(
                batches, [spread.median for spread in spreads], color=colours[name], marker="o", label=name,
                markersize=3.6 if ours else 2.8, linewidth=2.4 if name == "oats" else 1.1,
                zorder=3 if ours else 2,
            )  # fmt: skip
            axes.fill_between(
                batches, [spread.p10 for spread in spreads], [spread.p90 for spread in spreads],
                color=colours[name], alpha=0.2 if ours else 0.08, linewidth=0,
            )  # fmt: skip
            handles.setdefault(name, handle)
        medians = [timing.ms.median for by_batch in series.values() for timing in by_batch.values()]
        axes.set(xscale="log", yscale="log", ylim=(min(medians) / 1.4, max(medians) * 1.4))
        shown = sorted({row.batch for row in panel})
        if len(shown) > 6:
            # So few that the labels do not overlap.
            shown = [batch for batch in shown if batch in (1, 4, 16, 64, 256, 1024, 4096)] or shown
        axes.set_xticks(shown, [str(batch) for batch in shown])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="minor", axis="y", linewidth=0.3)
        axes.set(xlabel="batch (rows of the input)", ylabel="milliseconds")
        axes.set_title(f"{d_out} × {d_in}, {compression:.0%} removed, {dtype}")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper")
    return figure


def roofline(rows: Sequence[Row]) -> Figure:
    """Effective GFLOP/s against arithmetic intensity: a point for each timing, a panel for each input dtype.

    The roofs are the median read bandwidth of the same run, and torch's dense product, which is measured
    here. The operations are those of the dense product, so a kernel that skips zeros can be above the second
    roof. The bytes are those of the stored weight, the input and the output.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names, colours = _names(rows), _colours(rows)
    bandwidth = float(np.median([row.read_gb_per_s for row in rows]))
    dtypes: list[Dtype] = [d for d in DTYPES if any(row.ours.input_dtype == d for row in rows)]
    figure = Figure(figsize=(5.6 * len(dtypes) + 2.4, 5.4), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False).flat, dtypes, strict=True):
        points: dict[tuple[Any, ...], tuple[str, int, float, float]] = {}
        for row in rows:
            for timing in (row.ours, row.peer) if row.ours.input_dtype == dtype else ():
                key = (row.d_out, row.d_in, row.batch, row.compression, timing.label)
                points[key] = names[timing.label], row.batch, _intensity(row, timing), row.gflops(timing)
        for name, batch, intensity, gflops in points.values():
            ours = name.startswith("oats")
            axes.scatter(
                intensity, gflops, color=colours[name], marker=_marker(batch)[0], edgecolors="white",
                s=38 if ours else 22, alpha=0.95 if ours else 0.7, linewidths=0.4, zorder=4 if ours else 3,
            )  # fmt: skip
        peak = peak_gflops(dtype)
        ridge = peak / bandwidth
        left = min(min(point[2] for point in points.values()), ridge) / 1.6
        right = max(max(point[2] for point in points.values()), ridge) * 1.6
        axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color="#333333", zorder=2)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylabel="effective GFLOP/s")
        axes.margins(y=0.08)
        axes.set_title(f"Roofline, {dtype}")
        axes.set_xlabel("dense operations a byte of weight, input and output")
        axes.annotate(
            f"torch dense {dtype}, 2048³: {peak:.0f} GFLOP/s", (right, peak), xytext=(-2, 4),
            textcoords="offset points", ha="right", color="#333333",
        )  # fmt: skip
    kinds = [Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in colours.items()]
    shapes = [
        Line2D([], [], marker=marker, linestyle="", color="#555555", label=label)
        for marker, label in dict.fromkeys(_marker(batch) for batch in sorted({row.batch for row in rows}))
    ]
    figure.legend(handles=[*kinds, *shapes], loc="outside right upper")
    # The angle of the memory roof depends on the layout of the axes.
    figure.draw_without_rendering()
    for axes in figure.axes:
        left = axes.get_xlim()[0]
        ends = axes.transData.transform([(left, left * bandwidth), (10 * left, 10 * left * bandwidth)])
        angle = np.degrees(np.arctan2(*(ends[1] - ends[0])[::-1]))
        axes.annotate(
            f"memory read at {bandwidth:.0f} GB/s", (left * 1.3, left * 1.3 * bandwidth), xytext=(-3, 4),
            textcoords="offset points", rotation=angle, rotation_mode="anchor", color="#333333",
        )  # fmt: skip
    return figure


def _marker(batch: int) -> tuple[str, str]:
    return _MARKERS[max(least for least in _MARKERS if least <= batch)]


def _intensity(row: Row, timing: Timing) -> float:
    """Operations of the dense product, per byte that one call must move."""
    width = 4 if timing.dtype == "fp32" else 2
    # If the format is not public: the least that it must hold, its non-zeros.
    weight = timing.weight_bytes if timing.weight_bytes is not None else width * timing.nnz
    return 2 * row.d_out * row.d_in * row.batch / (weight + width * row.batch * (row.d_out + row.d_in))


def _names(rows: Sequence[Row]) -> dict[str, str]:
    """Label → name in the legend, without the parts that do not tell contenders apart."""
    timings = {timing.label: timing for row in rows for timing in (row.ours, row.peer)}
    best = rows[0].ours.isa
    names = {}
    for label, timing in timings.items():
        plain = {t.dtype for t in timings.values() if (t.name, t.form) == (timing.name, timing.form)}
        # The title of the panel says bf16 or fp32; a contender with only one dtype needs it in its name.
        dtype = "" if plain == {"bf16", "fp32"} else timing.dtype
        isa = "" if timing.isa == best else timing.isa
        names[label] = contender_label(timing.name, dtype, timing.form, isa)
    return names


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Name in the legend → colour, ours first."""
    names = _names(rows)
    ours = dict.fromkeys(names[row.ours.label] for row in rows)
    peers = dict.fromkeys(names[row.peer.label] for row in rows)
    return {
        **{name: _OURS[i % len(_OURS)] for i, name in enumerate(ours)},
        **{name: _PEERS[i % len(_PEERS)] for i, name in enumerate(peers)},
    }
