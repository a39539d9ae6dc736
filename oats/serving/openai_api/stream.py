"""Carries the text of a request from the queue's thread into the event loop of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import Request as HttpRequest

from oats.errors import ConfigError, QueueFullError
from oats.serving.openai_api.answers import ApiError
from oats.serving.openai_api.metrics import Metrics
from oats.serving.request import Event, Finished, Request, Sampling
from oats.serving.request_queue import RequestQueue

_POLL_SECONDS = 0.5  # how often a request that is not streamed looks whether its client is still there


class TextStream:
    """The text of one request, to iterate over in the event loop.

    Raises:
        ApiError: the queue does not take the request.

    Attributes:
        finished: how it ended; None until then, and if the client left before.
    """

    def __init__(self, queue: RequestQueue, metrics: Metrics, ids: list[int], sampling: Sampling) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._metrics = metrics

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self._request: Request = queue.submit(ids, sampling, deliver)
        except QueueFullError as error:
            raise ApiError(str(error), "overloaded", status=503) from error
        except ConfigError as error:
            raise ApiError(str(error), "context_length_exceeded") from error
        metrics.prompt_tokens.inc(len(ids))
        self.finished: Finished | None = None

    async def text(self, http: HttpRequest) -> AsyncIterator[str]:
        """The pieces of text; cancels the request if the client leaves, or the iteration is given up."""
        first, looked = True, time.perf_counter()
        try:
            while self.finished is None:
                if time.perf_counter() - looked > _POLL_SECONDS:
                    looked = time.perf_counter()
                    if await http.is_disconnected():
                        return
                try:
                    event = await asyncio.wait_for(self._events.get(), _POLL_SECONDS)
                except asyncio.TimeoutError:
                    continue
                if isinstance(event, Exception):
                    raise ApiError(f"generation failed: {event}", status=500) from event
                if isinstance(event, Finished):
                    self.finished = event
                    continue
                if first:
                    first = False
                    self._metrics.first_token.observe(time.perf_counter() - self._request.submitted)
                yield event
        finally:
            if self.finished is None:
                self._request.cancel()
                self._metrics.cancelled.inc()
            self._metrics.generated_tokens.inc(self._request.tokens)
            self._metrics.duration.observe(time.perf_counter() - self._request.submitted)

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the output, as OpenAI names them."""
        prompt, output = len(self._request.ids), self._request.tokens
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
