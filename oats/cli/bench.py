"""``oats bench``: times compressed layers against torch's dense layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from oats.cli.options import Json, Pattern, RankRatio
from oats.config import OatsConfig
from oats.errors import ConfigError, OatsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from oats.bench.contenders import Dtype
    from oats.bench.layer_latency import LeftOut, Row, Timing
    from oats.config import Storage


def bench(
    model: Annotated[
        str | None,
        Option(
            help="Time all layer shapes of this model (llama-3-8b) instead of one shape.", show_default="none"
        ),
    ] = None,
    d_out: Annotated[int, Option(help="Outputs of the layer.")] = 4096,
    d_in: Annotated[int, Option(help="Inputs of the layer.")] = 4096,
    batch: Annotated[
        str, Option(help="Rows of the input (tokens in one forward pass): one number, or several: 1,4,16.")
    ] = "1",
    compression: Annotated[
        str, Option(help="Share of the parameters to remove: one number, or several: 0.3,0.5.")
    ] = str(OatsConfig.compression),
    rank_ratio: RankRatio = OatsConfig.rank_ratio,
    pattern: Pattern = OatsConfig.pattern,
    dtype: Annotated[
        str, Option(help="How oats stores its weights: bf16, fp32, int8 or int4, or several: bf16,int8.")
    ] = "bf16",
    isa: Annotated[
        str | None,
        Option(
            help="Instruction sets of oats: one, several with commas, or all.", show_default="the best one"
        ),
    ] = None,
    threads: Annotated[
        int | None, Option(help="Threads of oats and of torch.", show_default="torch's default")
    ] = None,
    repetitions: Annotated[int, Option(help="Most timed calls of each.")] = 200,
    seconds: Annotated[float, Option(help="Seconds of timed calls of each, about.")] = 2.0,
    plot: Annotated[
        Path | None,
        Option(
            help="Directory for pictures (latency, roofline) as PNG and SVG; needs matplotlib.",
            show_default="none",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time compressed layers against torch's dense layers of the same dtype, in turn.

    The weights are random, and no cache holds them. Each result is compared with float64 before it is timed.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    batches = _numbers("batch", batch, int)
    compressions = _numbers("compression", compression, float)
    dtypes = dtype.split(",")
    if unknown := [name for name in dtypes if name not in ("bf16", "fp32", "int8", "int4")]:
        raise ConfigError(f'dtype must be "bf16", "fp32", "int8" or "int4", got {unknown[0]!r}')

    import torch

    from oats.bench import summary
    from oats.bench.contenders import compressed, torch_dense
    from oats.bench.layer_latency import layer_rows
    from oats.bench.shapes import LayerShape, shapes_of
    from oats.cli.console import print_json, progress_bar, results
    from oats.kernels.isa import active_isa, available_isas

    if threads is not None:
        torch.set_num_threads(threads)
    isas = available_isas() if isa == "all" else (isa or active_isa()).split(",")
    if missing := [name for name in isas if name not in available_isas()]:
        raise ConfigError(
            f"this machine has no instruction set {missing[0]!r}; it has " + ", ".join(available_isas())
        )
    if plot is not None:
        from oats.bench import plots

        plots.prepare(plot)
    shapes = shapes_of(model) if model is not None else (LayerShape(f"{d_out} x {d_in}", d_out, d_in),)
    config = OatsConfig(compression=compressions[0], rank_ratio=rank_ratio, pattern=pattern)
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    # Inputs of layers with codes are bf16.
    plain: list[tuple[Dtype, Storage]] = [
        ("fp32" if name == "fp32" else "bf16", OatsConfig(values=name).storage)  # type: ignore[arg-type]
        for name in dtypes
    ]
    ours = [
        compressed(name, isa=isa_name, storage=how, compression=share)
        for share in compressions
        for name, how in plain
        for isa_name in isas
    ]
    peers = [torch_dense(name) for name in dict.fromkeys(name for name, _ in plain)]
    with progress_bar("Timing") as bar:
        for done, shape in enumerate(shapes):

            def progress(note: str, done: int = done) -> None:
                bar.update(done, len(shapes), note)

            rows += layer_rows(
                shape, batches, config, ours, peers, model=model or "", repetitions=repetitions,
                seconds=seconds, left_out=left_out, progress=progress,
            )  # fmt: skip
    if not rows:
        raise OatsError("nothing was timed: " + "; ".join(f"{item.name}, {item.reason}" for item in left_out))
    if plot is not None:
        plots.draw(rows, plot)
    if as_json:
        print_json(**summary.to_dict(rows, left_out))
    else:
        print_rows(results(), rows)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """One table for each layer and compression: ours, then the contenders that it was timed against."""
    from oats.bench.layer_latency import contender_label
    from oats.cli.console import human_bytes, plain_table

    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.d_out, row.d_in, row.compression), []).append(row)

    isas = list(dict.fromkeys(row.ours.isa for row in rows))

    def line(row: Row, timing: Timing, ratio: str) -> list[str]:
        share = row.share_of_bandwidth(timing)
        return [
            contender_label(timing.name, timing.dtype, timing.form, timing.isa if len(isas) > 1 else ""),
            f"{timing.ms.median:.3g}", f"{timing.ms.p10:.3g}–{timing.ms.p90:.3g}",
            "–" if timing.weight_bytes is None else human_bytes(timing.weight_bytes),
            "–" if share is None else f"{share:.0%}", f"{row.gflops(timing):.0f}", ratio,
        ]  # fmt: skip

    for group in groups.values():
        first = group[0]
        shape = f"{first.d_out} x {first.d_in}"
        named = shape if first.layer == shape else f"{first.layer}: {shape}"
        # A title of the table would be broken at the table's width.
        console.print(
            f"{named}, compression {first.compression:g}, rank ratio {first.rank_ratio:g}, "
            f"pattern {first.pattern}: rank {first.ours.rank}, "
            f"density {first.ours.nnz / (first.d_out * first.d_in):.3f}",
            style="table.title",
        )
        table = plain_table("batch", "", "ms", "p10–p90", "weight", "read", "GFLOP/s", "x", left=(1,))
        table.columns[1].no_wrap = False
        previous: tuple[int, Timing] | None = None
        for row in group:
            if previous != (row.batch, row.ours):
                if previous is not None:
                    table.add_section()
                table.add_row(str(row.batch), *line(row, row.ours, ""))
                previous = row.batch, row.ours
            table.add_row("", *line(row, row.peer, f"{row.ratio:.2f}"))
        console.print(table)
    speeds = [row.read_gb_per_s for row in rows]
    console.print(
        f"{rows[0].threads} threads, oats with {', '.join(isas)}\n"
        "ms: median of one call; GFLOP/s: those of the dense product\n"
        "x: how many times as fast as this line oats is\n"
        "read: share of the memory bandwidth, read by torch's sum in between "
        f"({min(speeds):.1f} to {max(speeds):.1f} GB/s)\n"
        "largest error of oats against float64, in units of √(Σ w² x²): "
        f"{max(row.ours.error for row in rows):.1e}"
    )
    others = max(row.others for row in rows)
    if others > 0.1:
        console.print(f"note: other processes took {others:.0%} of the CPUs in between; run it again")
    elif any(row.ours.ms.is_wide or row.peer.ms.is_wide for row in rows):
        console.print("note: p90 is more than 1.5 x the median, so the machine was busy; run it again")


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    """Numbers with commas between them.

    >>> _numbers("batch", "1,4,16", int)
    [1, 4, 16]
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} must be a number, or some with commas between, got {text!r}") from None
