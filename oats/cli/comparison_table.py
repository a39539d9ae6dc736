"""The table of a comparison, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from oats.evaluate.cells import Cell


def print_table(console: Console, cells: Sequence[Cell]) -> None:
    """Print the cells of :func:`oats.evaluate.comparison.complete`, a line each."""
    from oats.cli.console import plain_table
    from oats.evaluate.comparison_table import header, rows

    table = plain_table()
    for i, column in enumerate(header(cells)):
        table.add_column(column, justify="right" if i else "left")
    for row in rows(cells):
        table.add_row(*row)
    console.print(table)
