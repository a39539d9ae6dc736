"""The table of a comparison as text: a row for each cell, a column for each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oats.evaluate.cells import Cell, is_dense


def header(cells: Sequence[Cell]) -> list[str]:
    """Names of the columns of :func:`rows`."""
    return ["method", "compression", "parameters", "layers, MB", *cells[0].scores, "seconds"]


def rows(cells: Sequence[Cell]) -> list[list[str]]:
    """The table as text, a row a cell.

    >>> rows([Cell("oats", 0.5, {"perplexity": 14.912}, 1_250_000, 500_000, 3.2, 2)])
    [['oats', '50 %', '0.5 M', '1.25', '14.91', '3']]
    """
    return [
        [
            cell.method,
            "" if is_dense(cell) else f"{100 * cell.compression:g} %",
            f"{cell.layer_parameters / 1e6:.3g} M",
            f"{cell.layer_bytes / 1e6:.2f}",
            *(format_score(name, value) for name, value in cell.scores.items()),
            "" if is_dense(cell) else f"{cell.seconds:.0f}",
        ]
        for cell in cells
    ]


def format_score(name: str, value: float) -> str:
    """A score as it is printed: an accuracy in percent, a cosine with four digits, else a perplexity.

    >>> format_score("accuracy", 0.91234), format_score("perplexity", 12.3456), format_score("", 45678.9)
    ('91.23 %', '12.35', '45679')
    >>> format_score("cosine to dense", 0.98765)
    '0.9877'
    """
    if is_accuracy(name):
        return f"{100 * value:.2f} %"
    if is_cosine(name):
        return f"{value:.4f}"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def is_accuracy(name: str) -> bool:
    """True if a score is an accuracy, in [0, 1]; higher is better."""
    return name.startswith("accuracy")


def is_cosine(name: str) -> bool:
    """True if a score is a cosine; higher is better. A score that is neither is a perplexity."""
    return name.startswith("cosine")


def markdown(cells: Sequence[Cell], settings: Mapping[str, Any]) -> str:
    """The table and the settings that it depends on, as Markdown."""
    lines = [header(cells), ["---", "---", *["---:"] * (len(header(cells)) - 2)], *rows(cells)]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {name}: {value}" for name, value in settings.items())]) + "\n"
