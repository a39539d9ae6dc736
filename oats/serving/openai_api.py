"""The part of OpenAI's HTTP interface that a text model on one machine has an answer to.

``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``, with streaming, and ``/health`` and
``/metrics`` (Prometheus) for whoever runs it. A parameter that is not implemented and would change the answer
is an error, not ignored; errors have OpenAI's shape, ``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from oats.errors import ConfigError, QueueFullError
from oats.serving.engine import Engine
from oats.serving.request import Event, Finished, Generation, Sampling

DEFAULT_MAX_TOKENS = 512
"""Tokens generated where a request does not say, or less where the context ends."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Parameters that are not implemented → the values, besides null, with which they change nothing."""

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_POLL_SECONDS = 0.5  # how often a request that is not streamed looks whether its client is still there


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class _Body(BaseModel):
    """What both kinds of request have; other fields are kept, and checked against `NEUTRAL`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class ContentPart(BaseModel):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(_Body):
    """Of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class CompletionBody(_Body):
    """Of ``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]


class ApiError(Exception):
    """An error with the status and the body that OpenAI's clients expect."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Metrics:
    """What ``/metrics`` says."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "oats_requests", "Requests answered.", ["endpoint", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter("oats_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.generated_tokens = Counter(
            "oats_generated_tokens", "Tokens generated, also of cancelled requests.", registry=self.registry
        )
        self.cancelled = Counter(
            "oats_cancelled", "Generations stopped because the client left.", registry=self.registry
        )
        self.first_token = Histogram(
            "oats_time_to_first_token_seconds",
            "From the request to its first text, waiting included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "oats_request_seconds", "From the request to its end.", buckets=_SECONDS, registry=self.registry
        )
        for name, help_text, value in (
            ("oats_requests_waiting", "Requests in the queue.", lambda: engine.waiting),
            ("oats_requests_running", "Requests being generated.", lambda: engine.running),
        ):
            Gauge(name, help_text, registry=self.registry).set_function(value)


class _Stream:
    """A generation as the event loop sees it: an iterator over its text, and how it finished."""

    def __init__(self, engine: Engine, metrics: Metrics, ids: list[int], sampling: Sampling) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._metrics = metrics

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        try:
            self.generation: Generation = engine.submit(ids, sampling, deliver)
        except QueueFullError as error:
            raise ApiError(503, str(error), "overloaded") from error
        except ConfigError as error:
            raise ApiError(400, str(error), "context_length_exceeded") from error
        metrics.prompt_tokens.inc(len(ids))
        self.finished: Finished | None = None

    async def text(self, request: Request) -> AsyncIterator[str]:
        """The pieces of text; stops the generation if the client leaves, or nobody iterates any more."""
        first, looked = True, time.perf_counter()
        try:
            while self.finished is None:
                if time.perf_counter() - looked > _POLL_SECONDS:
                    looked = time.perf_counter()
                    if await request.is_disconnected():
                        return
                try:
                    event = await asyncio.wait_for(self._events.get(), _POLL_SECONDS)
                except asyncio.TimeoutError:
                    continue
                if isinstance(event, Exception):
                    raise ApiError(500, f"generation failed: {event}") from event
                if isinstance(event, Finished):
                    self.finished = event
                    continue
                if first:
                    first = False
                    self._metrics.first_token.observe(time.perf_counter() - self.generation.submitted)
                yield event
        finally:
            if self.finished is None:
                self.generation.cancel()
                self._metrics.cancelled.inc()
            self._metrics.generated_tokens.inc(self.generation.tokens)
            self._metrics.duration.observe(time.perf_counter() - self.generation.submitted)

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of the output."""
        prompt, output = len(self.generation.ids), self.generation.tokens
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def build_app(engine: Engine, name: str) -> FastAPI:
    """The application.

    Args:
        engine: with the model and its tokenizer, whose chat template makes conversations into prompts.
        name: of the model, as clients ask for it.
    """
    app = FastAPI(title="oats", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(engine)
    created = int(time.time())
    card = {"id": name, "object": "model", "created": created, "owned_by": "oats"}

    def answer(request: Request, status: int, body: Mapping[str, Any]) -> JSONResponse:
        known = any(getattr(route, "path", None) == request.url.path for route in app.routes)
        metrics.requests.labels(request.url.path if known else "other", status).inc()
        headers = {"Retry-After": "1"} if status == 503 else None
        return JSONResponse(dict(body), status, headers)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error.status, error.body())

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            problem = ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}")
        else:
            place = ".".join(str(part) for part in first["loc"] if part != "body")
            problem = ApiError(400, f"{place or 'the body'}: {first['msg']}", param=place or None)
        return answer(request, 400, problem.body())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        problem = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return answer(request, error.status_code, problem.body())

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if engine.alive else "stopped"
        return JSONResponse(
            {"status": status, "model": name, "waiting": engine.waiting}, 200 if engine.alive else 503
        )

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        _check_name(model, name)
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        _check(body, name)
        ids = _not_empty(_prompt_of_messages(engine.tokenizer, body.messages), "messages")
        sampling = _sampling(engine, ids, body, body.max_completion_tokens or body.max_tokens)
        return await respond(request, body, ids, sampling, _Chat(name))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check(body, name)
        ids = _not_empty(_prompt_of_text(engine, body.prompt), "prompt")
        return await respond(
            request, body, ids, _sampling(engine, ids, body, body.max_tokens), _Completion(name)
        )

    async def respond(
        request: Request, body: _Body, ids: list[int], sampling: Sampling, shape: _Shape
    ) -> Response:
        stream = _Stream(engine, metrics, ids, sampling)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            metrics.requests.labels(request.url.path, 200).inc()
            return StreamingResponse(
                _server_sent(stream, request, shape, usage), media_type="text/event-stream"
            )
        text = "".join([piece async for piece in stream.text(request)])
        if stream.finished is None:
            return answer(request, 499, {})  # nobody is there to read it
        return answer(request, 200, shape.whole(text, stream.finished, stream.usage()))

    return app


async def _server_sent(
    stream: _Stream, request: Request, shape: _Shape, include_usage: bool
) -> AsyncIterator[str]:
    def event(value: Mapping[str, Any] | str) -> str:
        return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"

    text = stream.text(request)
    try:
        for chunk in shape.opening():
            yield event(chunk)
        async for piece in text:
            yield event(shape.piece(piece))
        if stream.finished is None:
            return
        yield event(shape.closing(stream.finished))
        if include_usage:
            yield event(shape.usage(stream.usage()))
        yield event("[DONE]")
    except ApiError as error:
        yield event(error.body())
    finally:
        await text.aclose()  # type: ignore[attr-defined]


class _Shape:
    """The JSON objects of one kind of answer."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._object(self.chunk_kind, []), "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def piece(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def closing(self, finished: Finished) -> dict[str, Any]:
        raise NotImplementedError

    def whole(self, text: str, finished: Finished, usage: dict[str, int]) -> dict[str, Any]:
        raise NotImplementedError


class _Chat(_Shape):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [
            self._object(self.chunk_kind, [self._choice({"delta": {"role": "assistant", "content": ""}})])
        ]

    def piece(self, text: str) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self._choice({"delta": {"content": text}})])

    def closing(self, finished: Finished) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self._choice({"delta": {}}, finished.reason)])

    def whole(self, text: str, finished: Finished, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {
            **self._object(self.kind, [self._choice({"message": message}, finished.reason)]),
            "usage": usage,
        }


class _Completion(_Shape):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def piece(self, text: str) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self._choice({"text": text})])

    def closing(self, finished: Finished) -> dict[str, Any]:
        return self._object(self.chunk_kind, [self._choice({"text": ""}, finished.reason)])

    def whole(self, text: str, finished: Finished, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._object(self.kind, [self._choice({"text": text}, finished.reason)]), "usage": usage}


def _check_name(asked: str | None, name: str) -> None:
    if asked is not None and asked != name:
        raise ApiError(404, f"there is no model {asked!r} here, only {name!r}", "model_not_found", "model")


def _check(body: _Body, name: str) -> None:
    _check_name(body.model, name)
    for parameter, value in (body.model_extra or {}).items():
        if parameter in NEUTRAL and value is not None and not _is_one_of(value, NEUTRAL[parameter]):
            raise ApiError(
                400,
                f"{parameter}={json.dumps(value)[:80]} is not implemented; leave it out",
                "unsupported_parameter",
                parameter,
            )


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # bool is an int in Python, and 0 == False: `logprobs: 0` asks for something.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)


def _prompt_of_messages(tokenizer: Any, messages: list[Message]) -> list[int]:
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "this model has no chat template, so it does not know turns: ask /v1/completions with a prompt, "
            "or start the server with --chat-template FILE",
            "no_chat_template",
        )
    turns = []
    for index, message in enumerate(messages):
        parts = message.content if isinstance(message.content, list) else []
        if any(part.type != "text" for part in parts):
            raise ApiError(400, "this model takes text only", param=f"messages.{index}.content")
        content = "".join(part.text or "" for part in parts) if parts else message.content or ""
        turns.append({**(message.model_extra or {}), "role": message.role, "content": content})
    try:
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        raise ApiError(
            400, f"the model's chat template refuses this conversation: {error}", param="messages"
        ) from error
    return list(encoded["input_ids"])


def _prompt_of_text(engine: Engine, prompt: str | list[int] | list[str] | list[list[int]]) -> list[int]:
    one: Any = prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise ApiError(
                400,
                f"one prompt a request, got {len(prompt)}; send one request each",
                "unsupported_parameter",
                "prompt",
            )
        one = prompt[0]
    if isinstance(one, str):
        return list(engine.tokenizer(one).input_ids)
    vocabulary = engine.model.get_input_embeddings().num_embeddings
    if unknown := [token for token in one if not 0 <= token < vocabulary]:
        raise ApiError(400, f"{unknown[0]} is no token: the model has {vocabulary}", param="prompt")
    return list(one)


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise ApiError(400, "the prompt is empty; give some text to continue", param=param)
    return ids


def _sampling(engine: Engine, ids: list[int], body: _Body, max_tokens: int | None) -> Sampling:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS
        if engine.context is not None:
            max_tokens = max(1, min(max_tokens, engine.context - len(ids)))
    return Sampling(max_tokens, body.temperature, body.top_p, tuple(stop), body.seed)
