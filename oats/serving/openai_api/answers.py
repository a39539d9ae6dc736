"""What clients get: the JSON objects of an answer, whole or as a stream of chunks, or of an error."""

from __future__ import annotations

import time
import uuid
from typing import Any, ClassVar

from oats.serving.request import Finished


class ApiError(Exception):
    """``{"error": {"message", "type", "param", "code"}}``, as OpenAI names them; `status` is that of HTTP."""

    def __init__(
        self, message: str, code: str | None = None, param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class ChatAnswer:
    """An answer of ``/v1/chat/completions``."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    # What the first chunk carries before any text (None: there is no such chunk), and the last one.
    first: ClassVar[dict[str, Any] | None] = {"delta": {"role": "assistant", "content": ""}}
    last: ClassVar[dict[str, Any]] = {"delta": {}}

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def piece(self, text: str) -> dict[str, Any]:
        """How a chunk carries a piece of text."""
        return {"delta": {"content": text}}

    def message(self, text: str) -> dict[str, Any]:
        """How a whole answer carries its text."""
        return {"message": {"role": "assistant", "content": text}}

    def chunk(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A chunk of a stream, with `first`, `last` or a :meth:`piece`."""
        return self._object(self.chunk_object, [_choice(content, reason)])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk that ends a stream with the numbers of tokens."""
        return {**self._object(self.chunk_object, []), "usage": usage}

    def whole(self, text: str, finished: Finished, usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choices = [_choice(self.message(text), finished.reason)]
        return {**self._object(self.whole_object, choices), "usage": usage}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}


class CompletionAnswer(ChatAnswer):
    """An answer of ``/v1/completions``: the same, but its choices carry the text itself."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    first: ClassVar[dict[str, Any] | None] = None
    last: ClassVar[dict[str, Any]] = {"text": ""}

    def piece(self, text: str) -> dict[str, Any]:
        """See `ChatAnswer`."""
        return {"text": text}

    message = piece


def _choice(content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}
