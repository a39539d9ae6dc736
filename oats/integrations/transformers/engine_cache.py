"""`EngineCache`: what transformers calls a cache, for texts whose keys and values the engine holds."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from oats.engine.cache import Tokens
from oats.engine.engine import Engine
from oats.errors import ConfigError

# transformers changed what crop() takes: once the new length, now minus the tokens to remove.
_CROP_TAKES_LENGTH = "tokens_to_remove" not in inspect.signature(Cache.crop).parameters


class _Row:
    """One text. The engine may hold fewer of its tokens: the others are computed with the next ones."""

    def __init__(self, engine: Engine, ids: list[int], tokens: Tokens) -> None:
        self.ids, self.tokens = ids, tokens
        weakref.finalize(self, engine.release, tokens).atexit = False


class EngineCache(Cache):
    """Texts of equal width, each with padding in front of it or none.

    The pages of a text are given back when nothing refers to it any more.

    Args:
        engine: that runs the texts.

    Attributes:
        width: columns so far, padding included.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(layers=[])
        self.engine = engine
        self.width = 0
        self._rows: list[_Row] = []

    def append(self, texts: Sequence[list[int]], keep: Sequence[int], columns: int) -> Tensor:
        """Run the next tokens of each text.

        Args:
            texts: token ids, of each text at most `columns`.
            keep: of how many of its last new tokens logits are wanted.
            columns: how much wider the texts become; the rest is padding in front of them.

        Returns:
            (sum of `keep`, vocabulary): logits, one text after another.

        Raises:
            ConfigError: a token is not in the vocabulary, or a text is longer than the model's context.
        """
        if self._rows:
            logits = self._run(self._rows, texts, keep)
        else:
            # Beams begin with equal texts, which are computed once.
            places = {tuple(text): place for place, text in reversed([*enumerate(texts)])}
            firsts = sorted(places.values())
            rows = [self._row([]) for _ in firsts]
            keeps = [keep[first] for first in firsts]
            logits = self._run(rows, [texts[first] for first in firsts], keeps)
            self._rows = rows
            if len(firsts) < len(texts):
                sources = [firsts.index(places[tuple(text)]) for text in texts]
                self._take(sources)
                parts = logits.split(keeps)
                logits = torch.cat([parts[source] for source in sources])
        self.width += columns
        return logits

    def _row(self, ids: list[int]) -> _Row:
        return _Row(self.engine, ids, self.engine.new())

    def _run(self, rows: Sequence[_Row], texts: Sequence[list[int]], keep: Sequence[int]) -> Tensor:
        work = [
            (row.tokens, row.ids[row.tokens.length :] + text) for row, text in zip(rows, texts, strict=True)
        ]
        try:
            logits = self.engine.append(work, keep)
        except BaseException:
            for row in rows:
                self.engine.truncate(row.tokens, min(row.tokens.length, len(row.ids)))
            raise
        for row, text in zip(rows, texts, strict=True):
            row.ids += text
        return logits

    def _take(self, indices: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row that is named again is forked."""
        rows: list[_Row] = []
        taken: set[int] = set()
        for index in indices:
            row = self._rows[index]
            if index in taken:
                row = _Row(self.engine, list(row.ids), self.engine.fork(row.tokens))
            taken.add(index)
            rows.append(row)
        self._rows = rows

    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(row.ids) for row in self._rows]

    def ids(self) -> list[int]:
        """Token ids, one text after another."""
        return [token for row in self._rows for token in row.ids]

    def move_to(self, engine: Engine) -> None:
        """Go on with another engine, which computes the texts again."""
        if engine is not self.engine:
            self.engine = engine
            self._rows = [self._row(row.ids) for row in self._rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far."""
        return self.width

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with the rows `beam_idx`, (rows,)."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, (rows,), or a mask of them."""
        self._take(torch.arange(len(self._rows))[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make `repeats` rows of each."""
        self._take([index for index in range(len(self._rows)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: ``-tokens_to_remove`` of them.

        A positive number is the width that remains, as in older versions of transformers.
        """
        removed = abs(tokens_to_remove)
        if tokens_to_remove > 0 or (_CROP_TAKES_LENGTH and tokens_to_remove == 0):
            removed = max(0, self.width - tokens_to_remove)
        removed = min(removed, self.width)
        for row in self._rows:
            del row.ids[max(0, len(row.ids) - removed) :]
            if row.tokens.length > len(row.ids):
                self.engine.truncate(row.tokens, len(row.ids))
        self.width -= removed

    def reset(self) -> None:
        """Forget all texts."""
        self._rows, self.width = [], 0

    @property
    def batch_size(self) -> int:
        """Texts; -1 if there is none yet."""
        return len(self._rows) or -1

    @property
    def is_linear(self) -> list[bool]:
        """One attention layer stands for all: there are none to ask."""
        return [False]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this cache is the engine's, and only the causal language model that made it can go on with it; "
            "pass a DynamicCache() to generate to get one that its parts take"
        )

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"EngineCache(texts={len(self._rows)}, width={self.width})"

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineCache:
        copied = EngineCache(self.engine)
        copied.width = self.width
        copied._rows = [_Row(self.engine, list(row.ids), self.engine.fork(row.tokens)) for row in self._rows]
        return copied
