"""The command line, ``oats``: one module a command.

Nothing here imports torch before a command runs, so that ``oats --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from oats import __version__
from oats.cli import bench, compare, compress, eval, generate, info, rollout
from oats.errors import OatsError


class _Commands(TyperGroup):
    """Prints an `OatsError` as one line, whichever command raised it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OatsError as error:
            typer.echo(f"oats: error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compress transformers to sparse plus low-rank weights, and run them fast on CPUs.",
)
app.command("compress", epilog="Example: oats compress google/gemma-3-270m small")(compress.compress)
app.command("eval", epilog="Example: oats eval small --text book.txt")(eval.evaluate)
app.command("compare", epilog="Example: oats compare small-model --methods wanda,oats --compressions 0.5")(
    compare.compare
)
app.command("generate", epilog='Example: oats generate small "Once upon a time"')(generate.generate)
app.command("bench", epilog="Example: oats bench --d-out 4096 --d-in 11008 --threads 2")(bench.bench)
app.command("rollout", epilog="Example: oats rollout small-vit cat.png dog.png")(rollout.rollout)
app.command("info", epilog="Example: oats info small")(info.info)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"oats {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``oats`` command."""
    app()
