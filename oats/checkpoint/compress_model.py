"""`compress_model`: compress a model that a user names, from its files or in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from oats.checkpoint import loading
from oats.checkpoint.saving import check_output, save_model
from oats.checkpoint.staging import Staging
from oats.checkpoint.stored_model import read_stored_model
from oats.checkpoint.streaming import compress_directory
from oats.compression.calibration_text import calibration_text
from oats.compression.compress import compress_
from oats.compression.distributed import Ranks
from oats.compression.memory import peak_bytes
from oats.compression.report import Progress
from oats.compression.targets import SPLIT
from oats.compression.tokenization import calibration_sequences
from oats.config import OatsConfig
from oats.errors import ConfigError


def compress_model(
    model: str,
    out: Path,
    config: OatsConfig,
    *,
    text: Path | None = None,
    samples: int | None = None,
    length: int = 512,
    read_images: Callable[[Any], tuple[Tensor, dict[str, Any]]] | None = None,
    blocks: str | None = None,
    split: Collection[str] = SPLIT,
    overwrite: bool = False,
    restart: bool = False,
    memory_limit: int | None = None,
    ranks: Ranks | None = None,
    status: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
) -> dict[str, Any]:
    """Compress a model and save it as a Hugging Face directory.

    The model is read block by block if its files allow it (:mod:`oats.checkpoint.streaming`); else all of it
    is loaded.

    Args:
        model: a local directory, a GGUF file, or a name on the Hugging Face hub.
        out: the directory to write.
        config: settings of the run.
        text: UTF-8 file to calibrate on; None means :func:`oats.compression.calibration_text.builtin_text`.
        samples: calibration sequences; None means 64.
        length: tokens of each sequence.
        read_images: for a model that takes images: the model → pixels to calibrate on, and what identifies
            them, as plain JSON values.
        blocks: dotted path of the list of blocks; None tries the known paths.
        split: as in :func:`oats.compress_`.
        overwrite, restart, memory_limit, ranks: as in
            :func:`oats.checkpoint.streaming.compress_directory`.
        status: a context for a step of unknown length, given what goes on.
        progress: a context for the compression, which gives what is called after each layer.

    Returns:
        The settings, and what the run took and made, as plain JSON values.

    Raises:
        OatsError: as :func:`oats.checkpoint.loading.load_model`, `compress_directory`,
            :func:`oats.compress_` and :func:`oats.checkpoint.saving.save_model`.
        ConfigError: text is given for images or the reverse; or the model must be loaded as a whole, which
            goes with neither several ranks nor a memory limit.
    """
    ranks = ranks or Ranks()
    staging = Staging(out.resolve())
    if ranks.rank == 0:
        staging.sweep()
    # A delivered model is at `out` already: only the end of that run is left to do.
    if not staging.is_delivered():
        check_output(out, overwrite=overwrite, source=model)
    out = staging.out
    with status(f"Loading {model}"):
        opened = loading.load_dense_source(model, config.dtype, blocks)
        if opened is None:
            network, tokenizer = loading.load_model(model, config.dtype, as_saved=True)
        else:
            source, tokenizer, dtype = opened
            network = source.model
    if tokenizer is not None:
        if read_images is not None:
            raise ConfigError(
                f"{model} takes tokens: calibrate it on a text (--calibration), not on --images"
            )
        letters, samples = calibration_text(text), 64 if samples is None else samples
        vocabulary = network.get_input_embeddings().num_embeddings
        data = calibration_sequences(tokenizer, letters, vocabulary, samples, length)
        calibration = {**letters.settings(), "samples": samples, "length": length}
    elif read_images is None or text is not None:
        raise ConfigError(
            f"{model} ({type(network).__name__}) takes images: calibrate it on a directory of images like "
            "those that it is for (--images DIR)" + ("" if text is None else ", not on a text")
        )
    else:
        data, calibration = read_images(network)
    identity = {name: value for name, value in calibration.items() if name != "characters"}
    if "text" in identity:
        identity["text"] = Path(identity["text"]).name
    known: dict[str, Any] = {"source": model, "calibration": identity}
    started = time.perf_counter()
    with progress() as on_layer:
        if opened is not None:
            report = compress_directory(
                source, tokenizer, data, out, config, dtype=dtype, split=split, overwrite=overwrite,
                restart=restart, memory_limit=memory_limit, ranks=ranks, progress=on_layer, known=known,
            )  # fmt: skip
        elif ranks.size > 1 or memory_limit is not None:
            raise ConfigError(
                f"{model} cannot be read block by block, as several processes and a memory limit need: it "
                "takes images, is no directory of safetensors files, or its blocks share weights or are "
                "stored in another form"
            )
        else:
            report = compress_(network, data, config, blocks=blocks, split=split, progress=on_layer)
    seconds = report.seconds_before + time.perf_counter() - started
    if opened is None:
        with status(f"Saving {out}"):
            save_model(network, tokenizer, out, overwrite=overwrite, report=report, seconds=seconds, **known)
    stored = read_stored_model(out)
    return {
        "model": model,
        "out": str(out),
        "method": config.method,
        "block_matching": config.block_matching,
        **config.to_dict(),
        "iterations": config.resolved_iterations,
        "calibration": calibration,
        "generates": bool(network.can_generate()),
        "seconds": seconds,
        "peak_memory_bytes": peak_bytes(),
        "layers": len(stored.layers),
        "layer_bytes": stored.layer_bytes,
        "share_of_dense_bf16": stored.share_of_dense_bf16,
        "disk_bytes": stored.disk_bytes,
    }
