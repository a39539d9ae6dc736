"""One request: what is asked for, what it delivers, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from oats.serving.decoding import IncrementalDecoder


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    Args:
        max_tokens: tokens to generate at most.
        temperature: 0 takes the most likely token each time; None leaves it to the model's generation config.
        top_p: sample from the most likely tokens that have this probability together, in (0, 1]; None leaves
            it to the model's generation config.
        stop: texts that end the output; they are not part of it.
        seed: seed of the sampling; None continues with torch's random state.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Finished:
    """How a request ended.

    Attributes:
        reason: ``"stop"`` at the end of the text or a stop string, ``"length"`` after `Sampling.max_tokens`,
            ``"cancelled"``.
        tokens: number of generated tokens.
    """

    reason: Literal["stop", "length", "cancelled"]
    tokens: int


Event = str | Finished | Exception
"""What a request delivers: pieces of text, and at the end how it finished, or what went wrong."""


class Request:
    """One request and what it has delivered so far; `RequestQueue.submit` makes it."""

    def __init__(
        self, ids: Sequence[int], sampling: Sampling, decoder: IncrementalDecoder,
        deliver: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self.ids, self.sampling, self.deliver = list(ids), sampling, deliver
        self.tokens = 0
        self.submitted = time.perf_counter()
        self._decoder, self._cancelled = decoder, threading.Event()

    def cancel(self) -> None:
        """Stop after the token that is being computed. Any thread may call this at any time."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True after :meth:`cancel`."""
        return self._cancelled.is_set()

    @property
    def stopped(self) -> bool:
        """True if it needs no more tokens: it was cancelled, or a stop string was found."""
        return self.cancelled or self._decoder.stopped

    def push(self, token: int) -> None:
        """Take a token, and deliver the text that it completes."""
        self.tokens += 1
        if text := self._decoder.push(token):
            self.deliver(text)

    def finish(self, reached_end: bool = False) -> None:
        """Deliver the text that was held back, and how it ended."""
        if self.cancelled:
            self.deliver(Finished("cancelled", self.tokens))
            return
        if text := self._decoder.flush():
            self.deliver(text)
        stopped = reached_end or self._decoder.stopped
        self.deliver(Finished("stop" if stopped else "length", self.tokens))
