"""The walk over a model: one block after another is compressed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from oats.compression.block_runner import BlockRunner, Held
from oats.compression.distributed import Ranks
from oats.compression.matching import match_block
from oats.compression.quantize import quantize_layer_
from oats.compression.report import CompressionReport, LayerReport, Progress
from oats.compression.saving_hook import prepare_saving_
from oats.compression.statistics import input_statistics
from oats.compression.targets import SKIPPED, Target, Targets, reasons
from oats.config import EXACT, OatsConfig, Storage
from oats.decomposition.alternating import decompose_batch
from oats.decomposition.methods import codes_hessian, decompose_by_method, method_input
from oats.decomposition.result import Decomposition
from oats.errors import UnsupportedModelError
from oats.format.layer_spec import storage_dtype
from oats.models.linear import replace_
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear

BATCH_ELEMENTS = 2**23
"""Matrices of one shape are decomposed together up to this many elements: beyond it each keeps the threads
busy by itself, and only the memory grows."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    """One matrix of a block to decompose: a layer's, or a part of a fused one."""

    name: str
    layer: str
    part: str
    weight: Tensor
    bias: Tensor | None
    statistic: Tensor


class Walk:
    """A compression on its way through a model: blocks before a certain one are done.

    Args:
        model: in evaluation mode, its layers in the dtype in which they are stored.
        path: dotted path of its list of blocks.
        targets: what to compress.
        batches: calibration data, from :func:`oats.compression.calibration.as_batches`.
        config: settings of the run.
        compressions: name of a matrix → its own compression, where it is not the run's.
        held: what the block before the first one to compress returned for each batch; None where that is the
            first block of the model.
        dense_held: the same in the dense model, for matching, or for its moments.
        ranks: the processes that share the work.
        progress: called after each layer.
        report: of the blocks that are done already.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        targets: Targets,
        batches: list[dict[str, Tensor]],
        config: OatsConfig,
        *,
        compressions: Mapping[str, float] | None = None,
        held: Held | None = None,
        dense_held: Held | None = None,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
        report: CompressionReport | None = None,
    ) -> None:
        self._model, self._path, self._targets, self._config = model, path, targets, config
        self._compressions = compressions or {}
        self._batches, self._ranks, self._progress = batches, ranks or Ranks(), progress
        self._blocks: list[nn.Module] = list(model.get_submodule(path).children())
        self.runner = BlockRunner(model, self._blocks, batches, held, self._ranks)
        # What the dense blocks make of the data. Each of the two moves on only where it is asked for.
        self.dense = BlockRunner(model, self._blocks, batches, dense_held, self._ranks)
        self.report = report or CompressionReport(config, left_dense=dict(targets.left_dense))
        self._replaced: list[tuple[nn.Module, nn.Module]] = []
        self._from_dense = config.moments == "dense"

    def compress_block(self, index: int, dense_into: Held | None = None) -> None:
        """Replace the layers of the next block.

        Args:
            index: the block.
            dense_into: where the dense block's outputs go, if they are asked for; None means in place of its
                inputs.
        """
        targets = self._targets.blocks[index]
        matrices = self._matrices(index)
        if self._config.block_matching or (self._from_dense and index + 1 < len(self._blocks)):
            self.dense.advance(index, dense_into)
            self._ranks.barrier()
        self._replaced = []
        made: list[SparseLowRankLinear] = []
        hessians: list[Tensor | None] = []  # that codes wait for until the layers have been matched
        parts: dict[str, SparseLowRankLinear] = {}
        done = len(self.report.layers) + self._not_run()
        for matrix, layer, layer_report in self._decompositions(matrices):
            if self._config.block_matching:
                hessians.append(codes_hessian(matrix.statistic, self._config))
            parts[matrix.part] = layer
            target = targets[matrix.layer]
            if len(parts) == (len(target.outputs) or 1):
                self._put(target, SplitLinear(parts) if target.outputs else layer)
                made += parts.values()
                parts = {}
            self.report.layers.append(layer_report)
            done += 1
            if self._progress is not None:
                self._progress(done, len(self._targets), layer_report.name, layer_report.relative_error)
        if self._config.block_matching and made:
            self._match(index, made)
            if self._config.storage.has_codes:
                for layer, hessian in zip(made, hessians, strict=True):
                    quantize_layer_(layer, self._config.storage, hessian)

    def advance(self, index: int, into: Held | None = None) -> None:
        """Let the compressed block make the inputs of the next one, see :meth:`BlockRunner.advance`."""
        if self._config.block_matching or not self._from_dense:
            self.runner.advance(index, into)

    def restore(self) -> None:
        """Put the dense layers of the last block back; what was made of them is forgotten."""
        for linear, layer in self._replaced:
            replace_(self._model, layer, linear)
        self._replaced = []

    def conclude(self) -> None:
        """Warn of what stayed dense.

        Raises:
            UnsupportedModelError: everything did.
        """
        report = self.report
        if not report.layers:
            raise UnsupportedModelError(
                f"{type(self._model).__name__}: nothing was compressed; {reasons(report.left_dense)}"
            )
        unwanted = {name: why for name, why in report.left_dense.items() if why != SKIPPED}
        if unwanted and self._ranks.rank == 0:
            warnings.warn(f"left dense: {reasons(unwanted)}", stacklevel=3)

    def _matrices(self, index: int) -> list[_Matrix]:
        """Those of a block, with the statistics of their inputs."""
        targets = self._targets.blocks[index]
        modules = {name: target.module for name, target in targets.items()}
        runner = self.dense if self._from_dense else self.runner
        statistics = input_statistics(runner, index, modules, self._config)
        matrices = []
        for name, target in targets.items():
            if name not in statistics:
                self.report.left_dense[name] = "it did not run on the calibration data"
                continue
            for part, (weight, bias) in target.matrices().items():
                part_name = f"{name}.{part}" if part else name
                matrices.append(_Matrix(part_name, name, part, weight, bias, statistics[name]))
        return matrices

    def _not_run(self) -> int:
        """Number of matrices that were targets, and turned out not to run."""
        targets = [item for block in self._targets.blocks for item in block.items()]
        return sum(len(target.outputs) or 1 for name, target in targets if name in self.report.left_dense)

    def _decompositions(
        self, matrices: list[_Matrix]
    ) -> Iterator[tuple[_Matrix, SparseLowRankLinear, LayerReport]]:
        """What becomes of each matrix, in order; each rank decomposes its share. Empties the list."""
        ranks = self._ranks
        done: dict[str, tuple[SparseLowRankLinear, LayerReport]] = {}
        if ranks.size == 1:
            while matrices:
                if matrices[0].name not in done:
                    done.update(self._decompose(self._alike(matrices)))
                # Out of the list: a Hessian can be larger than all weights of its block.
                matrix = matrices.pop(0)
                yield matrix, *done.pop(matrix.name)
            return
        batches, left = {}, matrices
        while left:
            batch = self._alike(left)
            batches[batch[0].name] = batch
            left = [matrix for matrix in left if matrix not in batch]
        owners = ranks.owners({name: sum(map(_cost, batch)) for name, batch in batches.items()})
        for name, batch in batches.items():
            if owners[name] == ranks.rank:
                done.update(self._decompose(batch))
        owner_of = {matrix.name: owners[name] for name, batch in batches.items() for matrix in batch}
        for matrix in matrices:
            own = done.pop(matrix.name, None)
            sent = None if own is None else (own[0].canonical(), own[1])
            tensors, report = ranks.broadcast(sent, owner_of[matrix.name])
            yield matrix, self._of_tensors(matrix, tensors), report

    def _alike(self, matrices: list[_Matrix]) -> list[_Matrix]:
        """The first of the matrices, and of the others those that are decomposed together with it."""
        first = matrices[0]
        if self._config.method != "oats":
            return [first]
        shape, dtype = first.weight.shape, first.weight.dtype
        compression = self._compressions.get(first.name)
        alike = [
            m
            for m in matrices
            if m.weight.shape == shape
            and m.weight.dtype == dtype
            and self._compressions.get(m.name) == compression
        ]
        return alike[: max(1, BATCH_ELEMENTS // first.weight.numel())]

    def _decompose(self, batch: list[_Matrix]) -> dict[str, tuple[SparseLowRankLinear, LayerReport]]:
        """What becomes of matrices that are alike, by name."""
        start = time.perf_counter()
        weights = [matrix.weight.contiguous() for matrix in batch]
        statistics, names = [matrix.statistic for matrix in batch], [matrix.name for matrix in batch]
        compression = self._compressions.get(names[0], self._config.compression)
        best: list[Decomposition] = []
        for rank_ratio in self._config.rank_ratios or (self._config.rank_ratio,):
            settings = replace(
                self._config, compression=compression, rank_ratio=rank_ratio, rank_ratios=(), budget="uniform"
            )
            if len(batch) == 1:
                tried = [decompose_by_method(weights[0], statistics[0], settings, names[0])]
            else:
                moments = [method_input(statistic, settings) for statistic in statistics]
                tried = decompose_batch(weights, moments, settings, names)
            best = [
                min(pair, key=lambda result: result.relative_error)
                for pair in zip(best or tried, tried, strict=True)
            ]
        made = {}
        for matrix, result in zip(batch, best, strict=True):
            layer = self._layer(matrix, result)
            seconds = (time.perf_counter() - start) / len(batch)
            d_out, d_in = matrix.weight.shape
            made[matrix.name] = (
                layer,
                LayerReport(matrix.name, d_out, d_in, layer.rank, layer.nnz, result.relative_error, seconds),
            )
        return made

    def _layer(self, matrix: _Matrix, result: Decomposition) -> SparseLowRankLinear:
        layer = SparseLowRankLinear.from_decomposition(result, matrix.bias)
        if self._storage.has_codes:
            hessian = codes_hessian(matrix.statistic, self._config)
            # Those of the other methods are fitted to the size of each input alone, or not at all.
            fitted = self._config.method == "oats-hessian"
            quantize_layer_(layer, self._storage, hessian, matrix.weight, catch_up=not fitted)
        return layer

    def _of_tensors(self, matrix: _Matrix, tensors: Mapping[str, Tensor]) -> SparseLowRankLinear:
        d_in, dtype = matrix.weight.shape[1], storage_dtype(matrix.weight.dtype)
        return SparseLowRankLinear.from_canonical(
            tensors, d_in, matrix.bias, matrix.name, storage=self._storage, dtype=dtype
        )

    @property
    def _storage(self) -> Storage:
        """Of new layers: matching moves exact values, which become codes afterwards."""
        return EXACT if self._config.block_matching else self._config.storage

    def _put(self, target: Target, layer: nn.Module) -> None:
        if not self.report.layers:
            prepare_saving_(self._model, self._config)
        replace_(self._model, target.module, layer)
        self._replaced.append((target.module, layer))

    def _match(self, index: int, layers: list[SparseLowRankLinear]) -> None:
        """Steps of an optimiser come one after another: the first rank takes them, and tells the others."""
        done: tuple[tuple[float, float], list[dict[str, Tensor]]] | None = None
        if self._ranks.rank == 0:
            whole = BlockRunner(self._model, self._blocks, self._batches, self.runner.held)
            losses = match_block(whole, index, layers, self.dense.held, self._config.block_matching)
            done = losses, [layer.canonical() for layer in layers] if self._ranks.size > 1 else []
        losses, tuned = self._ranks.broadcast(done)
        if self._ranks.rank > 0:
            for layer, tensors in zip(layers, tuned, strict=True):
                layer.load_state_dict({**layer.state_dict(), **tensors})
        self.report.matched[f"{self._path}.{index}"] = losses


def _cost(matrix: _Matrix) -> float:
    """Of one decomposition, in proportion: products with the matrix, and, of a Hessian, its inverses."""
    d_out, d_in = matrix.weight.shape
    products = d_out * d_in * min(d_out, d_in)
    return products + d_in**3 if matrix.statistic.dim() == 2 else products
