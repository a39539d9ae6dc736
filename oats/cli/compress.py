"""``oats compress MODEL OUT``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import oats.cli.options as options
from oats.config import OatsConfig

if TYPE_CHECKING:
    from torch import Tensor


def compress(
    model: options.DenseModel,
    out: options.OutModel,
    method: Annotated[
        str,
        Option(
            help="oats (the published method), oats-hessian (a lower loss, in more time), or to compare "
            "with: magnitude, wanda, sparsegpt, dsnot."
        ),
    ] = OatsConfig.method,
    compression: Annotated[
        float, Option(help="Share of each layer's parameters to remove.")
    ] = OatsConfig.compression,
    rank_ratio: options.RankRatio = OatsConfig.rank_ratio,
    pattern: options.Pattern = OatsConfig.pattern,
    svd: Annotated[
        str, Option(help="Low-rank step: fast, or exact (the published algorithm).")
    ] = OatsConfig.svd,
    iterations: Annotated[
        int | None, Option(help="Alternations at most.", show_default="40 fast, 80 exact")
    ] = None,
    dtype: options.StoredDtype = None,
    skip: Annotated[
        list[str] | None,
        Option(help="Glob of layer names to leave dense; may be repeated.", show_default="none"),
    ] = None,
    split_gate_up: Annotated[
        bool, Option("--split-gate-up", help="Decompose a fused gate_up_proj as gate and up.")
    ] = False,
    seed: options.Seed = OatsConfig.seed,
    moments: Annotated[
        str,
        Option(
            help="Inputs that a layer is fitted to: sequential (what the compressed blocks before it "
            "return, as published), or dense (those of the dense model)."
        ),
    ] = OatsConfig.moments,
    match_blocks: Annotated[
        int, Option(help="Passes over the calibration text that tune each block's output; 2 is enough.")
    ] = OatsConfig.block_matching,
    budget: Annotated[
        str, Option(help="Spread of the compression over layers: uniform (as published), owl, or error.")
    ] = OatsConfig.budget,
    try_rank_ratio: Annotated[
        list[float] | None,
        Option(
            help="Rank ratio to try; each layer takes the best of those given. May be repeated.",
            show_default="only --rank-ratio",
        ),
    ] = None,
    calibration: options.CalibrationText = None,
    images: Annotated[
        Path | None, Option(help="Directory of images to calibrate a vision model on.", show_default="none")
    ] = None,
    samples: Annotated[
        int | None,
        Option(
            help="Calibration sequences (the paper: 128), or images.",
            show_default="64 sequences; all images, at most 2048",
        ),
    ] = None,
    length: options.Length = 512,
    blocks: Annotated[
        str | None,
        Option(help="Dotted path of the list of transformer blocks.", show_default="found by itself"),
    ] = None,
    overwrite: options.OverwriteModel = False,
    restart: Annotated[
        bool, Option("--restart", help="Start over, instead of after the last block of a stopped run.")
    ] = False,
    values: Annotated[
        str | None, Option(help="How kept values are stored: int8 or int4 codes.", show_default="as --dtype")
    ] = None,
    low_rank: Annotated[
        str | None,
        Option(help="The same for the low-rank factors: int8, bf16, fp32.", show_default="as the values"),
    ] = None,
    scale_columns: options.ScaleColumns = OatsConfig.scale_columns,
    head: options.Head = None,
    memory_limit: Annotated[
        str | None,
        Option(
            help="Memory that each process may take, such as 6GB; batches shrink to keep it.",
            show_default="none",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Compress MODEL without retraining and save it to OUT as a Hugging Face directory.

    A run that was stopped goes on after its last finished block when it is started again. Under torchrun,
    several processes share the work: torchrun --nproc-per-node 4 -m oats compress MODEL OUT
    """
    config = OatsConfig(
        compression=compression, rank_ratio=rank_ratio, pattern=pattern, iterations=iterations, seed=seed,
        skip=tuple(skip or ()), block_matching=match_blocks, rank_ratios=tuple(try_rank_ratio or ()),
        scale_columns=scale_columns,
        # OatsConfig checks these.
        method=method, svd=svd, moments=moments, budget=budget, dtype=dtype,  # type: ignore[arg-type]
        values=values, low_rank=low_rank, head=head,  # type: ignore[arg-type]
    )  # fmt: skip

    from oats.checkpoint.compress_model import compress_model
    from oats.cli.console import layers_progress, status
    from oats.compression.distributed import joined
    from oats.compression.memory import parse_size

    limit = None if memory_limit is None else parse_size(memory_limit)
    with joined() as ranks, _saying_where_it_stopped(out):
        result = compress_model(
            model, out, config, text=calibration, samples=samples, length=length,
            read_images=None if images is None else partial(_read_images, model, images, samples),
            blocks=blocks, split=("qkv_proj", "gate_up_proj") if split_gate_up else ("qkv_proj",),
            overwrite=overwrite, restart=restart, memory_limit=limit, ranks=ranks,
            status=status, progress=layers_progress if ranks.rank == 0 else nullcontext,
        )  # fmt: skip
    if ranks.rank == 0:
        _print(result, as_json)


def _read_images(
    model: str, directory: Path, samples: int | None, network: Any
) -> tuple[Tensor, dict[str, Any]]:
    from oats.cli.console import status
    from oats.integrations.vision import calibration_images, identify_images, read_images

    files = calibration_images(directory, samples)
    with status(f"Reading {len(files)} images"):
        return read_images(files, network, model), identify_images(files, directory)


@contextmanager
def _saying_where_it_stopped(out: Path) -> Iterator[None]:
    from oats.checkpoint.staging import Staging
    from oats.cli.console import notes

    try:
        yield
    except KeyboardInterrupt:
        staging = Staging(out.resolve())
        if staging.exists():
            blocks = staging.progress()["blocks"]
            notes().print(f"Stopped after {blocks} finished blocks; the same command goes on from there.")
        raise


def _print(result: dict[str, Any], as_json: bool) -> None:
    from oats.cli.console import human_bytes, human_time, print_json, results, settings_table

    if as_json:
        print_json(**result)
        return
    share, calibration = result["share_of_dense_bf16"], result["calibration"]
    if "images" in calibration:
        calibrated_on = f"{calibration['samples']} images of {calibration['images']}"
    else:
        calibrated_on = (
            f"{calibration['samples']} x {calibration['length']} tokens of {calibration['text']}, "
            f"{calibration['split']}"
        )
    commands = ["oats info {}"]
    if result["generates"]:
        commands = ["oats eval {}", "oats generate {} 'Once upon a time'", *commands]
    settings = {
        "saved": result["out"],
        "layers": f"{result['layers']} compressed in {human_time(result['seconds'])}",
        "memory": f"{human_bytes(result['peak_memory_bytes'])} at most",
        "linear layers": human_bytes(result["layer_bytes"])
        + (f" ({share:.3f} of dense bf16)" if share else ""),
        "on disk": f"{human_bytes(result['disk_bytes'])} in all, embeddings and tokenizer included",
        "calibration": calibrated_on,
        "next": " · ".join(command.format(result["out"]) for command in commands),
    }
    results().print(settings_table(settings))
