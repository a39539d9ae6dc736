"""Compression of a model on disk, one block in memory at a time, that goes on where it was stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oats._version import __version__
from oats.checkpoint.atomic_file import write_file, write_text
from oats.checkpoint.companions import copy_companions
from oats.checkpoint.dense_source import DenseSource
from oats.checkpoint.layer_table import compressed_layers, storable
from oats.checkpoint.model_card import write_model_card
from oats.checkpoint.quantization_config import quantization_dict
from oats.checkpoint.saving import check_output
from oats.checkpoint.staging import DENSE, HIDDEN, MEASURED, Staging
from oats.checkpoint.stored_tensor import read_header
from oats.compression.allocation import allocate, measure_block
from oats.compression.block_runner import BlockRunner, evaluating, first_sequence
from oats.compression.calibration import as_batches
from oats.compression.compress import checked_config, tokens_per_batch
from oats.compression.conversion import convert
from oats.compression.distributed import Ranks
from oats.compression.head import store_head_as_codes_
from oats.compression.memory import Limit, block_bytes, largest_need, resident_bytes, return_freed
from oats.compression.report import CompressionReport, LayerReport, Progress
from oats.compression.targets import SPLIT, Targets, find_targets
from oats.compression.walk import Walk
from oats.config import OatsConfig
from oats.errors import DistributedError, UnsupportedModelError
from oats.models.architecture import output_head

JOINED_BYTES = 1_000_000_000
"""A model whose files hold no more than this in all becomes one file."""

SHARD_BYTES = 1_500_000_000
"""What is not in a block goes to files of about this size."""

LEAST_TOKENS = 256
"""Batches of fewer tokens than this save no memory to speak of, and take longer."""

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
) -> CompressionReport:
    """Compress a model from its files to a directory; in memory are one block and what is outside the blocks.

    The result is that of :func:`oats.compress_` with the same batches. Each block is written when it is done,
    to a directory beside `out` (:mod:`oats.checkpoint.staging`), and so is what the blocks return for the
    calibration data. Called again with the same arguments after it was stopped, at whatever point, it goes on
    after the last finished block and ends with the same files.

    With several ranks, each runs its share of the calibration batches and decomposes its share of each
    block's matrices. All must see the same directories. Their number may be another when a run goes on.

    Args:
        source: the dense model.
        tokenizer: to save beside it, or None.
        calibration: token ids (sequences, length), int64.
        out: the directory to write; checked by :func:`oats.checkpoint.saving.check_output`.
        config: None means the defaults.
        dtype: in which layers are stored and run, torch.bfloat16 or torch.float32.
        split: as in :func:`oats.compress_`.
        overwrite: replace the model that is at `out`.
        restart: forget what an earlier run left unfinished.
        memory_limit: in bytes, of each process, by the operating system's count of what is resident. Batches
            are made smaller until the run is predicted to keep it, and the run stops if it does not.
        ranks: the processes of this run.
        progress: called after each layer, on the first rank.

    Raises:
        UnsupportedModelError, CalibrationError, WeightError: as :func:`oats.compress_`.
        ConfigError: as there; or an earlier run of other settings is unfinished; or the memory limit is too
            low.
        OutputExistsError: another run is writing to `out`.
        DistributedError: another rank is gone, or does not see the same directories.
        OatsError: a file cannot be written, or the memory limit was passed; finished blocks are kept.
    """
    staging = Staging(out)
    try:
        return _compress(
            source,
            tokenizer,
            calibration,
            staging,
            checked_config(config, split),
            dtype,
            split,
            overwrite,
            restart,
            Limit(memory_limit),
            ranks or Ranks(),
            progress,
        )
    finally:
        staging.unlock()


def _compress(
    source: DenseSource,
    tokenizer: Any,
    calibration: Tensor,
    staging: Staging,
    config: OatsConfig,
    dtype: torch.dtype,
    split: Collection[str],
    overwrite: bool,
    restart: bool,
    limit: Limit,
    ranks: Ranks,
    progress: Progress | None,
) -> CompressionReport:
    if ranks.rank == 0 and restart:
        staging.discard()
    targets = find_targets(source.model, source.path, source.blocks, config, split)
    tokens = _tokens_per_batch(source, targets, staging, config, dtype, limit) if ranks.rank == 0 else None
    tokens = ranks.broadcast(tokens)
    batches = as_batches(source.model, calibration, tokens)
    if len(batches) < ranks.size:
        raise DistributedError(
            f"{ranks.size} ranks share {len(batches)} calibration batches; start at most {len(batches)} "
            "ranks, or calibrate on more sequences"
        )
    run = _Run(source, staging, targets, batches, config, dtype, ranks, limit, progress)
    with evaluating(source.model):
        convert(source.model, dtype)
        if config.head:
            store_head_as_codes_(source.model, config.scale_columns)
        if ranks.rank == 0:
            plan = _plan(source, calibration, config, dtype, split, tokens)
            if staging.is_delivered() and staging.differences(plan):
                staging.discard()
                check_output(staging.out, overwrite=overwrite)
            run.prepare(plan)
        state = ranks.broadcast(staging.progress() if ranks.rank == 0 else None)
        if not staging.exists():
            raise DistributedError(
                f"rank {ranks.rank} does not see {staging.directory}, which rank 0 made; all ranks need the "
                "same file system"
            )
        before = _seconds(state)
        try:
            state = run.walk(state)
        except BaseException as error:
            if ranks.rank == 0:
                # A rank that is gone may have been at work on what is there.
                nothing = isinstance(error, UnsupportedModelError) or not staging.progress()["blocks"]
                if nothing:
                    staging.remove()
            raise
    if ranks.rank == 0:
        if not staging.is_delivered():
            run.complete(state, tokenizer)
            staging.deliver(overwrite=overwrite)
        staging.remove()
    ranks.barrier()
    return _report(config, state, before)


def _tokens_per_batch(
    source: DenseSource,
    targets: Targets,
    staging: Staging,
    config: OatsConfig,
    dtype: torch.dtype,
    limit: Limit,
) -> int:
    """What the run had that this one goes on from; else as many as the limit allows.

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

    planned: int | None = staging.planned(_TOKENS) if staging.exists() else None
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
    """What decides the result: a run that is stopped goes on only from the same."""
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


@dataclass
class _Run:
    source: DenseSource
    staging: Staging
    targets: Targets
    batches: list[dict[str, Tensor]]
    config: OatsConfig
    dtype: torch.dtype
    ranks: Ranks
    limit: Limit
    progress: Progress | None

    def prepare(self, plan: dict[str, Any]) -> None:
        """Find what an earlier run left, or that this run can work; on the first rank."""
        source, staging = self.source, self.staging
        staging.lock()
        if staging.exists():
            staging.check_plan(plan)
            if staging.progress()["blocks"]:
                return
        # What cannot work is found before anything is written.
        runner = BlockRunner(source.model, list(source.blocks), [first_sequence(self.batches)])
        for index, block in enumerate(self.targets.blocks):
            source.fill(index, self.dtype)
            Targets([block], {}).check(self.config)
            runner.advance(index)
            source.release(index)
        staging.create(plan)
        staging.lock()

    def walk(self, state: dict[str, Any]) -> dict[str, Any]:
        """Compress the blocks that are not finished.

        Args:
            state: what :meth:`Staging.commit` took last.

        Returns:
            What it took in the end.
        """
        source, staging, ranks = self.source, self.staging, self.ranks
        before, started = _seconds(state), time.perf_counter()
        compressions = self._compressions()
        first, last, count = state["blocks"], len(source.blocks) - 1, len(self.batches)
        walk = Walk(
            source.model,
            source.path,
            self.targets,
            self.batches,
            self.config,
            compressions=compressions,
            held=staging.states(HIDDEN, first, count) if first else None,
            dense_held=staging.states(DENSE, first, count) if first else None,
            ranks=ranks,
            progress=self._observe,
            report=_report(self.config, state) if first else None,
        )
        table = dict(state.get("table", {}))
        for index in range(first, last + 1):
            source.fill(index, self.dtype)
            walk.compress_block(index, staging.states(DENSE, index + 1, count))
            if ranks.rank == 0:
                table |= self._write_block(index)
            if index < last:
                walk.advance(index, staging.states(HIDDEN, index + 1, count))
            walk.restore()
            source.release(index)
            return_freed()
            self.limit.check()
            # The inputs of the next block, all ranks' share of them, are on disk.
            ranks.barrier()
            state = {
                "blocks": index + 1,
                "layers": [asdict(layer) for layer in walk.report.layers],
                "left_dense": walk.report.left_dense,
                "matched": walk.report.matched,
                "table": table,
                "seconds": before + time.perf_counter() - started,
            }
            if ranks.rank == 0:
                staging.commit(state)
        walk.conclude()
        return state

    def _observe(self, done: int, total: int, name: str, error: float) -> None:
        self.limit.check()
        if self.progress is not None and self.ranks.rank == 0:
            self.progress(done, total, name, error)

    def _compressions(self) -> dict[str, float]:
        """Those of the matrices, where they are not all the same; from a pass through the dense model."""
        source, staging, ranks = self.source, self.staging, self.ranks
        if self.config.budget == "uniform":
            return {}
        found = ranks.broadcast(staging.compressions() if ranks.rank == 0 else None)
        if found is not None:
            return found
        runner, measures = BlockRunner(source.model, list(source.blocks), self.batches, ranks=ranks), []
        for index, block in enumerate(self.targets.blocks):
            source.fill(index, self.dtype)
            measures.append(measure_block(runner, index, block, self.config))
            runner.advance(index, staging.states(MEASURED, index + 1, len(self.batches)))
            source.release(index)
            return_freed()
            self.limit.check()
            ranks.barrier()
            if ranks.rank == 0:
                staging.drop(MEASURED, keep=index + 1)
        found = allocate(measures, self.config)
        if ranks.rank == 0:
            staging.note_compressions(found)
        return found

    def _write_block(self, index: int) -> dict[str, dict[str, Any]]:
        """Write a compressed block; returns its layers' entries in the configuration."""
        model, block, prefix = self.source.model, self.source.blocks[index], f"{self.source.path}.{index}."
        sizes, names = compressed_layers(block, prefix)
        tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
        self._write(self._shard(index), _as_saved(model, storable(model, tensors, names)))
        return sizes

    def complete(self, state: dict[str, Any], tokenizer: Any) -> None:
        """Write what belongs to the model beside its blocks, the index and the configuration last."""
        model, staging = self.source.model, self.staging
        # Outside the blocks, that is the head.
        head, coded = compressed_layers(model)
        single = staging.model / "model.safetensors"
        if not single.is_file():
            for number, names in enumerate(self._rest):
                tensors = storable(model, model.state_dict(), coded)
                rest = _as_saved(model, {name: tensors[name] for name in names if name in tensors})
                self._write(self._shard(len(self.source.blocks) + number), rest)
            self._index_or_join(single)
        if single.is_file():
            for shard in staging.model.glob("model-*.safetensors"):
                shard.unlink()
        model.config.dtype = str(self.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.quantization_config = quantization_dict(self.config, {**state["table"], **head})
        with staging.writing():
            if tokenizer is not None:
                tokenizer.save_pretrained(staging.model)
            copy_companions(self.source.directory, staging.model)
            if model.can_generate():
                model.generation_config.save_pretrained(staging.model)
            model.config.save_pretrained(staging.model)
            write_model_card(staging.model, name=staging.out.name)

    def _index_or_join(self, single: Path) -> None:
        """Say what is in which file; or, of a small model, make one of them."""
        from safetensors.torch import load_file

        headers = {shard: read_header(shard) for shard in sorted(single.parent.glob("model-*.safetensors"))}
        total = sum(tensor.nbytes for header in headers.values() for tensor in header.values())
        if total <= JOINED_BYTES:
            self._write(single.name, {k: v for shard in headers for k, v in load_file(shard).items()})
            return
        weight_map = {name: shard.name for shard, header in headers.items() for name in header}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        with self.staging.writing():
            write_text(single.with_name("model.safetensors.index.json"), text, alone=True)

    @functools.cached_property
    def _rest(self) -> list[list[str]]:
        """Names of the tensors outside the blocks, in groups of about `SHARD_BYTES`; tied ones once."""
        tied = getattr(self.source.model, "all_tied_weights_keys", {})
        groups: list[list[str]] = []
        room = 0
        for name, tensor in self.source.model.state_dict().items():
            if name.startswith(f"{self.source.path}.") or name in tied:
                continue
            if not groups or tensor.nbytes > room:
                groups.append([])
                room = SHARD_BYTES
            groups[-1].append(name)
            room -= tensor.nbytes
        return groups

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self.source.blocks) + len(self._rest):05}.safetensors"

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        with self.staging.writing():
            write_file(
                self.staging.model / name, lambda path: save_file(tensors, path, {"format": "pt"}), alone=True
            )


def _as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that ``save_pretrained`` gives them."""
    from transformers.core_model_loading import revert_weight_conversion

    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}


def _seconds(state: dict[str, Any]) -> float:
    return float(state.get("seconds", 0.0))


def _report(config: OatsConfig, state: dict[str, Any], seconds_before: float = 0.0) -> CompressionReport:
    return CompressionReport(
        config,
        [LayerReport(**layer) for layer in state["layers"]],
        dict(state["left_dense"]),
        {block: (before, after) for block, (before, after) in state["matched"].items()},
        seconds_before,
    )
