"""``oats compress MODEL OUT``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats.cli.options import (
    CalibrationText,
    DenseModel,
    Head,
    Json,
    Length,
    OutModel,
    OverwriteModel,
    Pattern,
    RankRatio,
    ScaleColumns,
    Seed,
    StoredDtype,
)
from oats.config import OatsConfig
from oats.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from oats.checkpoint.staging import Staging
    from oats.compression.distributed import Ranks


def compress(
    model: DenseModel,
    out: OutModel,
    method: Annotated[
        str,
        typer.Option(
            help="oats (the published method), oats-hessian (a lower loss, in more time), or to compare "
            "with: magnitude, wanda, sparsegpt, dsnot."
        ),
    ] = OatsConfig.method,
    compression: Annotated[
        float, typer.Option(help="Share of each layer's parameters to remove.")
    ] = OatsConfig.compression,
    rank_ratio: RankRatio = OatsConfig.rank_ratio,
    pattern: Pattern = OatsConfig.pattern,
    svd: Annotated[
        str, typer.Option(help="Low-rank step: fast, or exact (the published algorithm).")
    ] = OatsConfig.svd,
    iterations: Annotated[
        int | None, typer.Option(help="Alternations at most.", show_default="40 fast, 80 exact")
    ] = None,
    dtype: StoredDtype = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Glob of layer names to leave dense; may be repeated.", show_default="none"),
    ] = None,
    split_gate_up: Annotated[
        bool, typer.Option("--split-gate-up", help="Decompose a fused gate_up_proj as gate and up.")
    ] = False,
    seed: Seed = OatsConfig.seed,
    moments: Annotated[
        str,
        typer.Option(
            help="Inputs that a layer is fitted to: sequential (what the compressed blocks before it "
            "return, as published), or dense (those of the dense model)."
        ),
    ] = OatsConfig.moments,
    match_blocks: Annotated[
        int, typer.Option(help="Passes over the calibration text that tune each block's output; 2 is enough.")
    ] = OatsConfig.block_matching,
    budget: Annotated[
        str,
        typer.Option(help="Spread of the compression over layers: uniform (as published), owl, or error."),
    ] = OatsConfig.budget,
    try_rank_ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Rank ratio to try; each layer takes the best of those given. May be repeated.",
            show_default="only --rank-ratio",
        ),
    ] = None,
    calibration: CalibrationText = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Directory of images to calibrate a vision model on.", show_default="none"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration sequences (the paper: 128), or images.",
            show_default="64 sequences; all images, at most 2048",
        ),
    ] = None,
    length: Length = 512,
    blocks: Annotated[
        str | None,
        typer.Option(help="Dotted path of the list of transformer blocks.", show_default="found by itself"),
    ] = None,
    overwrite: OverwriteModel = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over, instead of after the last block of a stopped run.")
    ] = False,
    values: Annotated[
        str | None,
        typer.Option(help="How kept values are stored: int8 or int4 codes.", show_default="as --dtype"),
    ] = None,
    low_rank: Annotated[
        str | None,
        typer.Option(
            help="The same for the low-rank factors: int8, bf16, fp32.", show_default="as the values"
        ),
    ] = None,
    scale_columns: ScaleColumns = OatsConfig.scale_columns,
    head: Head = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory that each process may take, such as 6GB; batches shrink to keep it.",
            show_default="none",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress MODEL without retraining and save it to OUT as a Hugging Face directory.

    A run that was stopped goes on after its last finished block when it is started again. Under torchrun,
    several processes share the work: torchrun --nproc-per-node 4 -m oats compress MODEL OUT
    """
    config = OatsConfig(
        method=method,  # type: ignore[arg-type]  # OatsConfig checks it
        compression=compression,
        rank_ratio=rank_ratio,
        pattern=pattern,
        svd=svd,  # type: ignore[arg-type]
        iterations=iterations,
        dtype=dtype,  # type: ignore[arg-type]
        skip=tuple(skip or ()),
        seed=seed,
        moments=moments,  # type: ignore[arg-type]
        block_matching=match_blocks,
        budget=budget,  # type: ignore[arg-type]
        rank_ratios=tuple(try_rank_ratio or ()),
        values=values,  # type: ignore[arg-type]
        low_rank=low_rank,  # type: ignore[arg-type]
        scale_columns=scale_columns,
        head=head,  # type: ignore[arg-type]
    )

    from oats.compression.distributed import joined
    from oats.compression.memory import parse_size

    limit = None if memory_limit is None else parse_size(memory_limit)
    with joined() as ranks:
        report = _run(
            model, out, config, ranks,
            calibration=calibration, images=images, samples=samples, length=length, blocks=blocks,
            split=("qkv_proj", "gate_up_proj") if split_gate_up else ("qkv_proj",),
            overwrite=overwrite, restart=restart, memory_limit=limit,
        )  # fmt: skip
    if ranks.rank == 0:
        _print(report, as_json)


def _run(
    model: str,
    out: Path,
    config: OatsConfig,
    ranks: Ranks,
    *,
    calibration: Path | None,
    images: Path | None,
    samples: int | None,
    length: int,
    blocks: str | None,
    split: tuple[str, ...],
    overwrite: bool,
    restart: bool,
    memory_limit: int | None,
) -> dict[str, Any]:
    """Do it; returns what is to be said about it."""
    from oats.checkpoint.loading import load_dense_source, load_model
    from oats.checkpoint.model_card import write_model_card
    from oats.checkpoint.saving import check_output, save_model
    from oats.checkpoint.staging import Staging
    from oats.checkpoint.stored_model import read_stored_model
    from oats.cli.console import layers_progress, status
    from oats.compression.compress import compress_
    from oats.compression.memory import peak_bytes

    # Where an earlier run was stopped after it had given the model its name, little is left to do.
    staging = Staging(out.resolve())
    if ranks.rank == 0:
        staging.sweep()
    if not staging.is_delivered():
        check_output(out, overwrite=overwrite, source=model)
    out = staging.out
    with status(f"Loading {model}"):
        opened = load_dense_source(model, config.dtype, blocks)
        if opened is None:
            network, tokenizer = load_model(model, config.dtype, as_saved=True)
        else:
            source, tokenizer, dtype = opened
            network = source.model
    if tokenizer is None:
        data, calibrated_on = _images(network, model, images, samples, calibration)
    elif images is None:
        data, calibrated_on = _sequences(network, tokenizer, calibration, samples, length)
    else:
        raise ConfigError(f"{model} takes tokens: calibrate it on a text (--calibration), not on --images")
    started = time.perf_counter()
    with layers_progress() if ranks.rank == 0 else nullcontext() as progress:
        if opened is not None:
            from oats.checkpoint.streaming import compress_directory

            with _telling_where_it_stopped(staging):
                made = compress_directory(
                    source, tokenizer, data, out, config, dtype=dtype, split=split,
                    overwrite=overwrite, restart=restart, memory_limit=memory_limit, ranks=ranks,
                    progress=progress,
                )  # fmt: skip
        elif ranks.size > 1 or memory_limit is not None:
            raise ConfigError(
                f"{model} cannot be read block by block, as several processes and a memory limit need: it "
                "takes images, is no directory of safetensors files, or its blocks share weights or are "
                "stored in another form"
            )
        else:
            made = compress_(network, data, config, blocks=blocks, split=split, progress=progress)
    seconds = made.seconds_before + time.perf_counter() - started
    known: dict[str, Any] = {
        "source": model,
        "seconds": seconds,
        "calibration": {name: value for name, value in calibrated_on.items() if name != "characters"},
    }
    if "text" in calibrated_on:
        known["calibration"]["text"] = Path(calibrated_on["text"]).name
    if opened is None:
        with status(f"Saving {out}"):
            save_model(network, tokenizer, out, overwrite=overwrite, report=made, **known)
    elif ranks.rank == 0:
        write_model_card(out, made, **known)
    ranks.barrier()

    stored = read_stored_model(out)
    layer_bytes = sum(layer.stored_bytes for layer in stored.layers)
    dense_bytes = sum(layer.dense_bf16_bytes for layer in stored.layers)
    return {
        "model": model,
        "out": str(out),
        "method": config.method,
        "block_matching": config.block_matching,
        **config.to_dict(),
        "iterations": config.resolved_iterations,
        "calibration": calibrated_on,
        "generates": bool(network.can_generate()),
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes(),
        "layers": len(stored.layers),
        "layer_bytes": layer_bytes,
        "share_of_dense_bf16": layer_bytes / dense_bytes if dense_bytes else None,
        "disk_bytes": stored.disk_bytes,
    }


def _sequences(
    network: Any, tokenizer: Any, calibration: Path | None, samples: int | None, length: int
) -> tuple[Tensor, dict[str, Any]]:
    """Token ids, and what identifies them."""
    from oats.compression.calibration_text import builtin_text, calibration_sequences, read_text

    samples = 64 if samples is None else samples
    text = builtin_text("first") if calibration is None else read_text(calibration)
    vocabulary = network.get_input_embeddings().num_embeddings
    windows = calibration_sequences(tokenizer, text, vocabulary, samples, length)
    return windows, {**text.settings(), "samples": samples, "length": length}


def _images(
    network: Any, model: str, images: Path | None, samples: int | None, calibration: Path | None
) -> tuple[Tensor, dict[str, Any]]:
    """Pixels, and what identifies them."""
    from hashlib import sha256

    from oats.cli.console import status
    from oats.integrations.vision import calibration_images, read_images

    if images is None or calibration is not None:
        raise ConfigError(
            f"{model} ({type(network).__name__}) takes images: calibrate it on a directory of images like "
            "those that it is for (--images DIR)" + (", not on a text" if calibration is not None else "")
        )
    chosen = calibration_images(images, samples)
    with status(f"Reading {len(chosen)} images"):
        pixels = read_images(chosen, network, model)
    content = sha256()
    for file in chosen:
        content.update(file.read_bytes())
    return pixels, {
        "images": images.resolve().name,
        "sha256": content.hexdigest()[:12],
        "samples": len(chosen),
    }


@contextmanager
def _telling_where_it_stopped(staging: Staging) -> Iterator[None]:
    from oats.cli.console import notes

    try:
        yield
    except KeyboardInterrupt:
        if staging.exists():
            blocks = staging.progress()["blocks"]
            notes().print(f"Stopped after {blocks} finished blocks; the same command goes on from there.")
        raise


def _print(report: dict[str, Any], as_json: bool) -> None:
    from oats.cli.console import human_bytes, human_time, print_json, results, settings_table

    if as_json:
        print_json(report)
        return
    share, calibration = report["share_of_dense_bf16"], report["calibration"]
    if "images" in calibration:
        calibrated_on = f"{calibration['samples']} images of {calibration['images']}"
    else:
        calibrated_on = (
            f"{calibration['samples']} x {calibration['length']} tokens of {calibration['text']}, "
            f"{calibration['split']}"
        )
    commands = ["oats info {}"]
    if report["generates"]:
        commands = ["oats eval {}", "oats generate {} 'Once upon a time'", *commands]
    results().print(
        settings_table(
            {
                "saved": report["out"],
                "layers": f"{report['layers']} compressed in {human_time(report['seconds'])}",
                "memory": f"{human_bytes(report['peak_memory_bytes'])} at most",
                "linear layers": human_bytes(report["layer_bytes"])
                + (f" ({share:.3f} of dense bf16)" if share else ""),
                "on disk": f"{human_bytes(report['disk_bytes'])} in all, embeddings and tokenizer included",
                "calibration": calibrated_on,
                "next": " · ".join(command.format(report["out"]) for command in commands),
            }
        )
    )
