"""Decomposing the matrices of one block: matrices of one shape together, and each rank its share."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oats.compression.block_runner import BlockRunner
from oats.compression.distributed import Ranks
from oats.compression.quantize import quantize_layer_
from oats.compression.report import LayerReport
from oats.compression.statistics import input_statistics
from oats.compression.targets import Target
from oats.config import EXACT, OatsConfig
from oats.decomposition.alternating import decompose_batch
from oats.decomposition.methods import codes_hessian, decompose_by_method, method_input
from oats.decomposition.result import Decomposition
from oats.format.layer_spec import storage_dtype
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

BATCH_ELEMENTS = 2**23
"""Matrices of one shape are decomposed together up to this many elements. A larger matrix keeps all threads
busy by itself, so that a batch would only take more memory."""


@dataclass(frozen=True, eq=False)
class BlockMatrix:
    """The weight (d_out, d_in) of a layer, or of a part of a fused one, with the statistic of its inputs."""

    name: str
    layer: str
    part: str
    weight: Tensor
    bias: Tensor | None
    statistic: Tensor

    @property
    def cost(self) -> float:
        """Work of its decomposition, in proportion: products with the matrix, and inverses of a Hessian."""
        d_out, d_in = self.weight.shape
        products = d_out * d_in * min(d_out, d_in)
        return products + d_in**3 if self.statistic.dim() == 2 else products


Layer = tuple[SparseLowRankLinear, LayerReport]
Layers = Iterator[tuple[BlockMatrix, SparseLowRankLinear, LayerReport]]


def block_matrices(
    runner: BlockRunner, index: int, targets: Mapping[str, Target], config: OatsConfig
) -> list[BlockMatrix]:
    """The matrices of the layers to compress in a block, with :func:`input_statistics` of those that ran."""
    modules = {name: target.module for name, target in targets.items()}
    statistics = input_statistics(runner, index, modules, config)
    return [
        BlockMatrix(f"{name}.{part}" if part else name, name, part, weight, bias, statistics[name])
        for name, target in targets.items()
        if name in statistics
        for part, (weight, bias) in target.matrices().items()
    ]


class BlockDecomposition:
    """Makes compressed layers of the matrices of a block.

    Args:
        config: settings of the run.
        compressions: name of a matrix → its compression, for those that do not have the run's.
        ranks: the processes that share the work.
    """

    def __init__(self, config: OatsConfig, compressions: Mapping[str, float], ranks: Ranks) -> None:
        self._config, self._compressions, self._ranks = config, compressions, ranks
        # Matching tunes exact values; they become codes afterwards.
        self._storage = EXACT if config.block_matching else config.storage

    def layers(self, matrices: list[BlockMatrix]) -> Layers:
        """Yields each matrix and the layer made of it, in order, on every rank. May empty the list.

        Raises:
            ConfigError, WeightError: as the method's function.
            DistributedError: another rank is gone.
        """
        return self._alone(matrices) if self._ranks.size == 1 else self._shared(matrices)

    def _alone(self, matrices: list[BlockMatrix]) -> Layers:
        done: dict[str, Layer] = {}
        while matrices:
            if matrices[0].name not in done:
                done.update(self._decompose(self._first_batch(matrices)))
            # Popped to free its statistic: a Hessian can be larger than all weights of the block.
            matrix = matrices.pop(0)
            yield matrix, *done.pop(matrix.name)

    def _shared(self, matrices: list[BlockMatrix]) -> Layers:
        batches, left = {}, matrices
        while left:
            batch = self._first_batch(left)
            batches[batch[0].name] = batch
            left = [matrix for matrix in left if matrix not in batch]
        costs = {name: sum(matrix.cost for matrix in batch) for name, batch in batches.items()}
        owners = self._ranks.owners(costs)
        done: dict[str, Layer] = {}
        for name, batch in batches.items():
            if owners[name] == self._ranks.rank:
                done.update(self._decompose(batch))
        owner_of = {matrix.name: owners[name] for name, batch in batches.items() for matrix in batch}
        for matrix in matrices:
            own = done.pop(matrix.name, None)
            sent = None if own is None else (own[0].canonical(), own[1])
            tensors, report = self._ranks.broadcast(sent, owner_of[matrix.name])
            d_in, dtype = matrix.weight.shape[1], storage_dtype(matrix.weight.dtype)
            layer = SparseLowRankLinear.from_canonical(
                tensors, d_in, matrix.bias, matrix.name, storage=self._storage, dtype=dtype
            )
            yield matrix, layer, report

    def _first_batch(self, matrices: list[BlockMatrix]) -> list[BlockMatrix]:
        """The first matrix, and those that are decomposed together with it."""
        if self._config.method != "oats":
            return matrices[:1]

        def kind(matrix: BlockMatrix) -> tuple[torch.Size, torch.dtype, float | None]:
            return matrix.weight.shape, matrix.weight.dtype, self._compressions.get(matrix.name)

        batch = [matrix for matrix in matrices if kind(matrix) == kind(matrices[0])]
        return batch[: max(1, BATCH_ELEMENTS // matrices[0].weight.numel())]

    def _decompose(self, batch: list[BlockMatrix]) -> dict[str, Layer]:
        """Name → the layer made of each matrix, with the rank ratio whose error is the lowest."""
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
            pairs = zip(best or tried, tried, strict=True)
            best = [min(pair, key=lambda result: result.relative_error) for pair in pairs]
        made = {}
        for matrix, result in zip(batch, best, strict=True):
            layer, (d_out, d_in) = self._layer(matrix, result), matrix.weight.shape
            sizes = d_out, d_in, layer.rank, layer.nnz
            seconds = (time.perf_counter() - start) / len(batch)
            made[matrix.name] = layer, LayerReport(matrix.name, *sizes, result.relative_error, seconds)
        return made

    def _layer(self, matrix: BlockMatrix, result: Decomposition) -> SparseLowRankLinear:
        layer = SparseLowRankLinear.from_decomposition(result, matrix.bias)
        if self._storage.has_codes:
            hessian = codes_hessian(matrix.statistic, self._config)
            # The other methods fit values to the size of each input alone, or not at all.
            fitted = self._config.method == "oats-hessian"
            quantize_layer_(layer, self._storage, hessian, matrix.weight, catch_up=not fitted)
        return layer
