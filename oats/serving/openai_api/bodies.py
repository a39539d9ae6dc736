"""What clients send: the JSON bodies, the checks of their parameters, and the prompt and sampling in them.

A parameter that is not implemented and would change the answer is an error. It is never ignored.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from oats.errors import ConfigError
from oats.serving.chat_template import prompt_of
from oats.serving.openai_api.answers import ApiError
from oats.serving.request import Sampling
from oats.serving.request_queue import RequestQueue

DEFAULT_MAX_TOKENS = 512
"""Tokens to generate if the request does not say; fewer if the context ends before."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (),
}  # fmt: skip
"""Parameter that is not implemented → its values, besides null, that change nothing and are accepted."""


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class Body(BaseModel):
    """The fields that both endpoints share. Other fields are kept, for :meth:`check`."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def check(self, name: str) -> None:
        """Refuse another model than `name`, and parameters that are not implemented."""
        check_model(self.model, name)
        for parameter, value in (self.model_extra or {}).items():
            if parameter in NEUTRAL and value is not None and not _is_one_of(value, NEUTRAL[parameter]):
                problem = f"{parameter}={json.dumps(value)[:80]} is not implemented; leave it out"
                raise ApiError(problem, "unsupported_parameter", parameter)

    def sampling(self, queue: RequestQueue, ids: list[int], max_tokens: int | None) -> Sampling:
        """How to continue the prompt `ids`."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if max_tokens is None:
            max_tokens = DEFAULT_MAX_TOKENS
            if queue.context is not None:
                max_tokens = max(1, min(max_tokens, queue.context - len(ids)))
        return Sampling(max_tokens, self.temperature, self.top_p, tuple(stop), self.seed)


class ContentPart(BaseModel):
    """One part of a message; only text is understood."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart] | None = None


class ChatBody(Body):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def prompt_ids(self, queue: RequestQueue) -> list[int]:
        """The conversation as tokens, by the tokenizer's chat template."""
        if not queue.tokenizer.chat_template:
            raise ApiError(
                "this model has no chat template, so it does not know turns: ask /v1/completions with a "
                "prompt, or start the server with --chat-template FILE",
                "no_chat_template",
            )
        turns = []
        for index, message in enumerate(self.messages):
            parts = message.content if isinstance(message.content, list) else []
            if any(part.type != "text" for part in parts):
                raise ApiError("this model takes text only", param=f"messages.{index}.content")
            content = "".join(part.text or "" for part in parts) if parts else message.content or ""
            turns.append({**(message.model_extra or {}), "role": message.role, "content": content})
        try:
            return _not_empty(prompt_of(queue.tokenizer, turns), "messages")
        except ConfigError as error:
            raise ApiError(str(error), param="messages") from error


class CompletionBody(Body):
    """The body of ``/v1/completions``; a prompt is text or tokens."""

    prompt: str | list[int] | list[str] | list[list[int]]

    def prompt_ids(self, queue: RequestQueue) -> list[int]:
        """The prompt as tokens."""
        one: Any = self.prompt
        if isinstance(one, list) and one and isinstance(one[0], (str, list)):
            if len(one) > 1:
                problem = f"one prompt a request, got {len(one)}; send one request each"
                raise ApiError(problem, "unsupported_parameter", "prompt")
            one = one[0]
        if isinstance(one, str):
            return _not_empty(list(queue.tokenizer(one).input_ids), "prompt")
        vocabulary = queue.model.get_input_embeddings().num_embeddings
        if unknown := [token for token in one if not 0 <= token < vocabulary]:
            raise ApiError(f"{unknown[0]} is no token: the model has {vocabulary}", param="prompt")
        return _not_empty(list(one), "prompt")


def check_model(asked: str | None, name: str) -> None:
    """Refuse a request for another model than `name`."""
    if asked is not None and asked != name:
        raise ApiError(f"there is no model {asked!r} here, only {name!r}", "model_not_found", "model", 404)


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # bool is an int in Python, and 0 == False: `logprobs: 0` asks for something.
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise ApiError("the prompt is empty; give some text to continue", param=param)
    return ids
