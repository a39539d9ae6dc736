"""``oats compress MODEL OUT``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from oats.config import OatsConfig


def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory (safetensors or GGUF), .gguf file, or hub name.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to write; must be empty or not exist.")
    ],
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
    rank_ratio: Annotated[
        float, typer.Option(help="Share of the kept parameters that goes to the low-rank part.")
    ] = OatsConfig.rank_ratio,
    pattern: Annotated[
        str, typer.Option(help="Where non-zeros may sit: row, layer, or N:M such as 2:4.")
    ] = OatsConfig.pattern,
    svd: Annotated[
        str, typer.Option(help="Low-rank step: fast, or exact (the published algorithm).")
    ] = OatsConfig.svd,
    iterations: Annotated[
        int | None, typer.Option(help="Alternations at most.", show_default="40 fast, 80 exact")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the result: bf16 or fp32.", show_default="the model's own; GGUF: bf16"),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Glob of layer names to leave dense; may be repeated.")
    ] = None,
    split_gate_up: Annotated[
        bool, typer.Option("--split-gate-up", help="Decompose a fused gate_up_proj as gate and up.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the fast low-rank step.")] = OatsConfig.seed,
    match_blocks: Annotated[
        int, typer.Option(help="Passes over the calibration text that tune each block's output; 2 is enough.")
    ] = OatsConfig.block_matching,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text to calibrate on.", show_default="first half of Python's pydoc_data.topics"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences (the paper: 128).")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a calibration sequence (the paper: 2048).")] = 512,
    blocks: Annotated[
        str | None,
        typer.Option(help="Dotted path of the list of transformer blocks.", show_default="found by itself"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is at OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compress MODEL without retraining and save it to OUT as a Hugging Face directory."""
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
        block_matching=match_blocks,
    )

    from oats.cli.console import human_bytes, print_json, progress_bar, results, settings_table, status
    from oats.compress import compress_
    from oats.evaluate.text import bos_token_id, builtin_text, calibration_windows, read_text, tokenize
    from oats.integrations.checkpoint import check_output, load_model, save_model
    from oats.integrations.stored_model import read_stored_model

    check_output(out, overwrite=overwrite, source=model)
    text = builtin_text("first") if calibration is None else read_text(calibration)
    with status(f"Loading {model}"):
        network, tokenizer = load_model(model, dtype)
    windows = calibration_windows(
        tokenize(tokenizer, text, network.get_input_embeddings().num_embeddings),
        samples,
        length,
        bos=bos_token_id(tokenizer),
        name=text.name,
    )
    started = time.perf_counter()
    with progress_bar("Compressing") as bar:
        compress_(
            network,
            windows,
            config,
            blocks=blocks,
            split=("qkv_proj", "gate_up_proj") if split_gate_up else ("qkv_proj",),
            progress=lambda done, total, name, error: bar.update(done, total, f"{name}  error {error:.3f}"),
        )
    seconds = time.perf_counter() - started
    with status(f"Saving {out}"):
        save_model(network, tokenizer, out, overwrite=overwrite)

    stored = read_stored_model(out)
    layer_bytes = sum(layer.stored_bytes for layer in stored.layers)
    dense_bytes = sum(layer.dense_bf16_bytes for layer in stored.layers)
    report = {
        "model": model,
        "out": str(out),
        "method": config.method,
        "block_matching": config.block_matching,
        **config.to_dict(),
        "iterations": config.resolved_iterations,
        "calibration": {**text.settings(), "samples": samples, "length": length},
        "seconds": seconds,
        "layers": len(stored.layers),
        "layer_bytes": layer_bytes,
        "share_of_dense_bf16": layer_bytes / dense_bytes if dense_bytes else None,
        "disk_bytes": stored.disk_bytes,
    }
    if as_json:
        print_json(report)
        return
    share = f" ({layer_bytes / dense_bytes:.3f} of dense bf16)" if dense_bytes else ""
    results().print(
        settings_table(
            {
                "saved": out,
                "layers": f"{len(stored.layers)} compressed in {seconds:.0f} s",
                "linear layers": human_bytes(layer_bytes) + share,
                "on disk": f"{human_bytes(stored.disk_bytes)} in all, embeddings and tokenizer included",
                "calibration": f"{samples} x {length} tokens of {text.name}, {text.split}",
            }
        )
    )
