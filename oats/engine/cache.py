"""Keys and values in pages: sequences of any length side by side, without padding.

A page holds the keys and values of `PAGE` tokens, for all layers that see the same window. Sequences may
share pages: a page that more than one sequence holds is copied before one of them writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oats import _core

PAGE: int = _core.page_tokens
"""Tokens of a page."""

GONE = -1
"""In a table of pages: the page left the window of its layers."""

_FIRST_PAGES = 16


@dataclass(eq=False)
class Tokens:
    """What is known of one sequence: how many of its tokens are in the cache, and where."""

    length: int = 0
    until: int = 0
    """Length at the end of the prompt that is being appended: rotary frequencies that depend on the length
    are for this one, whatever pieces the prompt comes in."""
    tables: list[list[int]] = field(default_factory=list)


class PagePool:
    """The pages of the layers that see one window.

    Args:
        layers: their number.
        kv_heads: heads of keys and values.
        head_dim: of each.
        window: tokens that a token sees, itself included; 0 for all.
        dtype: of keys and values.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, window: int, dtype: torch.dtype) -> None:
        self.window = window
        self._shape = (layers, 2, kv_heads, PAGE * head_dim)
        self.pages = torch.empty((0, *self._shape), dtype=dtype)
        self._holders: list[int] = []
        self._free: list[int] = []

    @property
    def in_use(self) -> int:
        """Pages that a sequence holds."""
        return len(self._holders) - len(self._free)

    def take(self) -> int:
        """A free page, held once."""
        if not self._free:
            self._grow()
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, table: Sequence[int]) -> list[int]:
        """The same pages, held once more."""
        for page in table:
            if page != GONE:
                self._holders[page] += 1
        return list(table)

    def release(self, page: int) -> None:
        """Hold a page once less."""
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def own(self, page: int) -> int:
        """A page with the same content that nobody else holds."""
        if self._holders[page] == 1:
            return page
        copy = self.take()
        self.pages[copy] = self.pages[page]
        self.release(page)
        return copy

    def _grow(self) -> None:
        count = len(self._holders)
        grown = torch.empty((max(_FIRST_PAGES, 2 * count), *self._shape), dtype=self.pages.dtype)
        grown[:count] = self.pages
        self.pages = grown
        self._free.extend(range(len(grown) - 1, count - 1, -1))
        self._holders.extend([0] * (len(grown) - count))


class PagedCache:
    """The keys and values of all sequences.

    Args:
        pools: of each window.
    """

    def __init__(self, pools: Sequence[PagePool]) -> None:
        self.pools = list(pools)

    def new(self, prompt: int = 0) -> Tokens:
        """A sequence without tokens, whose prompt will have `prompt`."""
        return Tokens(until=prompt, tables=[[] for _ in self.pools])

    def fork(self, tokens: Tokens) -> Tokens:
        """A sequence that goes on from the same tokens; their pages are shared."""
        tables = [pool.share(table) for pool, table in zip(self.pools, tokens.tables, strict=True)]
        return Tokens(tokens.length, tokens.until, tables)

    def prepare(self, tokens: Tokens, count: int) -> None:
        """Make room for the next `count` tokens, and give up pages that these will not see."""
        end = tokens.length + count
        for pool, table in zip(self.pools, tokens.tables, strict=True):
            if tokens.length % PAGE and table[-1] != GONE:
                table[-1] = pool.own(table[-1])
            while len(table) * PAGE < end:
                table.append(pool.take())
            if pool.window:
                # One page more than is seen: up to PAGE tokens may be taken back.
                for index in range(max(0, tokens.length + 1 - PAGE - pool.window) // PAGE):
                    if table[index] != GONE:
                        pool.release(table[index])
                        table[index] = GONE

    def truncate(self, tokens: Tokens, length: int) -> None:
        """Forget the tokens from `length` on; pages that left a window do not come back."""
        for pool, table in zip(self.pools, tokens.tables, strict=True):
            while len(table) * PAGE >= length + PAGE:
                page = table.pop()
                if page != GONE:
                    pool.release(page)
        tokens.length = tokens.until = length

    def can_truncate(self, tokens: Tokens, length: int) -> bool:
        """True if what a token behind the first `length` sees is still there."""
        for pool, table in zip(self.pools, tokens.tables, strict=True):
            first = max(0, length + 1 - pool.window) // PAGE if pool.window else 0
            if GONE in table[first : -(-length // PAGE)]:
                return False
        return True

    def release(self, tokens: Tokens) -> None:
        """Give all pages of a sequence back."""
        self.truncate(tokens, 0)

    @property
    def pages(self) -> list[Tensor]:
        """Of each window, as the core reads them."""
        return [pool.pages for pool in self.pools]

    def nbytes_of(self, tokens: Tokens) -> int:
        """Bytes of the pages of one sequence, also of those that it shares."""
        pools = zip(self.pools, tokens.tables, strict=True)
        return sum(
            (len(table) - table.count(GONE)) * pool.pages[0].nbytes for pool, table in pools if len(table)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that sequences hold."""
        return sum(pool.in_use * pool.pages[0].nbytes for pool in self.pools if len(pool.pages))
