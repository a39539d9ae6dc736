"""One model, one thread that generates with it, and a queue of requests."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from oats.errors import ConfigError, QueueFullError
from oats.models.architecture import context_limit
from oats.serving.alone import generate_alone
from oats.serving.batch import Batch, NextToken, RunningText, can_batch
from oats.serving.decoding import IncrementalDecoder
from oats.serving.request import Event, Request, Sampling

GREEDY_BELOW = 1e-5
"""Below this temperature the most likely token is taken: dividing logits by it would overflow."""

MAX_BATCH = 8
"""Texts continued at once by default: a layer takes about as long for 8 rows as for one."""


class Engine:
    """Generates for several requests at once; the others wait in a queue.

    Each step gives one token to every running request (:mod:`oats.serving.batch`). A long prompt is computed
    in pieces, and the other requests get a token after each piece. A model whose past tokens cannot be padded
    gets one request at a time.

    Args:
        model: a causal language model of transformers.
        max_waiting: requests that may wait for those that run.
        max_batch: requests that run at once.
    """

    def __init__(self, model: Any, tokenizer: Any, max_waiting: int = 64, max_batch: int = MAX_BATCH) -> None:
        for count, what in ((max_waiting, "wait"), (max_batch, "run")):
            if count < 1:
                raise ConfigError(f"at least 1 request must be able to {what}, got {count}")
        self.model, self.tokenizer = model, tokenizer
        self.context = context_limit(model)
        """Tokens of prompt and output together, at most; None if the model does not say."""
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
        self._batch = Batch(model) if can_batch(model) else None
        self.max_batch = max_batch if self._batch else 1
        """Requests that run at once."""
        self._max_waiting = max_waiting
        self._waiting: deque[Request] = deque()
        self._prefilling: deque[RunningText] = deque()  # taken from the queue, in that order
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
        batched = len(self._batch.texts) if self._batch else 0
        return batched + len(self._prefilling) + (self._alone is not None)

    @property
    def alive(self) -> bool:
        """True while requests are answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Callable[[Event], None]) -> Request:
        """Queue a request.

        Args:
            ids: tokens of the prompt, at least one.
            sampling: how to continue it.
            deliver: the engine's thread calls it with each piece of text, and at the end with how it ended.

        Raises:
            ConfigError: the prompt is empty, or prompt and output together exceed the model's context.
            QueueFullError: too many requests wait, or the engine was closed.
        """
        if not ids:
            raise ConfigError("the prompt is empty; give some text to continue")
        if self.context is not None and len(ids) + sampling.max_tokens > self.context:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and {sampling.max_tokens} more are asked for, but the "
                f"model's context is {self.context} tokens; shorten the prompt or ask for fewer"
            )
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
            if self._batch is not None:
                self._prefill(self._batch)
                self._step(self._batch)
        batched = self._batch.texts if self._batch else []
        for request in [text.request for text in (*batched, *self._prefilling)] + list(self._waiting):
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
        """Queue the prompt of a request for the batch; without a batch, generate for it now."""
        if request.cancelled:
            _end(request)
            return
        sampling = request.sampling
        end: bool | Exception
        try:
            config = self._generation_config(sampling)
            if self._batch is not None:
                choose = NextToken(self.model, config, request.ids, sampling.seed)
                self._prefilling.append(RunningText(request, choose))
                return
            self._alone = request
            end = generate_alone(self.model, config, request, lambda: self._closed) in self._ends
            if self._closed:
                request.cancel()
        except Exception as error:
            end = error
        self._alone = None
        _end(request, end)

    def _prefill(self, batch: Batch) -> None:
        """Compute a piece of the oldest prompt."""
        if not self._prefilling:
            return
        text = self._prefilling[0]
        end: bool | Exception
        try:
            if not text.request.cancelled:
                if not batch.prefill(text):
                    return
                if self._goes_on(text):
                    batch.add(text)
                    self._prefilling.popleft()
                    return
            end = text.last in self._ends
        except Exception as error:
            end = error
        self._prefilling.popleft()
        _end(text.request, end)

    def _step(self, batch: Batch) -> None:
        """Give each running text its next token."""
        if not batch.texts:
            return
        failure: Exception | None = None
        try:
            batch.step()
            ended = [text for text in batch.texts if not self._goes_on(text)]
        except Exception as error:
            failure, ended = error, batch.texts
        # Free their places before their clients learn of the end and ask again.
        batch.keep([text for text in batch.texts if text not in ended])
        for text in ended:
            _end(text.request, failure or text.last in self._ends)

    def _goes_on(self, text: RunningText) -> bool:
        """Deliver the newest token of a text; True if another one is needed."""
        request = text.request
        try:
            request.push(text.last)
        except Exception:
            request.cancel()  # the receiver is gone
        limit = request.sampling.max_tokens
        return not (text.last in self._ends or request.stopped or request.tokens >= limit)

    def _generation_config(self, sampling: Sampling) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = sampling.max_tokens, None
        config.eos_token_id = sorted(self._ends) or None
        if config.pad_token_id is None:
            # One sequence needs no padding, but generate() warns if this is not set.
            config.pad_token_id = min(self._ends, default=0)
        if sampling.temperature is not None and sampling.temperature < GREEDY_BELOW:
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        elif sampling.temperature is not None or sampling.top_p is not None:
            config.do_sample = True
            config.temperature = sampling.temperature or config.temperature
            config.top_p = sampling.top_p or config.top_p
        return config


def _end(request: Request, end: bool | Exception = False) -> None:
    """Deliver the end of a request; `end` is True at the end of the text, or the error."""
    try:
        if isinstance(end, Exception):
            request.deliver(end)
        else:
            request.finish(reached_end=end)
    except Exception:
        request.cancel()  # the receiver is gone
