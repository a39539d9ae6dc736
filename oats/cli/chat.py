"""``oats chat DIR``."""

from __future__ import annotations

import queue
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats.cli.options import AnyModel, ChatTemplate, RunDtype, SamplingSeed
from oats.errors import ConfigError, OatsError

if TYPE_CHECKING:
    from oats.serving.engine import Engine
    from oats.serving.generation import Sampling

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


def chat(
    directory: AnyModel,
    system: Annotated[
        str | None, typer.Option(help="First message, which says how to answer.", show_default="none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the most likely token each time.", show_default="as the model says"),
    ] = None,
    seed: SamplingSeed = 0,
    chat_template: ChatTemplate = None,
    dtype: RunDtype = None,
) -> None:
    """Talk to a model in the terminal, or line by line from a pipe.

    The model must know turns: its tokenizer has a chat template, or --chat-template gives one. A base model,
    which has none, only continues text: oats generate does that.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")

    import torch

    from oats.cli.console import notes, status
    from oats.serving.engine import Engine
    from oats.serving.generation import Sampling

    with status(f"Loading {directory}"):
        model, tokenizer = load_with_template(directory, dtype, chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{directory} has no chat template, so it does not know turns; continue a text with "
            f'`oats generate {directory} "…"`, or give a template with --chat-template FILE'
        )
    console = notes()
    console.print(HELP, style="dim")
    torch.manual_seed(seed)
    engine = Engine(model, tokenizer)
    sampling = Sampling(max_new_tokens, temperature)
    opening = [{"role": "system", "content": system}] if system else []
    turns = list(opening)
    try:
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                turns = list(opening)
            elif line.startswith("/"):
                console.print(HELP, style="dim")
            elif line:
                turns.append({"role": "user", "content": line})
                try:
                    answer = _answer(engine, turns, sampling)
                except OatsError as error:
                    console.print(f"{error} (/reset forgets the conversation)")
                    turns.pop()
                else:
                    turns.append({"role": "assistant", "content": answer})
    finally:
        engine.close()


def load_with_template(directory: str, dtype: str | None, chat_template: Path | None) -> tuple[Any, Any]:
    """A model and its tokenizer, with a chat template of the user's choice.

    Raises:
        ConfigError: the template cannot be read.
    """
    from oats.integrations.checkpoint import load_model

    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {chat_template}: {error}") from error
    model, tokenizer = load_model(directory, dtype)
    if template is not None:
        tokenizer.chat_template = template
    return model, tokenizer


def _read_line() -> str | None:
    """A line of the user, None at the end of input."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  # input() then knows arrow keys and history
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(engine: Engine, turns: list[dict[str, str]], sampling: Sampling) -> str:
    """Print the model's answer as it is made, and return it; Ctrl-C ends it early.

    Raises:
        ConfigError: the conversation is longer than the model's context.
        OatsError: the template refuses it, or generation fails.
    """
    from jinja2 import TemplateError

    from oats.serving.generation import Event, Finished

    try:
        encoded = engine.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except TemplateError as error:
        raise OatsError(f"the model's chat template refuses this conversation: {error}") from error
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    generation = engine.submit(list(encoded["input_ids"]), sampling, events.put)
    pieces: list[str] = []
    finished: Finished | None = None
    while finished is None:
        try:
            event = events.get()
        except KeyboardInterrupt:
            generation.cancel()
            continue
        if isinstance(event, Exception):
            raise OatsError(f"generation failed: {event}") from event
        if isinstance(event, Finished):
            finished = event
        else:
            pieces.append(event)
            print(event, end="", flush=True)
    print({"length": " […]", "cancelled": " [stopped]"}.get(finished.reason, ""), flush=True)
    return "".join(pieces)
