"""Where a run takes its blocks from, and where finished blocks go."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from oats.compression.block_runner import HiddenStates
from oats.compression.report import CompressionReport


class BlockStore:
    """Blocks that are in the model and stay there: in memory there is nothing to do.

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

    def finish(
        self, index: int, replaced: Sequence[tuple[nn.Module, nn.Module]], report: CompressionReport
    ) -> None:
        """Take compressed block `index`; `replaced` holds each dense layer and what replaced it."""
