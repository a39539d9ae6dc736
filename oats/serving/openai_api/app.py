"""The application and its routes.

``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models`` are OpenAI's, with streaming. ``/health`` and
``/metrics`` are for whoever runs the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from oats.serving.openai_api.answers import ApiError, ChatAnswer, CompletionAnswer
from oats.serving.openai_api.bodies import Body, ChatBody, CompletionBody, check_model
from oats.serving.openai_api.metrics import Metrics
from oats.serving.openai_api.stream import TextStream
from oats.serving.request import Sampling
from oats.serving.request_queue import RequestQueue


def build_app(queue: RequestQueue, name: str) -> FastAPI:
    """The application.

    Args:
        queue: holds the model and its tokenizer, whose chat template makes a prompt of a conversation.
        name: what clients call the model.
    """
    app = FastAPI(title="oats", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(queue)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "oats"}

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
            problem = ApiError(f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}")
        else:
            place = ".".join(str(part) for part in first["loc"] if part != "body")
            problem = ApiError(f"{place or 'the body'}: {first['msg']}", param=place or None)
        return answer(request, 400, problem.body())

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        problem = ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        return answer(request, error.status_code, problem.body())

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if queue.alive else "stopped"
        return JSONResponse(
            {"status": status, "model": name, "waiting": queue.waiting}, 200 if queue.alive else 503
        )

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> dict[str, Any]:
        check_model(model, name)
        return card

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        body.check(name)
        ids = body.prompt_ids(queue)
        sampling = body.sampling(queue, ids, body.max_completion_tokens or body.max_tokens)
        return await respond(request, body, ids, sampling, ChatAnswer(name))

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        body.check(name)
        ids = body.prompt_ids(queue)
        sampling = body.sampling(queue, ids, body.max_tokens)
        return await respond(request, body, ids, sampling, CompletionAnswer(name))

    async def respond(
        request: Request, body: Body, ids: list[int], sampling: Sampling, form: ChatAnswer
    ) -> Response:
        stream = TextStream(queue, metrics, ids, sampling)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            metrics.requests.labels(request.url.path, 200).inc()
            events = _server_sent_events(stream, request, form, usage)
            return StreamingResponse(events, media_type="text/event-stream")
        text = "".join([piece async for piece in stream.text(request)])
        if stream.finished is None:
            return answer(request, 499, {})  # the client has left
        return answer(request, 200, form.whole(text, stream.finished, stream.usage()))

    return app


async def _server_sent_events(
    stream: TextStream, request: Request, form: ChatAnswer, include_usage: bool
) -> AsyncIterator[str]:
    def event(value: Mapping[str, Any]) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    text = stream.text(request)
    try:
        if form.first is not None:
            yield event(form.chunk(form.first))
        async for piece in text:
            yield event(form.chunk(form.piece(piece)))
        if stream.finished is None:
            return
        yield event(form.chunk(form.last, stream.finished.reason))
        if include_usage:
            yield event(form.usage_chunk(stream.usage()))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body())
    finally:
        await text.aclose()  # type: ignore[attr-defined]
