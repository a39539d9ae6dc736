"""The command line, ``oats``: one module for each command.

No module here imports torch before its command runs, so ``oats --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from oats._version import __version__
from oats.cli import (
    bench,
    chat,
    compare,
    compress,
    eval,
    generate,
    info,
    quantize,
    report,
    rollout,
    serve,
    welcome,
)
from oats.errors import OatsError

_HF = ("transformers", "safetensors", "accelerate", "gguf", "tokenizers", "huggingface_hub")
_EXTRAS = {**dict.fromkeys(_HF, "hf"), "PIL": "vision", "torchvision": "vision", "timm": "vision"}
"""Package that may be missing → the extra of oats-torch that installs it."""

_UsageError: Any = typer.BadParameter.__base__
"""click's, which newer versions of typer carry as their own."""


@contextmanager
def _plain_usage_errors() -> Iterator[None]:
    """Where stderr is no terminal: without typer's panel, which breaks messages at some width."""
    try:
        yield
    except _UsageError as error:
        if sys.stderr.isatty():
            raise
        error.show()
        raise typer.Exit(error.exit_code) from None


class _Commands(TyperGroup):
    """Prints an `OatsError` of any command as one line, and so a missing package."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plain_usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            with _plain_usage_errors():
                return super().invoke(ctx)
        except OatsError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                raise
            message = (
                f"{package} is not installed, which this command needs: "
                f"pip install 'oats-torch[{_EXTRAS[package]}]'"
            )
        typer.echo(f"oats: error: {message}", err=True)
        raise typer.Exit(1)


def _examples(*commands: str) -> str:
    return "\n\n".join(f"Example: oats {command}" for command in commands)


app = typer.Typer(
    cls=_Commands,
    pretty_exceptions_enable=False,
    help="Compress transformers to sparse plus low-rank weights, and run them fast on CPUs.",
    epilog=_examples("compress google/gemma-3-270m small", 'generate small "Once upon a time"', "info"),
)


def _add(command: Callable[..., None], *examples: str) -> None:
    """Name a command after its module."""
    name = command.__module__.rpartition(".")[2]
    app.command(name, epilog=_examples(*(f"{name} {example}".rstrip() for example in examples)))(command)


_add(
    compress.compress,
    "google/gemma-3-270m small",
    "my-model small --compression 0.6 --method oats-hessian",
    "my-model small --calibration book.txt --samples 128 --length 2048",
)
_add(
    eval.evaluate,
    "small --text book.txt",
    "small --save",
    "small --tasks arc_easy,hellaswag --limit 100",
    "small --tasks my_task --task-path tasks/",
)
_add(
    compare.compare,
    "my-model --methods wanda,oats --compressions 0.5",
    "my-model --methods oats,oats+int8 --text book.txt --text code.txt",
)
_add(generate.generate, 'small "Once upon a time"', 'small "2 + 2 =" --temperature 0.7 --seed 1')
_add(chat.chat, "small", 'small --system "Answer in one sentence."', "base --chat-template chatml.jinja")
_add(serve.serve, "small", "small --host 0.0.0.0 --port 8080 --name gemma")
_add(quantize.quantize, "small small-int8", "small small-int4 --values int4")
_add(info.info, "small", "", "small --json")
_add(report.report, "small", "small --out report.html --speed")
_add(
    bench.bench, "--d-out 4096 --d-in 11008 --threads 2", "--model llama-3-8b --batch 1,4,16 --plot pictures/"
)
_add(rollout.rollout, "small-vit cat.png dog.png --out attention.svg")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"oats {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        welcome.welcome()


def main() -> None:
    """Entry point of the ``oats`` command."""
    app()
