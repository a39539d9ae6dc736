"""What the commands share in output: results go to stdout, progress and notes to stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def results() -> Console:
    """Where tables go."""
    return Console(highlight=False)


def notes() -> Console:
    """Where progress goes; a pipe that reads stdout never sees it."""
    return Console(stderr=True, highlight=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2))


class Bar:
    """A progress bar of one task."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        """Wrap one task of a rich display."""
        self._progress, self._task = progress, task

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done."""
        self._progress.update(self._task, completed=done, total=total, note=note)


@contextmanager
def progress_bar(description: str) -> Iterator[Bar]:
    """A bar with count, note, elapsed time and time left; nothing where stderr is not a terminal.

    >>> with progress_bar("Compressing") as bar:
    ...     bar.update(1, 2, "error 0.1")
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = notes()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(description, total=None, note=""))


@contextmanager
def status(message: str) -> Iterator[None]:
    """Say what is going on during a step of unknown length."""
    # The libraries below draw bars of their own.
    from transformers.utils import logging

    logging.disable_progress_bar()
    with notes().status(message):
        yield


def settings_table(settings: Mapping[str, object]) -> Table:
    """Two aligned columns, name and value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in settings.items():
        table.add_row(name, str(value))
    return table


def human_bytes(size: float) -> str:
    """A size with its unit, decimal.

    >>> human_bytes(535_000_000), human_bytes(812)
    ('535.0 MB', '812 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if unit == "GB" else f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"
