"""The benchmark of formats: what is timed once, and what it writes."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
from transformers import LlamaConfig

from oats.evaluate.cells import Cell, Cells
from tests.scripts import load_script

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return load_script("benchmarks/formats.py")


def cell(method: str, compression: float, perplexity: float) -> Cell:
    return Cell(method, compression, {"perplexity, a.txt": perplexity}, 8_000_000, 4_000_000, 1.0, 1)


def test_each_form_is_timed_once(benchmark, monkeypatch, tmp_path, capsys) -> None:
    sizes = dict(vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    LlamaConfig(**sizes, num_attention_heads=4).save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "rank ratio": 0.25, "pattern": "row"}
    folder = tmp_path / "comparison"
    cells = Cells(folder, settings)
    for each in (
        cell("sparsegpt", 0.5, 16.0),
        cell("oats+int8", 0.6, 17.0),
        cell("oats-hessian", 0.5, 15.0),
        cell("oats", 0.5, 15.5),
        cell("dense+q4_0", 0, 12.5),
        cell("dense", 0, 12.0),
    ):
        cells.put(each)
    order = ["dense", "dense+q4_0", "oats", "oats-hessian", "sparsegpt", "oats+int8"]
    assert [each.method for each in cells.finished()] == order

    numbers = ["--prompt=4", "--new-tokens=3", "--repetitions=1"]
    monkeypatch.setattr(sys, "argv", ["formats.py", str(folder), *numbers])
    benchmark.main()
    table = (folder / "formats.md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    speeds = json.loads((folder / "speeds.json").read_text())
    # The two methods of ours have one format; nothing here generates from Q4_0.
    assert set(speeds) == {"dense", "oats 0.5", "pruned 0.5", "oats+int8 0.6"}
    assert all(speed["decode"] > 0 and speed["linear_ms"] > 0 for speed in speeds.values())
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    shown = f"{speeds['oats 0.5']['decode']:.1f}"
    assert f"| {shown} |" in lines["oats"] and f"| {shown} |" in lines["oats-hessian"]
    assert lines["dense+q4_0"].endswith("| 12.50 |  |  |") and "- rank ratio: 0.25" in table
    assert (folder / "formats.png").read_bytes().startswith(b"\x89PNG")

    # All is there: nothing is timed again.
    monkeypatch.setattr(benchmark, "model_speeds", None)
    benchmark.main()
    assert (folder / "formats.md").read_text() == table
