"""Sequences of finished texts, so that a text that begins as one of them does not compute its beginning."""

from __future__ import annotations

from collections.abc import Sequence

from oats.engine.cache import PagedCache, Tokens

SHORTEST = 16
"""A common beginning of fewer tokens is computed again: sharing it would copy a page."""


class Prefixes:
    """The sequences that ended last. A new one shares their pages up to where the tokens differ.

    Args:
        cache: holds the sequences.
        count: sequences kept at most.
        nbytes: of their pages at most; a page that two of them share counts twice.
        longest: longer texts share nothing, because what is in the cache of them depends on their length;
            None for no limit.
    """

    def __init__(
        self, cache: PagedCache, count: int = 8, nbytes: int = 256 << 20, longest: int | None = None
    ) -> None:
        self._cache, self._count, self._most, self._longest = cache, count, nbytes, longest
        self._kept: list[tuple[list[int], Tokens]] = []  # the one that was of use last is the last

    def begin(self, prompt: Sequence[int]) -> Tokens:
        """A sequence that holds what is known of a prompt, at most all but its last token."""
        if self._is_long(prompt):
            return self._cache.new(len(prompt))
        best, wanted = 0, prompt[:-1]
        for index, (ids, tokens) in enumerate(self._kept):
            common = _common(ids, wanted)
            if common > best and common >= SHORTEST and self._cache.can_truncate(tokens, common):
                best, found = common, index
        if not best:
            return self._cache.new(len(prompt))
        self._kept.append(self._kept.pop(found))
        started = self._cache.fork(self._kept[-1][1])
        self._cache.truncate(started, best)
        started.until = len(prompt)
        return started

    def keep(self, ids: Sequence[int], tokens: Tokens) -> None:
        """Take a sequence that ended.

        Args:
            ids: its tokens, at least those that are in the cache.
            tokens: what holds them; it belongs to this object now.
        """
        ids = list(ids[: tokens.length])
        if self._is_long(ids):
            return self._cache.release(tokens)
        for entry in [entry for entry in self._kept if _common(entry[0], ids) == len(entry[0])]:
            self._drop(entry)  # the new one begins with it
        self._kept.append((ids, tokens))
        while self._kept and (len(self._kept) > self._count or self.nbytes > self._most):
            self._drop(self._kept[0])

    def release(self, tokens: Tokens) -> None:
        """Give the pages of a sequence back that is not worth keeping."""
        self._cache.release(tokens)

    def clear(self) -> None:
        """Give all pages back."""
        while self._kept:
            self._drop(self._kept[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the pages of all; shared ones count for each."""
        return sum(self._cache.nbytes_of(tokens) for _, tokens in self._kept)

    def _is_long(self, ids: Sequence[int]) -> bool:
        return self._longest is not None and len(ids) > self._longest

    def _drop(self, entry: tuple[list[int], Tokens]) -> None:
        self._kept.remove(entry)
        self._cache.release(entry[1])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens with which both begin.

    >>> _common([1, 2, 3], [1, 2, 5, 6]), _common([], [1])
    (2, 0)
    """
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
