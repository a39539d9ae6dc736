"""The table of a comparison, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from oats.evaluate.cells import Cell


def print_table(console: Console, cells: Sequence[Cell]) -> None:
    """Print the cells of :func:`oats.evaluate.comparison.complete`, a line each."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from oats.evaluate.comparison_table import header, rows

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(header(cells)):
        table.add_column(column, justify="right" if i else "left")
    for row in rows(cells):
        table.add_row(*row)
    console.print(table)
