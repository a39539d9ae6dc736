"""A cache of transformers whose keys and values are the engine's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from oats.engine.cache import Tokens
from oats.engine.engine import Engine


class _Layer:
    """What transformers asks a layer of a cache for."""

    is_compileable = is_sliding = supports_early_init = False
    is_initialized = is_croppable = True


class EngineCache(Cache):
    """One sequence of an engine for each row of a batch.

    For transformers all rows have the same length: padding on the left counts. The engine does not see it.
    It gets the memory back when the cache is deleted.

    Args:
        engine: runs the model.
        padding: tokens of padding of each row.
    """

    def __init__(self, engine: Engine, padding: list[int]) -> None:
        super().__init__(layers=[_Layer()])  # type: ignore[list-item]
        self.engine, self.padding = engine, padding
        self.rows = [engine.new() for _ in padding]
        weakref.finalize(self, _release, engine, self.rows)

    def forward(self, ids: Tensor, keep: int) -> Tensor:
        """Append tokens (rows, n), which begin with the padding if these are the first.

        Returns:
            (rows, min(keep, n), vocabulary): logits of the last ones. Those of padding are zero.
        """
        skip = [0 if row.length else pad for row, pad in zip(self.rows, self.padding, strict=True)]
        work = [(row, new[pad:]) for row, new, pad in zip(self.rows, ids.tolist(), skip, strict=True)]
        found = self.engine.last_logits(work, keep)
        if len({len(logits) for logits in found}) == 1:
            return torch.stack(found)
        logits = found[0].new_zeros(len(found), min(keep, ids.shape[1]), found[0].shape[1])
        for row, of_row in zip(logits, found, strict=True):
            row[len(row) - len(of_row) :] = of_row
        return logits

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row, with its padding."""
        return self.rows[0].length and self.rows[0].length + self.padding[0]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No limit of its own."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: minus their number, or in older releases the length to keep."""
        length = self.get_seq_length()
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        for row in self.rows:
            self.engine.truncate(row, row.length - removed)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; one may be there several times."""
        wanted: list[int] = indices.tolist()
        old = list(self.rows)
        self.padding = [self.padding[index] for index in wanted]
        # The first to go on from a row takes it, the others share its pages.
        self.rows[:] = [
            old[index] if index not in wanted[:place] else self.engine.fork(old[index])
            for place, index in enumerate(wanted)
        ]
        for index in set(range(len(old))) - set(wanted):
            self.engine.release(old[index])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.batch_select_indices(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget all tokens."""
        for row in self.rows:
            self.engine.truncate(row, 0)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: only the engine writes keys and values.

        Raises:
            TypeError: always.
        """
        raise TypeError("an EngineCache belongs to `generate`; call the model with a cache of transformers")


def _release(engine: Engine, rows: list[Tokens]) -> None:
    for row in rows:
        engine.release(row)
