"""One model, one thread that generates, and a queue of requests for it."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from oats.errors import ConfigError, QueueFullError
from oats.evaluate.perplexity import context_limit
from oats.serving.decoding import IncrementalDecoder

GREEDY_BELOW = 1e-5
"""A temperature under which only the most likely token has a chance; dividing by it would overflow."""


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.

    Args:
        max_tokens: tokens to generate at most.
        temperature: 0 takes the most likely token each time; None leaves it to the model's generation config.
        top_p: share of the probability that is sampled from, in (0, 1]; None leaves it to the model.
        stop: texts that end the output, without being part of it.
        seed: of the sampling; None goes on with torch's random state.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Finished:
    """How a generation ended.

    Attributes:
        reason: ``"stop"`` at the end of the text or a stop string, ``"length"`` after `Sampling.max_tokens`,
            ``"cancelled"``.
        tokens: that were generated.
    """

    reason: Literal["stop", "length", "cancelled"]
    tokens: int


Event = str | Finished | Exception
"""What a generation delivers: pieces of text, and at the end how it finished, or what went wrong."""


class Generation(BaseStreamer, StoppingCriteria):
    """One request: transformers hands it each token, and asks it whether to stop."""

    def __init__(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        decoder: IncrementalDecoder,
        deliver: Callable[[Event], None],
    ) -> None:
        """Hold a request; :meth:`Engine.submit` makes it."""
        self.ids, self.sampling, self.deliver = list(ids), sampling, deliver
        self.tokens = 0
        self.submitted = time.perf_counter()
        self._decoder, self._prompt_seen, self._cancelled = decoder, False, threading.Event()

    def cancel(self) -> None:
        """Stop after the token that is being computed; from any thread, at any time."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was called."""
        return self._cancelled.is_set()

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token; called by transformers."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.tokens += 1
            if text := self._decoder.push(token):
                self.deliver(text)

    def end(self) -> None:
        """Deliver what was held back; called by transformers."""
        if text := self._decoder.flush():
            self.deliver(text)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether to stop here; called by transformers after each token."""
        return torch.full((input_ids.shape[0],), self.cancelled or self._decoder.stopped, dtype=torch.bool)

    def finished(self, reached_end: bool) -> Finished:
        """How it ended, once transformers has returned."""
        if self.cancelled:
            return Finished("cancelled", self.tokens)
        stopped = reached_end or self._decoder.stopped
        return Finished("stop" if stopped else "length", self.tokens)


class Engine:
    """Generates for one request after another, in the order in which they came.

    Args:
        model: a causal language model of transformers.
        tokenizer: that belongs to it.
        max_waiting: requests that may wait for the one that runs.
    """

    def __init__(self, model: Any, tokenizer: Any, max_waiting: int = 64) -> None:
        """Start the thread."""
        if max_waiting < 1:
            raise ConfigError(f"at least 1 request must be able to wait, got {max_waiting}")
        self.model, self.tokenizer = model, tokenizer
        self.context = context_limit(model)
        """Tokens that prompt and output have together at most; None where the model does not say."""
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}
        self._queue: queue.Queue[Generation | None] = queue.Queue(max_waiting)
        self._running: Generation | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="oats-generate", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    @property
    def running(self) -> bool:
        """Whether a request is being worked on."""
        return self._running is not None

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
        if self._closed:
            raise QueueFullError("the server is stopping")
        if not ids:
            raise ConfigError("the prompt is empty; give some text to continue")
        if self.context is not None and len(ids) + sampling.max_tokens > self.context:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens and {sampling.max_tokens} more are asked for, but the "
                f"model's context is {self.context} tokens; shorten the prompt or ask for fewer"
            )
        generation = Generation(ids, sampling, IncrementalDecoder(self.tokenizer, sampling.stop), deliver)
        try:
            self._queue.put_nowait(generation)
        except queue.Full:
            raise QueueFullError(
                f"{self._queue.maxsize} requests are waiting already; try again later"
            ) from None
        return generation

    def close(self) -> None:
        """Cancel what runs and what waits, and end the thread."""
        self._closed = True
        if running := self._running:
            running.cancel()
        while True:
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                with contextlib.suppress(queue.Empty):  # the thread may have taken it meanwhile
                    if (waiting := self._queue.get_nowait()) is not None:
                        waiting.cancel()
                        waiting.deliver(waiting.finished(reached_end=False))
        self._thread.join()

    def _work(self) -> None:
        while (generation := self._queue.get()) is not None:
            self._running = generation
            try:
                event: Event = self._generate(generation)
            except Exception as error:
                event = error
            self._running = None
            try:
                generation.deliver(event)
            except Exception:
                generation.cancel()  # nobody is there to take it

    def _generate(self, generation: Generation) -> Finished:
        if self._closed:
            generation.cancel()
        if generation.cancelled:
            return generation.finished(reached_end=False)
        sampling = generation.sampling
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = torch.tensor([generation.ids])
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self._generation_config(sampling),
            streamer=generation,
            stopping_criteria=StoppingCriteriaList([generation]),
        )
        return generation.finished(reached_end=int(output[0, -1]) in self._ends)

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
