"""Compares methods at several compressions: what to do for each cell of the table, and doing it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from oats.compression.calibration import Calibration
from oats.compression.compress import compress_
from oats.compression.targets import find_targets
from oats.config import PRUNING, OatsConfig
from oats.evaluate.cells import DENSE, Cell, Cells
from oats.evaluate.dense_formats import DenseFormat
from oats.models.architecture import find_blocks
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

MATCHED = "+match"
"""After the name of a method: tune each block too, in `PASSES` passes."""
PASSES = 2

CODES = ("+int8", "+int4")
"""At the end of the name: store the kept values as such codes (:mod:`oats.decomposition.codes`)."""

Measured = tuple[dict[str, float], int, int, float]
"""Scores by name, bytes and parameters of the layers, and the seconds that the compression took."""

Planned = OatsConfig | DenseFormat
"""What is done to the model for one cell: compress it, or round its dense weights."""


def plan(common: OatsConfig, methods: Sequence[str], compressions: Sequence[float]) -> dict[str, Planned]:
    """Name of each cell → what is done to the model for it. The cell of the dense model is not in the plan.

    Args:
        common: the settings that all methods share; its method and compression are not used.
        methods: names out of `oats.config.METHODS`. `MATCHED`, and then one of `CODES`, may follow the name.
            ``dense+`` and the name of a format is a method too; it has one cell, whatever the compressions.
        compressions: each in [0, 1).

    Raises:
        ConfigError: a name or a number is not one of these, or the pattern forbids it.

    >>> planned = plan(OatsConfig(), ["wanda", "oats+match", "oats+int8"], [0.5])
    >>> {name: (each.block_matching, each.values) for name, each in planned.items()}
    {'wanda 0.5': (0, None), 'oats+match 0.5': (2, None), 'oats+int8 0.5': (0, 'int8')}
    >>> plan(OatsConfig(), ["dense+q4_0"], [0.4, 0.5])
    {'dense+q4_0': DenseFormat(name='q4_0')}
    """
    formats = [name for name in methods if name.startswith(f"{DENSE}+")]
    cells: dict[str, Planned] = {name: DenseFormat(name.removeprefix(f"{DENSE}+")) for name in formats}
    for compression in compressions:
        for name in methods:
            if name in formats:
                continue
            matched, codes = split_codes(name)
            method = matched.removesuffix(MATCHED)
            cells[f"{name} {compression:g}"] = replace(
                common,
                method=method,  # type: ignore[arg-type]  # OatsConfig checks it
                compression=compression,
                rank_ratio=0 if method in PRUNING else common.rank_ratio,
                block_matching=PASSES if matched.endswith(MATCHED) else 0,
                values=codes.removeprefix("+") or common.values,  # type: ignore[arg-type]
            )
    return cells


def split_codes(name: str) -> tuple[str, str]:
    """The name of a method without the one of `CODES` at its end, and that one; "" if there is none.

    >>> split_codes("oats+match+int8"), split_codes("wanda")
    (('oats+match', '+int8'), ('wanda', ''))
    """
    codes = next((each for each in CODES if name.endswith(each)), "")
    return name.removesuffix(codes), codes


def complete(
    cells: Cells, planned: Mapping[str, Planned], measure: Callable[[Planned | None], Measured],
    progress: Callable[[int, int, str, Cell | None], None],
) -> list[Cell]:  # fmt: skip
    """Measure all cells that are not finished yet.

    Args:
        cells: the finished cells; new ones are added.
        planned: from :func:`plan`.
        measure: changes the model as planned (None: not at all) and evaluates it, see :func:`measure_`.
        progress: called as progress(done, total, name, cell) before each cell, where cell is None, and after
            it.

    Returns:
        The cell of the dense model, and then those of the plan in its order.
    """
    finished: list[Cell] = []
    everything: dict[str, Planned | None] = {DENSE: None, **planned}
    for name, config in everything.items():
        method, compression = name, 0.0
        if isinstance(config, OatsConfig):
            method, compression = name.rpartition(" ")[0], config.compression
        progress(len(finished), len(everything), name, None)
        cell = cells.get(method, compression)
        if cell is None:
            cell = Cell(method, compression, *measure(config), torch.get_num_threads())
            cells.put(cell)
        finished.append(cell)
        progress(len(finished), len(everything), name, cell)
    return finished


def measure_(
    model: Any, planned: Planned | None, calibration: Calibration, common: OatsConfig,
    score: Callable[[Any], dict[str, float]],
) -> Measured:  # fmt: skip
    """Change a model as planned for a cell, and evaluate it.

    Args:
        model: the dense model; it is changed in place.
        planned: a value of :func:`plan`, or None for the cell of the dense model.
        common: as in :func:`plan`; it says which layers are counted.
        calibration: as in :func:`oats.compress_`; `score` evaluates the model that comes out.
    """
    started = time.perf_counter()
    size, parameters = _apply_(model, planned, calibration, common)
    seconds = time.perf_counter() - started
    return score(model), size, parameters, seconds


def _apply_(
    model: nn.Module, planned: Planned | None, calibration: Calibration, common: OatsConfig
) -> tuple[int, int]:
    """Returns the bytes, as they would be stored, and the parameters of the weights of the layers."""
    if isinstance(planned, OatsConfig):
        compress_(model, calibration, planned)
        return _compressed_sizes(model)
    targets = find_targets(model, *find_blocks(model), common)
    every = [target for block in targets.blocks for target in block.values()]
    weights = [weight for target in every for weight, _ in target.matrices().values()]
    size = sum(weight.nbytes for weight in weights) if planned is None else planned.round_(weights)
    return size, sum(weight.numel() for weight in weights)


def _compressed_sizes(model: nn.Module) -> tuple[int, int]:
    layers = [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]
    size = sum(tensor.nbytes for layer in layers for tensor in layer.canonical().values())
    return size, sum(layer.nnz + layer.rank * (layer.in_features + layer.out_features) for layer in layers)
