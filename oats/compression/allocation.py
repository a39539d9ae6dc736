"""Budgets that are not uniform: layers that lose less by it are compressed more.

``"owl"`` compresses a block less the more outliers it has (Outlier Weighed Layerwise sparsity, arXiv
2310.05175). ``"error"`` gives each matrix the compression at which removing one more parameter costs as much
error as in any other matrix. Both measure the dense model, in one pass over the calibration data before the
first block is compressed. Both remove as many parameters in all as the uniform budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oats.compression.block_decomposition import block_matrices
from oats.compression.block_runner import BlockRunner
from oats.compression.targets import Target
from oats.config import OatsConfig
from oats.decomposition.methods import decompose_by_method

OUTLIER = 5.0
"""An element is an outlier if its magnitude times its input's norm is above this many times the mean of its
layer (the M of arXiv 2310.05175)."""

SPREAD = {"owl": 0.08, "error": 0.1}
"""The largest difference of a layer's compression from the model's (the λ of arXiv 2310.05175 for OWL)."""

TRIAL_ITERATIONS = 8
"""Alternations of a decomposition that only measures the error: by then it is near its final value."""


@dataclass(frozen=True)
class Measure:
    """What the budget needs to know of one dense matrix."""

    parameters: int
    outliers: float = 0.0
    """For ``"owl"``: the share of its elements that are outliers."""
    errors: tuple[tuple[float, float], ...] = ()
    """For ``"error"``: two pairs of a compression and the relative error there."""


def measure_block(
    runner: BlockRunner, index: int, targets: Mapping[str, Target], config: OatsConfig
) -> dict[str, Measure]:
    """Measure the matrices of block `index` of the dense model, before which `runner` is, for a budget.

    Returns:
        Name → measure; a layer that did not run is absent.
    """
    config = replace(config, values=OatsConfig.values)  # no Hessians: codes come later
    matrices = block_matrices(runner, index, targets, config)
    owners = runner.ranks.owners({matrix.name: matrix.weight.numel() for matrix in matrices})
    mine = {
        matrix.name: _measure(matrix.weight, matrix.statistic, config, matrix.name)
        for matrix in matrices
        if owners[matrix.name] == runner.ranks.rank
    }
    return {m.name: runner.ranks.broadcast(mine.get(m.name), owners[m.name]) for m in matrices}


def _measure(weight: Tensor, statistic: Tensor, config: OatsConfig, name: str) -> Measure:
    if config.budget == "owl":
        return Measure(weight.numel(), outlier_share(weight, statistic))
    iterations, errors = min(TRIAL_ITERATIONS, config.resolved_iterations), []
    for compression in _allowed(config):
        trial = replace(config, compression=compression, iterations=iterations, budget="uniform")
        result = decompose_by_method(weight.contiguous(), statistic, trial, name)
        errors.append((compression, result.relative_error))
    return Measure(weight.numel(), errors=tuple(errors))


def outlier_share(weight: Tensor, statistic: Tensor) -> float:
    """Share of the elements that are outliers, see :data:`OUTLIER`.

    Args:
        weight: (d_out, d_in).
        statistic: second moments (d_in,) of the inputs, or their Hessian (d_in, d_in).

    >>> outlier_share(torch.tensor([[1.0] * 9 + [100.0]]), torch.ones(10))
    0.1
    """
    moments = statistic.diagonal() if statistic.dim() == 2 else statistic
    scores = weight.float().abs() * moments.float().sqrt()
    return float((scores > OUTLIER * scores.mean()).sum()) / scores.numel()


def allocate(measures: Sequence[Mapping[str, Measure]], config: OatsConfig) -> dict[str, float]:
    """A compression for each matrix.

    Args:
        measures: for each block, name → measure of its matrices.
        config: gives `compression`, the mean over all parameters.

    Returns:
        Name → compression.

    >>> blocks = [{"a": Measure(100, outliers=0.03)}, {"b": Measure(100, outliers=0.01)}]
    >>> allocate(blocks, OatsConfig(budget="owl"))
    {'a': 0.42, 'b': 0.58}
    """
    found = _by_outliers(measures, config) if config.budget == "owl" else _by_errors(measures, config)
    # Rounded, so that every machine counts the same number of parameters.
    return {name: round(compression, 4) for name, compression in found.items()}


def _allowed(config: OatsConfig) -> tuple[float, float]:
    """The least and the largest compression of a matrix."""
    spread = min(SPREAD[config.budget], config.compression, (1 - config.compression) / 2)
    return config.compression - spread, config.compression + spread


def _by_outliers(measures: Sequence[Mapping[str, Measure]], config: OatsConfig) -> dict[str, float]:
    low, high = _allowed(config)
    blocks = [block for block in measures if block]
    sizes = [sum(m.parameters for m in block.values()) for block in blocks]
    shares = [
        sum(m.outliers * m.parameters for m in block.values()) / size
        for block, size in zip(blocks, sizes, strict=True)
    ]
    range_ = max(shares) - min(shares) or 1.0
    # The share that a block keeps rises linearly with its outliers; then all are shifted to the right mean.
    kept = [(share - min(shares)) / range_ * (high - low) for share in shares]
    mean = sum(k * size for k, size in zip(kept, sizes, strict=True)) / sum(sizes)
    found = [config.compression - (k - mean) for k in kept]
    return {name: each for each, block in zip(found, blocks, strict=True) for name in block}


def _by_errors(blocks: Sequence[Mapping[str, Measure]], config: OatsConfig) -> dict[str, float]:
    """Minimise the sum of squared relative errors: the log of each is taken as linear in the compression.

    At the optimum all matrices have one price, the squared error that removing one more parameter costs,
    except those at an end of their range.
    """
    low, high = _allowed(config)
    measures = {name: measure for block in blocks for name, measure in block.items()}
    slopes, levels = {}, {}
    for name, measure in measures.items():
        (at, first), (_, second) = measure.errors
        least = torch.finfo(torch.float32).tiny
        logs = [2 * math.log(max(error, least)) for error in (first, second)]
        # An error that does not grow gets the least slope: that matrix is compressed the most.
        slopes[name] = max((logs[1] - logs[0]) / max(high - low, 1e-9), 1e-6)
        levels[name] = logs[0] - slopes[name] * at

    def at_price(price: float) -> dict[str, float]:
        """Compressions where d(error²)/d(parameters) is exp(price)."""
        found = {}
        for name, measure in measures.items():
            best = (price + math.log(measure.parameters / slopes[name]) - levels[name]) / slopes[name]
            found[name] = min(max(best, low), high)
        return found

    total = sum(m.parameters for m in measures.values())
    cheap, dear = -1e4, 1e4
    for _ in range(200):
        middle = (cheap + dear) / 2
        removed = sum(c * measures[name].parameters for name, c in at_price(middle).items())
        if removed / total < config.compression:
            cheap = middle
        else:
            dear = middle
    return at_price(dear)
