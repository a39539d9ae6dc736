"""The tutorial, as written: every command and every piece of Python, in order, on a small model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from oats.cli import app
from tests.tiny import TEXT, save_dense

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_step_of_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'oats-torch[plot]'")
    save_dense(tmp_path / "my-model")
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "held-out.txt").write_text(TEXT[::-1][:1000])
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    steps = re.findall(r"```(sh|python)\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    for language, code in steps:
        if language == "python":
            exec(code, names)
            continue
        program, command, *options = shlex.split(code)
        assert program == "oats"
        if command == "compress":
            # As much text as a model of bytes and a short context can take.
            options += ["--samples", "4", "--length", "32", "--iterations", "3"]
        result = CliRunner().invoke(app, [command, *options])
        assert result.exit_code == 0, f"{code}{result.output}"
    assert len(steps) == 9
    for directory in ("small", "better", "smaller"):
        assert "# " + directory in (tmp_path / directory / "README.md").read_text()
    assert "| perplexity |" in (tmp_path / "small" / "README.md").read_text()
