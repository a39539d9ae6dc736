"""`compress_directory`: compress a model on disk, one block in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats._version import __version__
from oats.checkpoint.dense_source import DenseSource
from oats.checkpoint.file_blocks import FileBlocks
from oats.checkpoint.staging import Staging
from oats.compression.calibration import as_batches
from oats.compression.compress import checked_settings, tokens_per_batch
from oats.compression.conversion import convert
from oats.compression.distributed import Ranks
from oats.compression.memory import Limit, block_bytes, largest_need, resident_bytes
from oats.compression.report import CompressionReport, Progress
from oats.compression.targets import SPLIT, Targets, find_targets
from oats.compression.walk import Walk
from oats.config import OatsConfig
from oats.errors import DistributedError, UnsupportedModelError
from oats.models.architecture import output_head

LEAST_TOKENS = 256
"""Smaller batches than this save little memory, and take longer."""

_TOKENS = "tokens per batch"


@torch.no_grad()
def compress_directory(
    source: DenseSource,
    tokenizer: Any,
    calibration: Tensor,
    out: Path,
    config: OatsConfig | None = None,
    *,
    dtype: torch.dtype,
    split: Collection[str] = SPLIT,
    overwrite: bool = False,
    restart: bool = False,
    memory_limit: int | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    known: Mapping[str, Any] | None = None,
) -> CompressionReport:
    """Compress a model from its files to a directory; memory holds one block, and what is outside the blocks.

    The result equals that of :func:`oats.compress_` with the same batches. Finished blocks, and the hidden
    states that the next block starts from, are written to a directory beside `out`
    (:mod:`oats.checkpoint.staging`). A run can be stopped at any point: called again with the same arguments,
    it goes on after the last finished block and ends with the same files.

    With several ranks, each runs its share of the calibration batches and decomposes its share of each
    block's matrices. All must see the same directories. A run may go on with another number of ranks.

    Args:
        source: the dense model.
        tokenizer: saved beside the model, or None.
        calibration: token ids (sequences, length), int64.
        out: the directory to write; :func:`oats.checkpoint.saving.check_output` has allowed it.
        config: None means the defaults.
        dtype: in which layers are stored and run, torch.bfloat16 or torch.float32.
        split: as in :func:`oats.compress_`.
        overwrite: replace the model that is at `out`.
        restart: remove what an earlier run left unfinished.
        memory_limit: bytes that each process may have resident, by the operating system's count. Batches
            shrink until the run is predicted to keep the limit; a run that passes it stops.
        ranks: the processes of this run.
        progress: called after each layer, on the first rank.
        known: more for the model card, `source` and `calibration` of
            :func:`oats.checkpoint.model_card.write_model_card`.

    Raises:
        UnsupportedModelError, CalibrationError, WeightError: as :func:`oats.compress_`.
        ConfigError: as there; or an earlier run with other settings is unfinished; or the memory limit is
            too low.
        OutputExistsError: another run is writing to `out`.
        DistributedError: another rank is gone, or does not see the same directories.
        OatsError: a file cannot be written, or the memory limit was passed; finished blocks are kept.
    """
    config, ranks, limit = checked_settings(config, split), ranks or Ranks(), Limit(memory_limit)
    staging, model = Staging(out), source.model
    try:
        if ranks.rank == 0 and restart:
            staging.discard()
        targets = find_targets(model, source.path, source.blocks, config, split)
        tokens = None
        if ranks.rank == 0:
            tokens = _choose_tokens_per_batch(source, targets, staging, config, dtype, limit)
        tokens = ranks.broadcast(tokens)
        batches = as_batches(model, calibration, tokens)
        if len(batches) < ranks.size:
            raise DistributedError(
                f"{ranks.size} ranks share {len(batches)} calibration batches; start at most {len(batches)} "
                "ranks, or calibrate on more sequences"
            )
        convert(model, dtype)
        plan = _plan(source, calibration, config, dtype, split, tokens)
        store = FileBlocks(source, staging, plan, overwrite, len(batches), config, ranks, dtype, limit)

        def observe(*layer: Any) -> None:
            limit.check()
            if progress is not None and ranks.rank == 0:
                progress(*layer)

        walk = Walk(model, source.path, targets, batches, config, store, ranks=ranks, progress=observe)
        walk.start()
        try:
            report = walk.run(dtype)
        except BaseException as error:
            useless = isinstance(error, UnsupportedModelError)
            if ranks.rank == 0 and (useless or not staging.progress()["blocks"]):
                staging.remove()
            raise
        if ranks.rank == 0:
            if not staging.is_delivered():
                store.deliver(tokenizer, report, known or {})
            staging.remove()
        ranks.barrier()
        return report
    finally:
        staging.unlock()


def _choose_tokens_per_batch(
    source: DenseSource,
    targets: Targets,
    staging: Staging,
    config: OatsConfig,
    dtype: torch.dtype,
    limit: Limit,
) -> int:
    """As many as the unfinished run had, to go on from it; else as many as the limit allows.

    Raises:
        ConfigError: the limit is too low.
    """
    head = output_head(source.model) if config.head else None

    def need(tokens: int) -> dict[str, int]:
        blocks = zip(source.blocks, targets.blocks, strict=True)
        return {
            "the process": resident_bytes(),
            **({"the head's codes": 3 * head.weight.numel()} if isinstance(head, nn.Linear) else {}),
            "the embedding": source.model.get_input_embeddings().weight.nbytes,
            **largest_need(block_bytes(block, own, config, dtype, tokens) for block, own in blocks if own),
        }

    planned: int | None = staging.planned(_TOKENS)
    tokens = planned or tokens_per_batch(config)
    while not planned and not limit.allows(need(tokens)) and tokens > LEAST_TOKENS:
        tokens //= 2
    limit.check_need(need(tokens))
    return tokens


def _plan(
    source: DenseSource,
    calibration: Tensor,
    config: OatsConfig,
    dtype: torch.dtype,
    split: Collection[str],
    tokens: int,
) -> dict[str, Any]:
    """Everything that decides the result: a run goes on from another only if their plans are equal."""
    digest = hashlib.sha256(calibration.contiguous().numpy().tobytes()).hexdigest()[:16]
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    settings = (source.directory / "config.json").read_bytes() + json.dumps(files).encode()
    return {
        "oats-torch version": __version__,
        "model": str(source.directory.resolve()),
        "model's files": hashlib.sha256(settings).hexdigest()[:16],
        "blocks": source.path,
        "calibration": f"{tuple(calibration.shape)} tokens, sha256 {digest}",
        "dtype of the result": str(dtype),
        "split": sorted(split),
        _TOKENS: tokens,
        **asdict(config),
    }
