"""``oats serve DIR``."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from typer import Option

from oats.cli.options import AnyModel, ChatTemplate, RunActivations, RunDtype, use_activations
from oats.errors import ConfigError


def serve(
    directory: AnyModel,
    host: Annotated[
        str, Option(help="Address to listen at; 0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen at; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, Option(help="What clients call the model.", show_default="the directory's name")
    ] = None,
    chat_template: ChatTemplate = None,
    max_batch: Annotated[int, Option(help="Most requests that run at once; others wait.")] = 16,
    max_waiting: Annotated[int, Option(help="Most requests that wait; others are refused.")] = 64,
    dtype: RunDtype = None,
    activations: RunActivations = "exact",
) -> None:
    """Serve a model over HTTP with OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models.

    Requests that run at once get one token each in turn. /health tells if the server works; /metrics has
    numbers for Prometheus. A model without a chat template answers /v1/completions only.
    """
    use_activations(activations)
    try:
        import uvicorn

        from oats.serving.openai_api.app import build_app
    except ImportError as error:
        raise ConfigError(
            f"serving needs more packages ({error.name} is missing): pip install 'oats-torch[serve]'"
        ) from None

    from oats.cli.console import note_fallback, notes, status
    from oats.serving.chat_template import load_with_template
    from oats.serving.request_queue import RequestQueue

    listening = _listen(host, port)  # fail early if the port is taken: loading takes long
    with listening:
        with status(f"Loading {directory}"):
            model, tokenizer = load_with_template(directory, dtype, chat_template)
            queue = RequestQueue(model, tokenizer, max_waiting, max_batch)
        name = name or Path(directory).resolve().name
        server = uvicorn.Server(
            uvicorn.Config(build_app(queue, name), log_level="warning", timeout_graceful_shutdown=3)
        )
        url = f"http://{host}:{listening.getsockname()[1]}/v1"
        console = notes()
        console.print(f"{name} at {url}, until Ctrl-C", soft_wrap=True)
        note_fallback(queue.engine.reason)
        if not tokenizer.chat_template:
            console.print("no chat template: /v1/completions only, or give one with --chat-template")
        body = '{"prompt": "Once upon a time", "max_tokens": 20}'
        example = f"curl {url}/completions -H 'Content-Type: application/json' -d '{body}'"
        console.print(f"try: {example}", soft_wrap=True)
        try:
            with suppress(KeyboardInterrupt):  # Ctrl-C stops the server
                server.run(sockets=[listening])
        finally:
            queue.close()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 65536
        raise ConfigError(f"port must be 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        # Without listen, another process could take the port. Clients that connect now wait until the model
        # is loaded.
        listening.listen(128)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {reason}; choose another with --host or --port"
        ) from None
    return listening
