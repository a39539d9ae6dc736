"""`oats compare`: cells, resuming, the table and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oats.config import METHODS, OatsConfig
from oats.errors import ConfigError, FormatError, OutputExistsError
from oats.evaluate import comparison
from oats.evaluate.cells import Cell, Cells
from oats.evaluate.comparison import complete, plan
from oats.evaluate.comparison_table import markdown, rows
from tests.cli import test_cli
from tests.cli.test_cli import SMALL, entries, fails, run

dense, text = test_cli.dense, test_cli.text  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [
    Cell("dense", 0.0, {"perplexity, a.txt": 12.0}, 8_000_000, 4_000_000, 0.1, 2),
    Cell("wanda", 0.5, {"perplexity, a.txt": 15.25}, 4_500_000, 2_000_000, 2.0, 2),
    Cell("oats", 0.5, {"perplexity, a.txt": 14.5}, 4_400_000, 2_000_000, 4.0, 2),
    Cell("wanda", 0.6, {"perplexity, a.txt": 1234.5}, 3_500_000, 1_600_000, 2.0, 2),
    Cell("oats", 0.6, {"perplexity, a.txt": 20.5}, 3_400_000, 1_600_000, 4.0, 2),
]


def compare(dense: Path, text: Path, out: Path, *options: object) -> list[object]:
    calibration = ["--calibration", text, *SMALL]
    return ["compare", dense, "--out", out, "--text", text, "--max-tokens", 200, *calibration, *options]


def test_the_cells_are_what_compress_and_eval_give(dense, text, tmp_path) -> None:
    out, kept = tmp_path / "out", tmp_path / "wanda"
    command = compare(
        dense, text, out, "--methods", "wanda,oats", "--compressions", "0.5,0.6", "--context", 64
    )
    result = run(*command, "--json")
    cells = {(each["method"], each["compression"]): each for each in json.loads(result.stdout)["cells"]}
    assert list(cells) == [("dense", 0), ("wanda", 0.5), ("oats", 0.5), ("wanda", 0.6), ("oats", 0.6)]
    assert "wanda 0.6: " in result.stderr

    report = json.loads(
        run(
            "compress", dense, kept, "--calibration", text, *SMALL, "--method", "wanda", "--compression", 0.6,
            "--json",
        ).stdout
    )  # fmt: skip
    for method, directory in (("dense", dense), ("wanda", kept)):
        evaluated = json.loads(
            run("eval", directory, "--text", text, "--context", 64, "--max-tokens", 200, "--json").stdout
        )
        cell = cells[method, 0.6 if method == "wanda" else 0]
        assert cell["scores"] == {"perplexity, fox.txt": evaluated["perplexity"]}
    assert cells["wanda", 0.6]["layer_bytes"] == report["layer_bytes"]
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert (cells["dense", 0]["layer_parameters"], cells["dense", 0]["layer_bytes"]) == (linear, 4 * linear)
    assert cells["wanda", 0.5]["layer_parameters"] == linear / 2
    assert 0.97 * linear / 2 < cells["oats", 0.5]["layer_parameters"] <= linear / 2

    assert {"plot.png", "plot.svg", "settings.json", "table.md", "dense-0.json", "oats-60.json"} <= set(
        entries(out)
    )
    table = (out / "table.md").read_text()
    assert table.count("\n| ") == 6 and "- context: 64" in table and "fox.txt, whole file, sha256" in table
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_goes_on_where_it_stopped(dense, text, tmp_path, monkeypatch) -> None:
    out, walked = tmp_path / "out", []
    compress = comparison.compress_

    def interrupted(model, calibration, config):
        walked.append(config.method)
        if len(walked) == 2:
            raise KeyboardInterrupt
        return compress(model, calibration, config)

    monkeypatch.setattr(comparison, "compress_", interrupted)
    options = ["--compressions", "0.5", "--no-plot"]
    assert run(*compare(dense, text, out, "--methods", "magnitude,wanda", *options)).exit_code == 130
    assert entries(out) == ["dense-0.json", "magnitude-50.json", "settings.json"]
    first = (out / "magnitude-50.json").read_bytes()
    # More methods than at first.
    result = run(*compare(dense, text, out, "--methods", "magnitude,wanda,oats+match", *options))
    assert result.exit_code == 0 and walked == ["magnitude", "wanda", "wanda", "oats"]
    assert (out / "magnitude-50.json").read_bytes() == first
    assert "oats+match" in result.stdout and "perplexity, fox.txt" in result.stdout
    # All is there: nothing is measured.
    run(*compare(dense, text, out, "--methods", "wanda", *options))
    assert len(walked) == 4


def test_settings_are_never_mixed(dense, text, tmp_path) -> None:
    out = tmp_path / "out"
    options = ["--methods", "magnitude", "--compressions", "0.5", "--no-plot"]
    assert run(*compare(dense, text, out, *options)).exit_code == 0
    line = fails(*compare(dense, text, out, *options, "--context", 32))
    assert "other settings: context is 128 there and 32 here; stride is 128 there and 32 here" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "wanda,best"], "method must be one of oats, .*, got 'best'"),
        (["--methods", ","], "methods is empty"),
        (["--compressions", "half"], "compressions must be numbers with commas between them, got 'half'"),
        (["--compressions", "0.5,1"], "compression must be in"),
        (
            ["--methods", "wanda", "--pattern", "2:4", "--compressions", "0.4"],
            "what pattern 2:4 removes, 0.5, got 0.4",
        ),
        (["--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--text", "missing.txt"], "cannot read the text file missing.txt"),
        (
            ["--text", "a/b.txt", "--text", "c/b.txt"],
            "two of the texts have the same file name: b.txt, b.txt",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_written(
    dense, tmp_path, options, message
) -> None:
    import re

    assert re.search(message, fails("compare", dense, "--out", tmp_path / "out", *SMALL, *options))
    assert entries(tmp_path) == []


def test_directories_that_are_something_else(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputExistsError, match="not empty and holds no comparison"):
        Cells(tmp_path, {})
    with pytest.raises(OutputExistsError, match="cannot use the directory"):
        Cells(tmp_path / "notes.txt" / "out", {})
    cells = Cells(tmp_path / "out", {"context": 8, "texts": ("a", "b")})
    assert Cells(tmp_path / "out", {"context": 8, "texts": ("a", "b")}).get("oats", 0.5) is None
    cells.put(CELLS[2])
    assert cells.get("oats", 0.5) == CELLS[2]
    for content, message in (
        ("{", "not valid JSON"),
        ("[]", "not hold a JSON object"),
        ("{}", "not hold a cell"),
    ):
        (tmp_path / "out" / "oats-50.json").write_text(content)
        with pytest.raises(FormatError, match=message):
            cells.get("oats", 0.5)
    with pytest.raises(ConfigError, match="context is 8 there and None here"):
        Cells(tmp_path / "out", {"texts": ["a", "b"]})


def test_every_method_has_the_same_settings() -> None:
    common = OatsConfig(rank_ratio=0.3, seed=5, dtype="fp32")
    planned = plan(common, [*METHODS, "oats+match"], [0.3, 0.5])
    assert len(planned) == 2 * (len(METHODS) + 1)
    assert {(c.seed, c.dtype, c.pattern) for c in planned.values()} == {(5, "fp32", "row")}
    assert {c.rank_ratio for name, c in planned.items() if name.startswith("oats")} == {0.3}
    assert planned["oats+match 0.5"].block_matching == 2 and planned["oats 0.5"].block_matching == 0


def test_the_plan_is_completed_in_order(tmp_path) -> None:
    calls: list[object] = []
    planned = plan(OatsConfig(), ["wanda", "oats"], [0.5])

    def measure(config):
        calls.append(config)
        return {"accuracy": 0.9}, 10, 5, 1.0

    seen = []
    cells = Cells(tmp_path / "out", {})
    finished = complete(cells, planned, measure, lambda *call: seen.append(call[:3]))
    assert calls == [None, *planned.values()]
    assert [(cell.method, cell.compression) for cell in finished] == [
        ("dense", 0.0),
        ("wanda", 0.5),
        ("oats", 0.5),
    ]
    assert seen == [
        (0, 3, "dense"),
        (1, 3, "dense"),
        (1, 3, "wanda 0.5"),
        (2, 3, "wanda 0.5"),
        (2, 3, "oats 0.5"),
        (3, 3, "oats 0.5"),
    ]


def test_table_and_picture() -> None:
    assert rows(CELLS)[3] == ["wanda", "60 %", "1.6 M", "3.50", "1234", "2"]
    lines = markdown(CELLS, {"context": 512}).splitlines()
    assert lines[0] == "| method | compression | parameters | layers, MB | perplexity, a.txt | seconds |"
    assert lines[3].split("|")[5].strip() == "15.25" and lines[-1] == "- context: 512"
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from oats.evaluate.comparison_plot import figure

    left, right = figure(CELLS).axes
    for axes, attribute in ((left, "layer_bytes"), (right, "layer_parameters")):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["wanda", "oats", "dense"]
        points = sorted(
            (getattr(c, attribute) / 1e6, c.scores["perplexity, a.txt"]) for c in CELLS if c.method == "oats"
        )
        assert [*zip(*lines["oats"].get_data(), strict=True)] == points
        assert axes.get_yscale() == "log" and axes.get_ylim()[1] < 30
        assert [note.get_text() for note in axes.texts] == ["off the scale: wanda"]


def test_accuracy_of_the_next_token(dense, text, tmp_path) -> None:
    out = tmp_path / "out"
    command = compare(dense, text, out, "--methods", "wanda+int8", "--compressions", "0.5", "--accuracy")
    cells = json.loads(run(*command, "--json").stdout)["cells"]
    evaluated = json.loads(run("eval", dense, "--text", text, "--max-tokens", 200, "--json").stdout)
    scores = ["perplexity, fox.txt", "accuracy of the next token, fox.txt"]
    assert [list(cell["scores"]) for cell in cells] == [scores] * 2
    assert cells[0]["scores"][scores[1]] == evaluated["accuracy"]
    assert cells[1]["method"] == "wanda+int8" and cells[1]["layer_bytes"] < 0.3 * cells[0]["layer_bytes"]
    assert "accuracy of the next token, fox.txt" in (out / "table.md").read_text()
    assert "other settings: accuracy is" in fails(*(option for option in command if option != "--accuracy"))


def test_dense_formats_are_cells_too(dense, text, tmp_path) -> None:
    out = tmp_path / "out"
    methods = "dense+int8,dense+q8_0,dense+int4,dense+q4_0,wanda"
    command = compare(dense, text, out, "--methods", methods, "--compressions", "0.5,0.6", "--no-plot")
    cells = {(c["method"], c["compression"]): c for c in json.loads(run(*command, "--json").stdout)["cells"]}
    # A format has one cell, whatever the compressions.
    assert [compression for method, compression in cells if method.startswith("dense")] == [0.0] * 5
    plain = cells["dense", 0.0]
    bits = {method: 8 * c["layer_bytes"] / plain["layer_parameters"] for (method, _), c in cells.items()}
    # 64 or 128 columns: int8 has a scale of two bytes for them, int4 two of them.
    assert 8.125 < bits["dense+int8"] < 8.25 and 4.25 < bits["dense+int4"] < 4.5
    assert (bits["dense+q8_0"], bits["dense+q4_0"]) == (8.5, 4.5)
    apart = {
        method: abs(c["scores"]["perplexity, fox.txt"] - plain["scores"]["perplexity, fox.txt"])
        for (method, compression), c in cells.items()
        if compression == 0
    }
    assert 0 < max(apart["dense+int8"], apart["dense+q8_0"]) < min(apart["dense+int4"], apart["dense+q4_0"])
    assert "no dense format is called 'q3_k'; choose from int8, int4, q8_0, q4_0, q4_k" in fails(
        *compare(dense, text, tmp_path / "other", "--methods", "dense+q3_k")
    )


def test_dense_formats_in_the_picture() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from oats.evaluate.comparison_plot import figure

    int8 = Cell("oats+int8", 0.5, {"perplexity, a.txt": 14.75}, 2_500_000, 2_000_000, 4.0, 2)
    q4_0 = Cell("dense+q4_0", 0.0, {"perplexity, a.txt": 12.5}, 2_250_000, 4_000_000, 0.1, 2)
    assert rows([q4_0])[0] == ["dense+q4_0", "", "4 M", "2.25", "12.50", ""]
    speeds = {("oats", 0.5): 40.0, ("oats+int8", 0.5): 50.0, ("dense+q4_0", 0.0): 60.0}
    left, right = figure([*CELLS, int8, q4_0], speeds).axes
    lines = {line.get_label(): line for line in right.lines}
    assert list(lines) == ["oats", "oats+int8", "dense", "dense+q4_0"]
    assert {line.get_label() for line in left.lines} == {*lines, "wanda"}
    assert [*lines["oats"].get_data()[0]] == [40.0] and [*lines["dense+q4_0"].get_data()[0]] == [60.0]
    assert lines["oats"].get_color() == lines["oats+int8"].get_color()
    assert lines["oats"].get_linestyle() != lines["oats+int8"].get_linestyle()
    assert right.get_xlabel() == "decoded tokens a second"
    assert "dense+q4_0" in [note.get_text() for note in right.texts]
