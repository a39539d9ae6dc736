"""Conversations into prompts, by a tokenizer's chat template (Jinja)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oats.checkpoint.loading import load_model
from oats.errors import ConfigError


def load_with_template(directory: str, dtype: str | None, chat_template: Path | None) -> tuple[Any, Any]:
    """A model and its tokenizer, whose chat template is replaced by the file `chat_template` if there is one.

    Raises:
        ConfigError: the template cannot be read.
    """
    try:
        template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {chat_template}: {error}") from error
    model, tokenizer = load_model(directory, dtype)
    if template is not None:
        tokenizer.chat_template = template
    return model, tokenizer


def prompt_of(tokenizer: Any, turns: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens of a conversation, up to where the answer begins.

    Raises:
        ConfigError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
    return list(encoded["input_ids"])
