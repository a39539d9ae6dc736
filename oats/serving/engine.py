"""One model, one thread that generates, and a queue of requests for it."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from oats.errors import ConfigError, QueueFullError
from oats.models.context import context_limit
from oats.serving.alone import generate_alone
from oats.serving.batch import Batch, NextToken, Text, can_batch
from oats.serving.decoding import IncrementalDecoder
from oats.serving.request import Event, Generation, Sampling

GREEDY_BELOW = 1e-5
"""A temperature under which only the most likely token has a chance; dividing by it would overflow."""

MAX_BATCH = 8
"""Texts continued at once where nothing else is said: so many rows cost a layer about what one does."""


class Engine:
    """Generates for several requests at once, and lets others wait in the order in which they came.

    All that run get one token each in turn (:mod:`oats.serving.batch`). A long prompt is computed in pieces,
    between which the others get their tokens. A model whose past cannot be padded is given one request at a
    time.

    Args:
        model: a causal language model of transformers.
        tokenizer: that belongs to it.
        max_waiting: requests that may wait for those that run.
        max_batch: requests that run at once.
    """

    def __init__(self, model: Any, tokenizer: Any, max_waiting: int = 64, max_batch: int = MAX_BATCH) -> None:
        if max_waiting < 1:
            raise ConfigError(f"at least 1 request must be able to wait, got {max_waiting}")
        if max_batch < 1:
            raise ConfigError(f"at least 1 request must be able to run, got {max_batch}")
        self.model, self.tokenizer = model, tokenizer
        self.context = context_limit(model)
        """Tokens that prompt and output have together at most; None where the model does not say."""
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
        self._batch = Batch(model) if can_batch(model) else None
        self.max_batch = max_batch if self._batch else 1
        """Requests that run at once."""
        self._max_waiting = max_waiting
        self._waiting: deque[Generation] = deque()
        self._prefilling: deque[Text] = deque()  # were taken from the queue, in that order
        self._alone: Generation | None = None  # runs by itself, where there is no batch
        self._closed = False
        self._changed = threading.Condition()  # of the queue, or of being closed
        self._thread = threading.Thread(target=self._work, name="oats-generate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue that somebody still waits for."""
        with self._changed:
            return sum(not generation.cancelled for generation in self._waiting)

    @property
    def running(self) -> int:
        """Requests that are being worked on."""
        batched = len(self._batch.texts) if self._batch else 0
        return batched + len(self._prefilling) + (self._alone is not None)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._closed

    def submit(self, ids: Sequence[int], sampling: Sampling, deliver: Callable[[Event], None]) -> Generation:
        """Queue a request.

        Args:
            ids: of the prompt, at least one.
            sampling: how to continue it.
            deliver: called from the engine's thread with each piece of text, then once with how it ended.

        Raises:
            ConfigError: the prompt is empty, or longer than the model's context with the output.
            QueueFullError: too many requests wait, or the engine was closed.
        """
        if not ids:
            raise ConfigError("the prompt is empty; give some text to continue")
        if self.context is not None and len(ids) + sampling.max_tokens > self.context:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and {sampling.max_tokens} more are asked for, but the "
                f"model's context is {self.context} tokens; shorten the prompt or ask for fewer"
            )
        generation = Generation(ids, sampling, IncrementalDecoder(self.tokenizer, sampling.stop), deliver)
        with self._changed:
            if self._closed:
                raise QueueFullError("the server is stopping")
            if self.waiting >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting already; try again later")
            self._waiting.append(generation)
            self._changed.notify()
        return generation

    def close(self) -> None:
        """Cancel what runs and what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            for generation in taken:
                self._start(generation)
            if self._batch is not None:
                self._prefill(self._batch)
                self._step(self._batch)
        batched = self._batch.texts if self._batch else []
        for generation in [text.generation for text in (*batched, *self._prefilling)] + list(self._waiting):
            generation.cancel()
            _end(generation)

    def _take(self) -> list[Generation] | None:
        """Requests to begin with, None to end; waits where there is nothing else to do."""
        with self._changed:
            while not (self._closed or self._waiting or self.running):
                self._changed.wait()
            if self._closed:
                return None
            taken: list[Generation] = []
            while self._waiting and self.running + len(taken) < self.max_batch:
                taken.append(self._waiting.popleft())
            return taken

    def _start(self, generation: Generation) -> None:
        """Put a request among those whose prompt is computed, or generate for it alone."""
        if generation.cancelled:
            _end(generation)
            return
        sampling = generation.sampling
        end: bool | Exception
        try:
            config = self._generation_config(sampling)
            if self._batch is not None:
                choose = NextToken(self.model, config, generation.ids, sampling.seed)
                self._prefilling.append(Text(generation, choose))
                return
            self._alone = generation
            end = generate_alone(self.model, config, generation, lambda: self._closed) in self._ends
            if self._closed:
                generation.cancel()
        except Exception as error:
            end = error
        self._alone = None
        _end(generation, end)

    def _prefill(self, batch: Batch) -> None:
        """Compute a piece of the prompt that came first."""
        if not self._prefilling:
            return
        text = self._prefilling[0]
        end: bool | Exception
        try:
            if not text.generation.cancelled:
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
        _end(text.generation, end)

    def _step(self, batch: Batch) -> None:
        """Give each text that runs its next token."""
        if not batch.texts:
            return
        failure: Exception | None = None
        try:
            batch.step()
            ended = [text for text in batch.texts if not self._goes_on(text)]
        except Exception as error:
            failure, ended = error, batch.texts
        # Their places are free before they hear of the end.
        batch.keep([text for text in batch.texts if text not in ended])
        for text in ended:
            _end(text.generation, failure or text.last in self._ends)

    def _goes_on(self, text: Text) -> bool:
        """Deliver the newest token of a text; whether another is wanted."""
        generation = text.generation
        try:
            generation.push(text.last)
        except Exception:
            generation.cancel()  # nobody is there to take it
        limit = generation.sampling.max_tokens
        return not (text.last in self._ends or generation.stopped or generation.tokens >= limit)

    def _generation_config(self, sampling: Sampling) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        config.max_new_tokens, config.max_length = sampling.max_tokens, None
        config.eos_token_id = sorted(self._ends) or None
        if config.pad_token_id is None:
            # One sequence has no padding, but generate() warns where this is not set.
            config.pad_token_id = min(self._ends, default=0)
        if sampling.temperature is not None and sampling.temperature < GREEDY_BELOW:
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        elif sampling.temperature is not None or sampling.top_p is not None:
            config.do_sample = True
            config.temperature = sampling.temperature or config.temperature
            config.top_p = sampling.top_p or config.top_p
        return config


def _end(generation: Generation, end: bool | Exception = False) -> None:
    """Deliver the end of a request: whether it was the end of the text, or what went wrong."""
    try:
        if isinstance(end, Exception):
            generation.deliver(end)
        else:
            generation.finish(reached_end=end)
    except Exception:
        generation.cancel()  # nobody is there to take it
