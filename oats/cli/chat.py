"""``oats chat DIR``."""

from __future__ import annotations

import queue
import sys
from typing import TYPE_CHECKING, Annotated

from typer import Option

from oats.cli.options import AnyModel, ChatTemplate, RunActivations, RunDtype, SamplingSeed, use_activations
from oats.errors import ConfigError, OatsError

if TYPE_CHECKING:
    from oats.serving.request import Sampling
    from oats.serving.request_queue import RequestQueue

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


def chat(
    directory: AnyModel,
    system: Annotated[str | None, Option(help="System message: how to answer.", show_default="none")] = None,
    max_new_tokens: Annotated[int, Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None,
        Option(help="0 takes the most likely token each time.", show_default="as the model says"),
    ] = None,
    seed: SamplingSeed = 0,
    chat_template: ChatTemplate = None,
    dtype: RunDtype = None,
    activations: RunActivations = "exact",
) -> None:
    """Talk to a model in the terminal, or line by line from a pipe.

    The model needs a chat template, from its tokenizer or from --chat-template. A base model has none: it
    only continues text, with oats generate.
    """
    use_activations(activations)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {temperature}")

    import torch

    from oats.cli.console import note_fallback, notes, status
    from oats.serving.chat_template import load_with_template
    from oats.serving.request import Sampling
    from oats.serving.request_queue import RequestQueue

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
    requests = RequestQueue(model, tokenizer)
    note_fallback(requests.engine.reason)
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
                    answer = _answer(requests, turns, sampling)
                except OatsError as error:
                    console.print(f"{error} (/reset forgets the conversation)")
                    turns.pop()
                else:
                    turns.append({"role": "assistant", "content": answer})
    finally:
        requests.close()


def _read_line() -> str | None:
    """A line from the user; None at the end of the input."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  # gives input() arrow keys and history
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(requests: RequestQueue, turns: list[dict[str, str]], sampling: Sampling) -> str:
    """Print the model's answer while it is generated, and return it; Ctrl-C ends it early.

    Raises:
        ConfigError: the template refuses the conversation, or it is longer than the model's context.
        OatsError: generation fails.
    """
    from oats.serving.chat_template import prompt_of
    from oats.serving.request import Event, Finished

    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request = requests.submit(prompt_of(requests.tokenizer, turns), sampling, events.put)
    pieces: list[str] = []
    while True:
        try:
            event = events.get()
        except KeyboardInterrupt:
            request.cancel()
            continue
        if isinstance(event, Exception):
            raise OatsError(f"generation failed: {event}") from event
        if isinstance(event, Finished):
            print({"length": " […]", "cancelled": " [stopped]"}.get(event.reason, ""), flush=True)
            return "".join(pieces)
        pieces.append(event)
        print(event, end="", flush=True)
