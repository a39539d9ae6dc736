"""``oats bench``: one layer shape, dense against compressed."""

from __future__ import annotations

from typing import Annotated

import typer

from oats.config import OatsConfig
from oats.errors import ConfigError


def bench(
    d_out: Annotated[int, typer.Option(help="Outputs of the layer.")] = 4096,
    d_in: Annotated[int, typer.Option(help="Inputs of the layer.")] = 4096,
    batch: Annotated[int, typer.Option(help="Rows of the input: tokens in one forward pass.")] = 1,
    compression: Annotated[
        float, typer.Option(help="Share of the parameters removed.")
    ] = OatsConfig.compression,
    rank_ratio: Annotated[
        float, typer.Option(help="Share of the rest that is low-rank.")
    ] = OatsConfig.rank_ratio,
    pattern: Annotated[str, typer.Option(help="row, layer, or N:M such as 2:4.")] = OatsConfig.pattern,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    threads: Annotated[
        int | None, typer.Option(help="Threads of both.", show_default="torch's default")
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Timed calls of each.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Time one layer, compressed against torch's dense one of the same dtype, alternating.

    The weights are random and cycle through more memory than the caches hold. The result is first compared
    with float64; a wrong one is not timed.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if dtype not in ("bf16", "fp32"):
        raise ConfigError(f'dtype must be "bf16" or "fp32", got {dtype!r}')

    import torch
    from rich.table import Table

    from oats.cli.console import human_bytes, print_json, progress_bar, results
    from oats.evaluate.layer import layer_latency

    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bar("Timing") as bar:
        result = layer_latency(
            d_out,
            d_in,
            batch=batch,
            compression=compression,
            rank_ratio=rank_ratio,
            pattern=pattern,
            dtype=dtype,
            repetitions=repetitions,
            progress=lambda done, total: bar.update(done, total, "calls of each"),
        )
    if as_json:
        print_json(result.to_dict())
        return

    table = Table(
        title=f"{d_out} x {d_in}, batch {batch}, {dtype}, threads {result.threads}, ISA {result.isa}",
        title_justify="left",
    )
    table.add_column("layer")
    for column in ("median ms", "p10–p90 ms", "weight", "GB/s", "copies cycled"):
        table.add_column(column, justify="right")
    for name, spread, size, speed, copies in (
        ("torch dense", result.dense_ms, result.dense_bytes, result.dense_gb_per_s, result.dense_copies),
        (
            "oats",
            result.compressed_ms,
            result.compressed_bytes,
            result.compressed_gb_per_s,
            result.compressed_copies,
        ),
    ):
        table.add_row(
            name,
            f"{spread.median:.3f}",
            f"{spread.p10:.3f}–{spread.p90:.3f}",
            human_bytes(size),
            f"{speed:.1f}",
            str(copies),
        )
    console = results()
    console.print(table)
    console.print(
        f"oats takes {1 / result.speedup:.2f} of the time of dense ({result.speedup:.2f} x as fast); "
        f"{repetitions} calls of each in turn.\n"
        f"compression {compression:g}, rank ratio {rank_ratio:g}, pattern {pattern}: rank {result.rank}, "
        f"density {result.nnz / (d_out * d_in):.3f}\n"
        f"largest error against float64, relative to Σ|w||x|: {result.error:.1e}\n"
        f"memory, read by torch's sum with the same threads: {result.read_gb_per_s:.1f} GB/s"
    )
    if result.compressed_ms.is_wide or result.dense_ms.is_wide:
        console.print("note: p90 is more than 1.5 x the median, so the machine was busy; run it again")
