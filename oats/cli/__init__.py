"""The command line, ``oats``: one module for each command.

No module here imports torch before its command runs, so ``oats --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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


app.command(
    "compress",
    epilog=_examples(
        "compress google/gemma-3-270m small",
        "compress my-model small --compression 0.6 --method oats-hessian",
        "compress my-model small --calibration book.txt --samples 128 --length 2048",
    ),
)(compress.compress)
app.command(
    "eval",
    epilog=_examples(
        "eval small --text book.txt",
        "eval small --save",
        "eval small --tasks arc_easy,hellaswag --limit 100",
        "eval small --tasks my_task --task-path tasks/",
    ),
)(eval.evaluate)
app.command(
    "compare",
    epilog=_examples(
        "compare my-model --methods wanda,oats --compressions 0.5",
        "compare my-model --methods oats,oats+int8 --text book.txt --text code.txt",
    ),
)(compare.compare)
app.command(
    "generate",
    epilog=_examples(
        'generate small "Once upon a time"', 'generate small "2 + 2 =" --temperature 0.7 --seed 1'
    ),
)(generate.generate)
app.command(
    "chat",
    epilog=_examples(
        "chat small",
        'chat small --system "Answer in one sentence."',
        "chat base --chat-template chatml.jinja",
    ),
)(chat.chat)
app.command("serve", epilog=_examples("serve small", "serve small --host 0.0.0.0 --port 8080 --name gemma"))(
    serve.serve
)
app.command(
    "quantize", epilog=_examples("quantize small small-int8", "quantize small small-int4 --values int4")
)(quantize.quantize)
app.command("info", epilog=_examples("info small", "info", "info small --json"))(info.info)
app.command("report", epilog=_examples("report small", "report small --out report.html --speed"))(
    report.report
)
app.command(
    "bench",
    epilog=_examples(
        "bench --d-out 4096 --d-in 11008 --threads 2",
        "bench --model llama-3-8b --batch 1,4,16 --plot pictures/",
    ),
)(bench.bench)
app.command("rollout", epilog=_examples("rollout small-vit cat.png dog.png --out attention.svg"))(
    rollout.rollout
)


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
