"""The walk over a model, in memory or in files: one block after another is compressed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from oats.compression.allocation import allocate, measure_block
from oats.compression.block_decomposition import BlockDecomposition, block_matrices
from oats.compression.block_runner import BlockRunner, HiddenStates, map_tensors
from oats.compression.conversion import convert, convert_batch, dtype_of
from oats.compression.distributed import Ranks
from oats.compression.head import store_head_as_codes_
from oats.compression.matching import match_block
from oats.compression.quantize import quantize_layer_
from oats.compression.report import CompressionReport, Progress
from oats.compression.saving_hook import prepare_saving_
from oats.compression.targets import SKIPPED, Targets, reasons
from oats.compression.temporary import evaluating
from oats.config import OatsConfig
from oats.decomposition.methods import codes_hessian
from oats.errors import UnsupportedModelError
from oats.models.linear import replace_
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear


class BlockStore:
    """Where blocks come from and finished ones go: here the model, in which all of them stay.

    A subclass holds blocks elsewhere (:mod:`oats.checkpoint.file_blocks`): it gives the model the weights of
    one block at a time, and writes finished blocks, so that a run that was stopped can go on.
    """

    def start(self, rehearse: Callable[[], None]) -> tuple[int, CompressionReport | None]:
        """Rehearse, unless an earlier run has finished blocks; returns their number and their report."""
        rehearse()
        return 0, None

    def compressions(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Name of each matrix → its compression: known from an earlier run, or measured now."""
        return measure()

    def hidden_states(self, name: str) -> HiddenStates | None:
        """Where to put what a block returns; None means in place of what the block before it returned."""
        return None

    def fill(self, index: int) -> None:
        """Give block `index` its dense weights."""

    def release(self, index: int) -> None:
        """Take the weights of block `index` away."""

    def finish(self, index: int, replaced: Mapping[nn.Module, nn.Module], report: CompressionReport) -> None:
        """Take compressed block `index`; `replaced` has each dense layer → what replaced it."""


class Walk:
    """One run: it goes on after the blocks that earlier runs finished.

    Args:
        model, path: whose blocks are compressed, and the dotted path of its list of blocks.
        targets, config: what to compress, and how.
        batches: calibration data, from :func:`oats.compression.calibration.as_batches`.
        store: where blocks come from and go to.
        ranks: the processes that share the work.
        progress: called after each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        targets: Targets,
        batches: list[dict[str, Tensor]],
        config: OatsConfig,
        store: BlockStore,
        *,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._path, self._targets, self._batches = model, path, targets, batches
        self._config, self._store, self._ranks, self._progress = config, store, ranks or Ranks(), progress
        self._blocks: list[nn.Module] = list(model.get_submodule(path).children())

    def start(self) -> None:
        """Find what cannot work, before anything is changed; and the block to go on from.

        Raises:
            CalibrationError: as :meth:`BlockRunner.run`.
            ConfigError, WeightError: as :meth:`Targets.check_block`.
        """
        with evaluating(self._model):
            self._first, report = self._store.start(self._rehearse)
        self._report = report or CompressionReport(self._config, left_dense=dict(self._targets.left_dense))

    def _rehearse(self) -> None:
        """Check each block, and run it on the first sequence."""
        first = self._batches[0]
        if len(first) == 1:  # else only the model knows how to cut it
            first = {name: map_tensors(value, lambda x: x[:1]) for name, value in first.items()}
        runner = BlockRunner(self._model, self._blocks, [first])
        for index in range(len(self._blocks)):
            self._store.fill(index)
            self._targets.check_block(index, self._config)
            runner.advance(index)
            self._store.release(index)

    def run(self, dtype: torch.dtype) -> CompressionReport:
        """Convert the model to the dtype of its layers, store the head as codes if asked to, compress blocks.

        Raises:
            UnsupportedModelError: nothing was compressed, or the head cannot be stored as codes.
            CalibrationError, WeightError, DistributedError: in the walk.
        """
        model, config = self._model, self._config
        with evaluating(model):
            original = dtype_of(model)
            convert(model, dtype)
            self._batches = [convert_batch(batch, original, dtype) for batch in self._batches]
            if config.head:
                prepare_saving_(model, config)
                store_head_as_codes_(model, config.scale_columns)
            uniform = config.budget == "uniform"
            compressions = {} if uniform else self._store.compressions(self._measured_compressions)
            decomposition = BlockDecomposition(config, compressions, self._ranks)
            # One runs the compressed blocks and one the dense ones. Each moves on only if it is needed.
            self._compressed, self._dense = self._runner("hidden"), self._runner("dense")
            for index in range(self._first, len(self._blocks)):
                self._store.fill(index)
                replaced = self._compress_block(index, decomposition)
                if config.block_matching or config.moments == "sequential":
                    self._advance(self._compressed, "hidden", index)
                self._store.finish(index, replaced, self._report)
        left_dense = self._report.left_dense
        if not self._report.layers:
            raise UnsupportedModelError(
                f"{type(model).__name__}: nothing was compressed; {reasons(left_dense)}"
            )
        unwanted = {name: why for name, why in left_dense.items() if why != SKIPPED}
        if unwanted and self._ranks.rank == 0:
            warnings.warn(f"left dense: {reasons(unwanted)}", stacklevel=3)
        return self._report

    def _runner(self, name: str) -> BlockRunner:
        """A runner before the first block that is not finished."""
        states = self._store.hidden_states(f"{name}/{self._first}") if self._first else None
        return BlockRunner(self._model, self._blocks, self._batches, states, self._ranks)

    def _advance(self, runner: BlockRunner, name: str, index: int, *, last: bool = False) -> None:
        """Make the inputs of the next block. With `last`, the last block runs too: its output is needed."""
        if last or index + 1 < len(self._blocks):
            runner.advance(index, self._store.hidden_states(f"{name}/{index + 1}"))

    def _measured_compressions(self) -> dict[str, float]:
        """Name of each matrix → its compression, by one pass through the dense model."""
        runner, measures = BlockRunner(self._model, self._blocks, self._batches, ranks=self._ranks), []
        for index, block in enumerate(self._targets.blocks):
            self._store.fill(index)
            measures.append(measure_block(runner, index, block, self._config))
            if index + 1 < len(self._blocks):
                runner.advance(index, self._store.hidden_states("measured"))
            self._store.release(index)
        return allocate(measures, self._config)

    def _compress_block(self, index: int, decomposition: BlockDecomposition) -> dict[nn.Module, nn.Module]:
        """Replace the layers of a block; returns each dense layer → what replaced it."""
        config, report, targets = self._config, self._report, self._targets.blocks[index]
        runner = self._dense if config.moments == "dense" else self._compressed
        matrices = block_matrices(runner, index, targets, config)
        ran = {matrix.layer for matrix in matrices}
        report.left_dense |= {n: "it did not run on the calibration data" for n in targets if n not in ran}
        if config.block_matching or config.moments == "dense":
            self._advance(self._dense, "dense", index, last=config.block_matching > 0)
            self._ranks.barrier()
        replaced: dict[nn.Module, nn.Module] = {}
        made: list[SparseLowRankLinear] = []
        hessians: list[Tensor | None] = []  # for codes, which are fitted after matching
        parts: dict[str, SparseLowRankLinear] = {}
        idle = (t for block in self._targets.blocks for name, t in block.items() if name in report.left_dense)
        done = len(report.layers) + sum(len(target.outputs) or 1 for target in idle)
        for matrix, layer, layer_report in decomposition.layers(matrices):
            if config.block_matching:
                hessians.append(codes_hessian(matrix.statistic, config))
            if not report.layers:
                prepare_saving_(self._model, config)
            parts[matrix.part] = layer
            target = targets[matrix.layer]
            if len(parts) == (len(target.outputs) or 1):
                replaced[target.module] = SplitLinear(parts) if target.outputs else layer
                replace_(self._model, target.module, replaced[target.module])
                made += parts.values()
                parts = {}
            report.layers.append(layer_report)
            done += 1
            if self._progress is not None:
                self._progress(done, len(self._targets), layer_report.name, layer_report.relative_error)
        if config.block_matching and made:
            self._match(index, made)
            if config.storage.has_codes:
                for layer, hessian in zip(made, hessians, strict=True):
                    quantize_layer_(layer, config.storage, hessian)
        return replaced

    def _match(self, index: int, layers: list[SparseLowRankLinear]) -> None:
        """Tune the layers of a block on the first rank, which sends them to the others.

        Steps of an optimiser depend on each other, so that ranks cannot share them.
        """
        done: tuple[tuple[float, float], list[dict[str, Tensor]]] | None = None
        if self._ranks.rank == 0:
            # On the batches of all ranks.
            runner = BlockRunner(self._model, self._blocks, self._batches, self._compressed.hidden_states)
            dense, passes = self._dense.hidden_states, self._config.block_matching
            losses = match_block(runner, index, layers, dense, passes)
            done = losses, [layer.canonical() for layer in layers] if self._ranks.size > 1 else []
        losses, tuned = self._ranks.broadcast(done)
        if self._ranks.rank > 0:
            for layer, tensors in zip(layers, tuned, strict=True):
                layer.load_state_dict({**layer.state_dict(), **tensors})
        self._report.matched[f"{self._path}.{index}"] = losses
