"""Blocks that are read from a dense model's files, and written to a directory from which a run can go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from oats.checkpoint.companions import copy_companions
from oats.checkpoint.config_json import quantization_dict
from oats.checkpoint.dense_source import DenseSource
from oats.checkpoint.model_card import write_model_card
from oats.checkpoint.saving import check_output
from oats.checkpoint.shards import Shards
from oats.checkpoint.staging import Staging, StoredStates
from oats.compression.distributed import Ranks
from oats.compression.memory import Limit, return_freed
from oats.compression.report import CompressionReport, LayerReport
from oats.compression.walk import BlockStore
from oats.config import OatsConfig
from oats.errors import DistributedError
from oats.models.linear import replace_


@dataclass
class FileBlocks(BlockStore):
    """The blocks of one run: at most one of them is in memory.

    Args:
        source: the dense model.
        staging: gets finished blocks and hidden states.
        plan: everything that decides the result; a run goes on from another only if their plans are equal.
        overwrite: whether the model at ``staging.out`` may be replaced.
        batches: number of calibration batches.
        config, ranks: of the run.
        dtype: of the weights that the model gets.
        limit: to the memory of this process.
    """

    source: DenseSource
    staging: Staging
    plan: dict[str, Any]
    overwrite: bool
    batches: int
    config: OatsConfig
    ranks: Ranks
    dtype: torch.dtype
    limit: Limit
    table: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries of the finished layers in ``quantization_config.layers``, on the first rank."""

    def __post_init__(self) -> None:
        self._shards = Shards(self.source, self.staging)
        self._started = time.perf_counter()

    def start(self, rehearse: Callable[[], None]) -> tuple[int, CompressionReport | None]:
        """Find what an earlier run finished; or else rehearse, and make the staging directory.

        Raises:
            OutputExistsError: another run is at work.
            ConfigError: an unfinished run had other settings.
            DistributedError: this rank does not see the directory.
        """
        staging = self.staging
        if self.ranks.rank == 0:
            if staging.is_delivered() and staging.differences(self.plan):
                staging.discard()
                check_output(staging.out, overwrite=self.overwrite)
            staging.lock()
            if staging.exists():
                staging.check_plan(self.plan)
            if not (staging.exists() and staging.progress()["blocks"]):
                rehearse()
                staging.create(self.plan)
                staging.lock()
        state = self.ranks.broadcast(staging.progress() if self.ranks.rank == 0 else None)
        if not staging.exists():
            raise DistributedError(
                f"rank {self.ranks.rank} does not see {staging.directory}, which rank 0 made; all ranks need "
                "the same file system"
            )
        if not state["blocks"]:
            return 0, None
        self.table = state["table"]
        return state["blocks"], CompressionReport(
            self.config,
            [LayerReport(**layer) for layer in state["layers"]],
            state["left_dense"],
            {block: (before, after) for block, (before, after) in state["matched"].items()},
            state["seconds"],
        )

    def compressions(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Read what an earlier run measured; or else measure, and keep it for later runs."""
        first = self.ranks.rank == 0
        found: dict[str, float] = self.ranks.broadcast(self.staging.compressions() if first else None)
        if not found:
            found = measure()
            if first:
                self.staging.note_compressions(found)
        return found

    def hidden_states(self, name: str) -> StoredStates:
        """Tensors on disk, in the directory `name` of the staging directory."""
        return StoredStates(self.staging.directory / name, self.batches, self.staging)

    def fill(self, index: int) -> None:
        """Read block `index`."""
        self.source.fill(index, self.dtype)

    def release(self, index: int) -> None:
        """Take the weights away, and stop a run that passed its memory limit."""
        self.source.release(index)
        return_freed()
        self.limit.check()

    def finish(self, index: int, replaced: Mapping[nn.Module, nn.Module], report: CompressionReport) -> None:
        """Write a compressed block, put its dense layers back without weights, and commit."""
        if self.ranks.rank == 0:
            self.table |= self._shards.write_block(index)
        for dense, compressed in replaced.items():
            replace_(self.source.model, compressed, dense)
        self.release(index)
        # Then the inputs of the next block, every rank's share of them, are on disk.
        self.ranks.barrier()
        if self.ranks.rank == 0:
            self.staging.commit(
                {
                    "blocks": index + 1,
                    "layers": [asdict(layer) for layer in report.layers],
                    "left_dense": report.left_dense,
                    "matched": report.matched,
                    "table": self.table,
                    "seconds": self._seconds(report),
                }
            )

    def deliver(self, tokenizer: Any, report: CompressionReport, known: Mapping[str, Any]) -> None:
        """Write what belongs beside the blocks, and give the model its name; called on the first rank.

        Args:
            tokenizer: None if the model has none.
            report: of all blocks.
            known: more for the model card.
        """
        table = {**self.table, **self._shards.write_rest()}
        model, directory = self.source.model, self.staging.model
        model.config.dtype = str(self.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.quantization_config = quantization_dict(self.config, table)
        with self.staging.writing():
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
            copy_companions(self.source.directory, directory)
            if model.can_generate():
                model.generation_config.save_pretrained(directory)
            model.config.save_pretrained(directory)
            # What is killed here leaves nothing: `deliver` removes what was not written to the end.
            write_model_card(
                directory, report, name=self.staging.out.name, seconds=self._seconds(report), **known
            )
        self.staging.deliver(overwrite=self.overwrite)

    def _seconds(self, report: CompressionReport) -> float:
        return report.seconds_before + time.perf_counter() - self._started
