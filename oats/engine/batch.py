"""`Batch`: texts that are continued together, and join and leave between two steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import RLock

from torch import Tensor

from oats.engine.cache import Tokens
from oats.engine.prefixes import Prefixes
from oats.engine.statistics import Statistics

CHUNK = 512
"""Tokens of prompts that one step computes at most."""

Run = Callable[[Sequence[tuple[Tokens, Sequence[int]]], Sequence[bool]], Tensor]
"""Sequences with their next tokens, and of which logits are wanted → logits (wanted, vocabulary)."""


@dataclass(eq=False)
class Text:
    """A text that is being continued.

    Attributes:
        prompt: its first tokens.
        output: the tokens chosen so far. Whoever steps the batch appends the next one.
        tokens: its sequence in the cache; None before the first step.
    """

    prompt: list[int]
    output: list[int] = field(default_factory=list)
    tokens: Tokens | None = None

    @property
    def pending(self) -> int:
        """Number of tokens that are not in the cache yet."""
        return len(self.prompt) + len(self.output) - (self.tokens.length if self.tokens else 0)

    def next_ids(self, count: int) -> list[int]:
        """The first `count` of the pending tokens."""
        done, length = self.tokens.length if self.tokens else 0, len(self.prompt)
        if done >= length:
            return self.output[done - length :][:count]
        return (self.prompt[done : done + count] + self.output)[:count]


class Batch:
    """The texts that a model continues together; :meth:`oats.engine.engine.Engine.batch` makes it.

    A text that begins as an earlier one did shares the pages of that beginning.

    Args:
        run: runs tokens through the model.
        prefixes: where sequences begin, and go when their texts end.
        statistics: where new and shared tokens are counted.
        lock: held while the cache is used.
        computed_again_at: a text that grows beyond this length is computed again; None for none.
    """

    def __init__(
        self,
        run: Run,
        prefixes: Prefixes,
        statistics: Statistics,
        lock: RLock,
        computed_again_at: int | None = None,
    ) -> None:
        self._run, self._prefixes, self._statistics, self._lock = run, prefixes, statistics, lock
        self._computed_again_at = computed_again_at
        self.texts: list[Text] = []

    def add(self, prompt: Sequence[int]) -> Text:
        """Continue a text; its prompt has at least one token."""
        text = Text(list(prompt))
        self.texts.append(text)
        return text

    def remove(self, text: Text) -> None:
        """Continue a text no longer; what is computed of it may begin other texts."""
        self.texts.remove(text)
        if text.tokens is not None:
            with self._lock:
                self._prefixes.keep(text.prompt + text.output, text.tokens)

    def discard(self, text: Text) -> None:
        """Continue a text no longer, and forget what was computed of it."""
        self.texts.remove(text)
        if text.tokens is not None:
            with self._lock:
                self._prefixes.release(text.tokens)

    def step(self) -> list[tuple[Text, Tensor]]:
        """Compute the newest token of the texts that run, and pieces of prompts.

        Returns:
            Texts, each with logits (vocabulary,) for its next token. Append it to `Text.output`, or remove
            the text, before the next step.
        """
        for text in self.texts:
            if text.tokens is not None and self._is_computed_again(text.tokens):
                with self._lock:
                    self._prefixes.release(text.tokens)
                text.tokens = None
            if text.tokens is None:
                with self._lock:
                    text.tokens = self._prefixes.begin(text.prompt + text.output)
                self._statistics.shared_tokens += text.tokens.length
        parts = share_out([text.pending for text in self.texts])
        work = [(text, count) for text, count in zip(self.texts, parts, strict=True) if count]
        wanted = [count == text.pending for text, count in work]
        logits = self._run(
            [(text.tokens, text.next_ids(count)) for text, count in work if text.tokens is not None], wanted
        )
        texts = [text for (text, _), want in zip(work, wanted, strict=True) if want]
        self._statistics.new_tokens += len(texts)
        return list(zip(texts, logits, strict=True))

    def _is_computed_again(self, tokens: Tokens) -> bool:
        return tokens.length == self._computed_again_at and tokens.until <= tokens.length


def share_out(pending: Sequence[int]) -> list[int]:
    """How many tokens of each text the next step computes.

    Texts with one token always get it. Of `CHUNK` tokens of prompts, the oldest prompt gets its fair share
    at least, so that it does not wait for ever. The rest goes to the shortest first, so that they do not
    wait for the long ones.

    Args:
        pending: tokens that are not computed, of each text, the oldest first; each at least 1.

    >>> share_out([1, 2000, 10, 3000])
    [1, 502, 10, 0]
    >>> share_out([2000, 300, 400])
    [170, 300, 42]
    """
    parts = [0 if count > 1 else 1 for count in pending]
    prompts = [index for index, count in enumerate(pending) if count > 1]
    if not prompts:
        return parts
    oldest = prompts[0]
    parts[oldest] = min(pending[oldest], max(1, CHUNK // len(prompts)))
    room = CHUNK - parts[oldest]
    for index in sorted(prompts, key=lambda index: pending[index]):
        more = min(pending[index] - parts[index], room)
        parts[index] += more
        room -= more
    return parts
