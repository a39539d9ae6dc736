"""One model, one thread that generates with it, and a queue of requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oats.engine.batch import Batch, Text
from oats.engine.engine import Engine
from oats.errors import ConfigError, QueueFullError
from oats.serving.alone import generate_alone
from oats.serving.decoding import IncrementalDecoder
from oats.serving.next_token import NextToken, end_tokens, generation_config
from oats.serving.request import Event, Request, Sampling

MAX_BATCH = 16
"""Texts continued at once by default: a layer takes little longer for 16 rows than for one."""


@dataclass
class _Running:
    request: Request
    choose: NextToken


class RequestQueue:
    """Generates for several requests at once; the others wait.

    Each step of the engine gives one token to every running request (:mod:`oats.engine.batch`). A long prompt
    is computed in pieces, and the other requests get a token with each piece. A model that the engine does
    not run gets one request at a time, through ``generate`` of transformers.

    Args:
        model: a causal language model of transformers.
        max_waiting: requests that may wait for those that run.
        max_batch: requests that run at once.

    Attributes:
        engine: runs the model; `Engine.reason` says why it does not.
        context: tokens of prompt and output together, at most; None if the model does not say.
        max_batch: requests that run at once.
    """

    def __init__(self, model: Any, tokenizer: Any, max_waiting: int = 64, max_batch: int = MAX_BATCH) -> None:
        for count, what in ((max_waiting, "wait"), (max_batch, "run")):
            if count < 1:
                raise ConfigError(f"at least 1 request must be able to {what}, got {count}")
        self.model, self.tokenizer = model, tokenizer
        self.engine = Engine(model)
        self.context = self.engine.context
        self._ends = end_tokens(model, tokenizer)
        self._batch: Batch | None = self.engine.batch() if self.engine.reason is None else None
        self.max_batch = max_batch if self._batch else 1
        self._max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self._running: dict[Text, _Running] = {}
        self._alone: Request | None = None  # the running request of a model without a batch
        self._closed = False
        self._changed = threading.Condition()  # the queue has changed, or `_closed`
        self._thread = threading.Thread(target=self._work, name="oats-generate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue that were not cancelled."""
        with self._changed:
            return sum(not request.cancelled for request in self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being worked on."""
        return len(self._running) + (self._alone is not None)

    @property
    def alive(self) -> bool:
        """True while requests are answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Callable[[Event], None]) -> Request:
        """Queue a request.

        Args:
            ids: tokens of the prompt, at least one.
            sampling: how to continue it.
            deliver: the queue's thread calls it with each piece of text, and at the end with how it ended.

        Raises:
            ConfigError: the prompt is empty or has a token that the model does not have, or prompt and output
                together exceed the model's context.
            QueueFullError: too many requests wait, or the queue was closed.
        """
        if not ids:
            raise ConfigError("the prompt is empty; give some text to continue")
        if self.context is not None and len(ids) + sampling.max_tokens > self.context:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and {sampling.max_tokens} more are asked for, but the "
                f"model's context is {self.context} tokens; shorten the prompt or ask for fewer"
            )
        if self._batch is not None:
            self.engine.check_text(ids, sampling.max_tokens)
        request = Request(ids, sampling, IncrementalDecoder(self.tokenizer, sampling.stop), deliver)
        with self._changed:
            if self._closed:
                raise QueueFullError("the server is stopping")
            if self.waiting >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting already; try again later")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        """Cancel all requests, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            for request in taken:
                self._start(request)
            if self._batch is not None and self._running:
                self._step(self._batch)
        for request in [running.request for running in self._running.values()] + list(self._waiting):
            request.cancel()
            _end(request)

    def _take(self) -> list[Request] | None:
        """Requests to start now; None ends the thread. Waits if there is no other work."""
        with self._changed:
            while not (self._closed or self._waiting or self.running):
                self._changed.wait()
            if self._closed:
                return None
            taken: list[Request] = []
            while self._waiting and self.running + len(taken) < self.max_batch:
                taken.append(self._waiting.popleft())
            return taken

    def _start(self, request: Request) -> None:
        """Add a request to the batch; without a batch, generate for it now."""
        if request.cancelled:
            _end(request)
            return
        sampling = request.sampling
        end: bool | Exception
        try:
            config = generation_config(self.model, self._ends, sampling)
            if self._batch is not None:
                choose = NextToken(self.model, config, request.ids, sampling.seed)
                self._running[self._batch.add(request.ids)] = _Running(request, choose)
                return
            self._alone = request
            end = generate_alone(self.model, config, request, lambda: self._closed) in self._ends
            if self._closed:
                request.cancel()
        except Exception as error:
            end = error
        self._alone = None
        _end(request, end)

    def _step(self, batch: Batch) -> None:
        """Give each text whose prompt is done its next token."""
        ended: dict[Text, bool | Exception] = {}
        try:
            for text, running in self._running.items():
                if running.request.cancelled:
                    ended[text] = False
                    batch.remove(text)
            for text, logits in batch.step() if batch.texts else []:
                running = self._running[text]
                try:
                    text.output.append(running.choose(logits))
                    if self._goes_on(text, running.request):
                        continue
                    ended[text] = text.output[-1] in self._ends
                except Exception as error:
                    ended[text] = error
                batch.remove(text)
        except Exception as error:
            # What the step has left behind is not known.
            for text in batch.texts[:]:
                ended[text] = error
                batch.discard(text)
        # Free their places before their clients learn of the end and ask again.
        requests = [(self._running.pop(text).request, end) for text, end in ended.items()]
        for request, end in requests:
            _end(request, end)

    def _goes_on(self, text: Text, request: Request) -> bool:
        """Deliver the newest token of a text; True if another one is needed."""
        try:
            request.push(text.output[-1])
        except Exception:
            request.cancel()  # the receiver is gone
        limit = request.sampling.max_tokens
        return not (text.output[-1] in self._ends or request.stopped or request.tokens >= limit)


def _end(request: Request, end: bool | Exception = False) -> None:
    """Deliver the end of a request; `end` is True at the end of the text, or the error."""
    try:
        if isinstance(end, Exception):
            request.deliver(end)
        else:
            request.finish(reached_end=end)
    except Exception:
        request.cancel()  # the receiver is gone
