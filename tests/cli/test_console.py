"""What the commands print: unbroken where the output is no terminal, whatever COLUMNS says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.box import SIMPLE_HEAD
from rich.table import Table

from oats.cli import app
from oats.cli.console import notes, results, settings_table
from tests.tiny import save_dense

# Longer than a terminal is wide, with what rich would take for markup and for an emoji.
NAME = "a [0] [red] :cat: " + "very-long-" * 18 + "end"
SENTENCE = f"cannot read {NAME}: it is no model; choose another"

pytestmark = pytest.mark.usefixtures("columns")


@pytest.fixture(params=["20", "200", None])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if request.param is not None:
        monkeypatch.setenv("COLUMNS", request.param)
    return request.param


def run(*arguments: object, code: int = 0) -> tuple[list[str], list[str]]:
    """Lines on stdout and on stderr."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout.splitlines(), result.stderr.splitlines()


def test_prose_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    results().print(SENTENCE)
    notes().print(SENTENCE, style="dim")
    assert tuple(capsys.readouterr()) == (SENTENCE + "\n", SENTENCE + "\n")


def test_forced_colours_make_no_terminal_of_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    results().print(SENTENCE)
    assert capsys.readouterr().out == SENTENCE + "\n"


def test_cells_are_neither_broken_nor_cut(capsys: pytest.CaptureFixture[str]) -> None:
    results().print(settings_table({"saved": NAME, "next": SENTENCE}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1)[1].rstrip() for line in lines] == [NAME, SENTENCE]
    table = Table(box=SIMPLE_HEAD)
    table.add_column(NAME, no_wrap=True)
    table.add_column("error")
    table.add_row(NAME, SENTENCE)
    results().print(table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]
    assert len(lines) == 2 and lines[0].startswith(NAME)
    assert lines[1].startswith(NAME) and lines[1].endswith(SENTENCE)


def test_a_terminal_gets_lines_of_its_width(columns: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console = results()
    console.print(SENTENCE)
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= console.width <= int(columns or 80)


def test_usage_errors_stay_in_their_line() -> None:
    missing = f"/no/{NAME}"
    _, lines = run("eval", "model", "--task-path", missing, code=2)
    assert sum(missing in line and line.endswith("does not exist.") for line in lines) == 1
    for arguments in (["--evaluation-of-everything"], ["evaluation-of-everything"]):
        _, lines = run(*arguments, code=2)
        assert sum("No such" in line and arguments[0] in line for line in lines) == 1


def test_errors_stay_in_their_line(tmp_path: Path) -> None:
    stdout, lines = run("report", tmp_path, "--out", tmp_path, code=1)
    assert stdout == [] and lines == [f"oats: error: {tmp_path} is a directory; give the name of a file"]


def test_commands_keep_long_names_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    directory = save_dense(tmp_path / NAME)
    stdout, _ = run("info", directory)
    assert sum(line.split(None, 1)[1:] == [str(directory)] for line in map(str.rstrip, stdout)) == 1
    monkeypatch.chdir(tmp_path)
    stdout, _ = run()
    (line,) = [line for line in stdout if "llama, dense" in line]
    assert line.strip().startswith(NAME) and line.rstrip().endswith(f"oats compress {NAME} {NAME}-oats")
