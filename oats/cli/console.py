"""What the commands share in output: results go to stdout, progress and notes to stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_ENDLESS = 1_000_000
"""Columns where the output is no terminal, so that no message, path or table is broken or cut there."""

LOG_SECONDS = 60
"""How often a log, where there is no terminal, gets a line about the progress."""


def results() -> Console:
    """Where tables go."""
    return _console(stderr=False)


def notes() -> Console:
    """Where progress goes; a pipe that reads stdout never sees it."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    # A path may hold what rich takes for markup ("[0]") or for an emoji (":cat:").
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    # Not `is_terminal`, which FORCE_COLOR also sets for a pipe.
    if not console.file.isatty():
        console.width = _ENDLESS
    return console


def note_fallback(reason: str | None) -> None:
    """Say why a model does not run in the engine, if there is a reason."""
    if reason is not None:
        notes().print(f"runs in transformers, which is slower: {reason}", style="dim")


def print_json(**values: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(values, indent=2))


class Bar:
    """A progress bar of one task; in a log, a line a minute."""

    def __init__(
        self, progress: bars.Progress, task: bars.TaskID, log: Callable[[str], None] | None = None
    ) -> None:
        self._progress, self._task, self._log = progress, task, log
        self._started = self._written = time.monotonic()

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done."""
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if self._log is not None and done and now - self._written >= LOG_SECONDS:
            self._written = now
            taken = now - self._started
            left = human_time(taken / done * (total - done))
            self._log(f"{done} of {total} {note}, {human_time(taken)}, about {left} left")


@contextmanager
def progress_bar(description: str, *, log: bool = True) -> Iterator[Bar]:
    """A bar with count, note, elapsed time and time left; a line a minute where stderr is not a terminal.

    `log` tells whether there are such lines.

    >>> with progress_bar("Compressing") as bar:
    ...     bar.update(1, 2, "error 0.1")
    """
    columns = (
        bars.TextColumn("{task.description}", markup=False), bars.BarColumn(bar_width=24),
        bars.MofNCompleteColumn(), bars.TextColumn("{task.fields[note]}", markup=False),
        bars.TimeElapsedColumn(), "left", bars.TimeRemainingColumn(),
    )  # fmt: skip
    console = notes()

    def write(line: str) -> None:
        console.print(f"{description}: {line}")

    # The time left from the last hour: a layer can take minutes.
    with bars.Progress(
        *columns, console=console, disable=not console.is_terminal, speed_estimate_period=3600
    ) as progress:
        task = progress.add_task(description, total=None, note="")
        yield Bar(progress, task, write if log and not console.is_terminal else None)


@contextmanager
def layers_progress() -> Iterator[Callable[[int, int, str, float], None]]:
    """What to call after each layer with: layers done, layers in all, its name, its relative error.

    A terminal gets a bar, and a log a line a minute: both with the mean error so far and the time left.

    >>> with layers_progress() as progress:
    ...     progress(1, 2, "q_proj", 0.1)
    """
    started = written = time.monotonic()
    # Of the first layer: what comes before it (a rehearsal, another run's blocks) says nothing of the rest.
    first_done, first_at = 0, 0.0
    errors: list[float] = []
    console = notes()
    with progress_bar("Compressing", log=False) as bar:

        def progress(done: int, total: int, name: str, error: float) -> None:
            nonlocal written, first_done, first_at
            now = time.monotonic()
            if not errors:
                first_done, first_at = done, now
            errors.append(error)
            note = f"{name}  error {error:.3f}, mean {sum(errors) / len(errors):.3f}"
            bar.update(done - first_done, total - first_done, note)
            if not console.is_terminal and now - written >= LOG_SECONDS:
                written = now
                line = f"{done} of {total} layers, {note}, {human_time(now - started)}"
                if done > first_done:
                    left = (now - first_at) / (done - first_done) * (total - done)
                    line += f", about {human_time(left)} left"
                console.print(line)

        yield progress


@contextmanager
def status(message: str) -> Iterator[None]:
    """Say what is going on during a step of unknown length."""
    # The libraries below draw bars of their own.
    from transformers.utils import logging

    logging.disable_progress_bar()
    with notes().status(Text(message)):
        yield


def settings_table(settings: Mapping[str, object]) -> Table:
    """Two aligned columns, name and value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in settings.items():
        table.add_row(name, str(value))
    return table


def plain_table(*columns: str, left: Container[int] = (0,)) -> Table:
    """An empty table with a line under its header only; the columns `left` are aligned left, others right."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right", no_wrap=True)
    return table


def human_time(seconds: float) -> str:
    """A duration with its units.

    >>> human_time(95), human_time(7260), human_time(4.2)
    ('1 min 35 s', '2 h 1 min', '4 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def human_bytes(size: float) -> str:
    """A size with its unit, decimal.

    >>> human_bytes(535_000_000), human_bytes(812)
    ('535.0 MB', '812 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if unit == "GB" else f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"
