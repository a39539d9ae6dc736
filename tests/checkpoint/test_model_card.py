"""The record (oats_report.json), the model card, `oats info` and `oats report` of a compressed model."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

import oats
from oats.checkpoint.model_card import MARK
from oats.checkpoint.record import Record
from oats.checkpoint.stored_model import read_stored_model
from oats.cli import app
from oats.errors import FormatError
from oats.inspection.anatomy import anatomies, block_and_kind, density_picture, pictures, spectrum
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.conftest import random_layer
from tests.rounding import assert_equal_sums
from tests.tiny import TEXT, byte_tokenizer, compressed_llama, save_dense

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "fox.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def compressed(dense: Path, text: Path, tmp_path: Path) -> Path:
    out = tmp_path / "small"
    run("compress", dense, out, "--calibration", text, "--samples", 4, "--length", 32, "--iterations", 3)
    return out


# The record and the card.


def test_compress_keeps_the_errors_and_writes_a_card(compressed: Path) -> None:
    record = Record.read(compressed)
    assert record is not None and record.source == "tiny-llama"
    assert len(record.errors) == 14 and all(0 < error < 1 for error in record.errors.values())
    assert record.calibration == {
        "text": "fox.txt", "split": "whole file", "sha256": record.calibration["sha256"], "samples": 4,
        "length": 32,
    }  # fmt: skip
    assert record.seconds is not None and record.seconds > 0 and record.software["torch"] == torch.__version__

    card = (compressed / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front
    stored = read_stored_model(compressed)
    layers = sum(layer.stored_bytes for layer in stored.layers)
    assert f"| 14 linear layers | {layers / 1e6:,.1f} MB |" in body
    for expected in ("# small", MARK, "50% of the parameters of its 14 linear layers",
                     'from_pretrained("small")', "| rank ratio | 0.25 |", "| calibration | text fox.txt",
                     "iterations at most"):  # fmt: skip
        assert expected in body, expected
    worst = max(record.errors, key=record.errors.__getitem__)
    assert f"| `{worst}` | {record.errors[worst]:.3f} |" in body
    assert str(compressed.parent) not in card + json.dumps(record.calibration)  # nobody's paths


def test_the_code_of_the_card_runs(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (compressed / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(compressed.parent)
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"].model.layers[0].mlp.up_proj, SparseLowRankLinear)


def test_eval_adds_its_result_once(compressed: Path, text: Path) -> None:
    settings = ("eval", compressed, "--text", text, "--context", 64, "--max-tokens", 200, "--save", "--json")
    result = json.loads(run(*settings))
    run(*settings)
    run("eval", compressed, "--text", text, "--context", 32, "--max-tokens", 200, "--save")
    evaluations = Record.read(compressed).evaluations
    assert [entry["context"] for entry in evaluations] == [64, 32]
    assert evaluations[0]["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    card = (compressed / "README.md").read_text()
    assert f"| {result['perplexity']:.2f} | fox.txt, whole file, sha256 " in card
    assert "perplexity" in run("info", compressed)


def test_quantize_keeps_what_is_known(compressed: Path, text: Path, tmp_path: Path) -> None:
    evaluate = ("--text", text, "--context", 64, "--max-tokens", 100, "--save")
    run("eval", compressed, *evaluate)
    before = Record.read(compressed)
    run("quantize", compressed, tmp_path / "int8")
    record = Record.read(tmp_path / "int8")
    for kept in ("source", "calibration", "seconds", "errors", "left_dense", "software"):
        assert getattr(record, kept) == getattr(before, kept)
    assert before.evaluations and not record.evaluations, "a perplexity of other weights"
    storage = {"values": "int8", "low_rank": "int8", "scale_columns": 128}
    assert record.quantizations == [{"storage": storage, "calibration": {}, "errors": {}}]
    card = (tmp_path / "int8" / "README.md").read_text()
    for expected in (
        "`tiny-llama` with 50%",
        "| calibration | text fox.txt",
        "numbers became codes: median",
        "kept values int8, low-rank factors int8, a scale for 128 columns of a row; no calibration |",
    ):
        assert expected in card, expected
    assert "How far codes moved" not in card

    fitted = ("--calibration", text, "--samples", 4, "--length", 32)
    run("quantize", tmp_path / "int8", tmp_path / "int4", "--values", "int4", *fitted)
    first, second = Record.read(tmp_path / "int4").quantizations
    assert first == record.quantizations[0] and second["calibration"] == before.calibration
    assert second["errors"].keys() == before.errors.keys()
    card = (tmp_path / "int4" / "README.md").read_text()
    worst = max(second["errors"], key=second["errors"].__getitem__)
    assert f"at most {second['errors'][worst]:.3f} in `{worst}`" in card
    output = run("info", tmp_path / "int4")
    assert "on the calibration data, before numbers became codes" in output
    assert re.search(r"^compressed from +tiny-llama", output, re.MULTILINE)
    assert re.search(r"^calibration +text fox\.txt", output, re.MULTILINE)
    assert re.search(r"^quantised +kept values int4, .*; text fox\.txt", output, re.MULTILINE)
    assert json.loads(run("info", tmp_path / "int4", "--json"))["quantizations"] == [first, second]
    if importlib.util.find_spec("matplotlib"):
        run("report", tmp_path / "int4", "--out", tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert "before numbers became codes" in page and "<td>quantised</td><td>kept values int4" in page


def test_quantize_without_a_record(compressed: Path, tmp_path: Path) -> None:
    (compressed / "oats_report.json").unlink()
    run("quantize", compressed, tmp_path / "int8")
    assert "| quantised | kept values int8" in (tmp_path / "int8" / "README.md").read_text()
    assert Record.read(tmp_path / "int8").errors == {}


def test_codes_of_a_compression_are_in_its_card(dense: Path, text: Path, tmp_path: Path) -> None:
    settings = ("--calibration", text, "--samples", 4, "--length", 32, "--iterations", 3)
    run("compress", dense, tmp_path / "small", "--values", "int4", *settings)
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| codes | kept values int4, low-rank factors int8, a scale for 128 columns of a row |" in card
    assert "on the calibration data, before numbers became codes: median" in card


def test_a_card_of_somebody_else_is_left_alone(compressed: Path, text: Path) -> None:
    (compressed / "README.md").write_text("# mine")
    assert oats.write_model_card(compressed) is None
    output = CliRunner().invoke(
        app, ["eval", str(compressed), "--text", str(text), "--max-tokens", "50", "--save"]
    )
    assert "was not written by oats and stays as it is" in output.stderr
    assert (compressed / "README.md").read_text() == "# mine"
    assert len(Record.read(compressed).evaluations) == 1


def test_from_python(tmp_path: Path) -> None:
    model, report = compressed_llama(skip=["*.down_proj"])
    model.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    card = oats.write_model_card(
        tmp_path / "small", report, source="owner/big", name="owner/small", calibration={"text": "a fox"}
    )
    text = card.read_text()
    assert "base_model: owner/big" in text and 'from_pretrained("owner/small")' in text
    assert "| left dense | `*.down_proj` |" in text and "text a fox" in text
    info = json.loads(run("info", tmp_path / "small", "--json"))
    assert {layer["name"]: layer["relative_error"] for layer in info["layers"]} == {
        layer.name: pytest.approx(layer.relative_error) for layer in report.layers
    }


def test_a_dense_model_gets_no_result(dense: Path, text: Path) -> None:
    assert "is not compressed" in run("eval", dense, "--text", text, "--save", code=1)
    assert not (dense / "README.md").exists() and not (dense / "oats_report.json").exists()


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", '{"version": 2}', '{"version": 1, "extra": 0}', '{"version": 1, "errors": {"a": NaN}}',
     '{"version": 1, "quantizations": [{"storage": {"values": "int3"}, "calibration": {}, "errors": {}}]}',
     '{"version": 1, "quantizations": [{"storage": {}, "calibration": {}, "errors": {"a": NaN}}]}'],
)  # fmt: skip
def test_a_damaged_record_is_an_error_that_says_it_can_be_deleted(compressed: Path, damage: str) -> None:
    (compressed / "oats_report.json").write_text(damage)
    with pytest.raises(FormatError, match=r"oats_report.json cannot be read .* it can be deleted"):
        Record.read(compressed)
    assert "can be deleted" in run("info", compressed, code=1)


# oats info.


def test_info_draws_where_the_bytes_are_and_the_largest_errors(compressed: Path) -> None:
    output = run("info", compressed)
    stored = read_stored_model(compressed)
    section = output.partition("Where the bytes are")[2].partition("Largest errors")[0]
    bars = {line.split()[0]: line.count("█") for line in section.splitlines() if "█" in line}
    sizes = {
        kind: sum(layer.stored_bytes for layer in stored.layers if block_and_kind(layer.name)[1] == kind)
        for kind in bars
        if kind != "everything"
    }
    largest = max(*sizes.values(), stored.bytes_elsewhere)
    assert len(sizes) == 7
    assert all(bars[kind] == round(32 * size / largest) for kind, size in sizes.items())
    errors = Record.read(compressed).errors
    shown = re.findall(r"(\d\.\d{3}) █", output.partition("Largest errors")[2])
    assert shown == [f"{error:.3f}" for error in sorted(errors.values(), reverse=True)[:5]]


def test_info_without_a_record(compressed: Path) -> None:
    (compressed / "oats_report.json").unlink()
    output = run("info", compressed)
    assert "Where the bytes are" in output and "Largest errors" not in output
    assert json.loads(run("info", compressed, "--json"))["layers"][0]["relative_error"] is None


# oats report.


def test_spectrum_is_that_of_the_product() -> None:
    tensors = random_layer(40, 56, 5, 0.4, torch.float32)
    u, v = tensors["low_rank_u"], tensors["low_rank_v"]
    expected = torch.linalg.svdvals(u.double() @ v.double())[:5]
    assert_equal_sums(spectrum(u, v), expected, 40 + 56)
    assert spectrum(u[:, :0], v[:0]).shape == (0,)


def test_the_tiles_of_a_picture_are_the_densities() -> None:
    tensors = random_layer(64, 96, 2, 0.3, torch.float32)
    bits = [[byte >> i & 1 for byte in row for i in range(8)] for row in tensors["mask"].tolist()]
    kept = torch.tensor(bits, dtype=torch.float32)
    expected = kept.view(4, 16, 4, 24).mean((1, 3))
    torch.testing.assert_close(density_picture(tensors["mask"], 96, cells=4), expected)
    assert torch.equal(density_picture(tensors["mask"], 96, cells=200), kept)


def test_anatomies_read_what_is_stored(compressed: Path) -> None:
    model = read_stored_model(compressed)
    found = list(anatomies(model))
    assert [anatomy.layer for anatomy in found] == list(model.layers)
    assert all(sum(a.part_bytes.values()) == a.layer.stored_bytes for a in found)
    assert all(a.spectrum.shape == (a.layer.rank,) and (a.spectrum.diff() <= 0).all() for a in found)
    name = model.layers[3].name
    (picture,) = pictures(model, [name]).values()
    assert float(picture.mean()) == pytest.approx(model.layers[3].density, abs=1e-6)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()


def test_the_report_is_one_file_with_everything_in_it(compressed: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'oats-torch[plot]'")
    out = tmp_path / "report.html"
    run("report", compressed, "--out", out)
    text = out.read_text()
    page = _Page()
    page.feed(text)
    assert not page.open and page.tags.count("svg") == 4
    assert len(set(page.ids)) == len(page.ids)
    # Images inside are data; links go to parts of the same picture.
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert {r[1:] for r in re.findall(r"url\((#[^)]*)\)", text)} <= set(page.ids)
    assert not re.search(r"<(script|link|iframe)", text) and "http://127" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    errors = Record.read(compressed).errors
    for layer in read_stored_model(compressed).layers:
        assert f"<td>{layer.name}</td>" in text and f"<td>{errors[layer.name]:.4f}</td>" in text
    assert "is there already" in run("report", compressed, "--out", out, code=1)


def test_the_speed_of_a_model_with_codes_is_that_of_codes(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'oats-torch[plot]'")
    monkeypatch.setattr("oats.inspection.layer_speed.BATCHES", (1,))
    run("quantize", compressed, tmp_path / "int4", "--values", "int4")
    run("report", tmp_path / "int4", "--speed", "--out", tmp_path / "report.html")
    speed = (tmp_path / "report.html").read_text().partition("<h2>Speed</h2>")[2]
    assert "<th>oats int4 " in speed and "<th>torch bf16 dense</th>" in speed


def test_the_report_refuses(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'oats-torch[plot]'")
    assert "has no compressed layer" in run("report", dense, "--out", tmp_path / "r.html", code=1)
    assert "is a directory" in run("report", dense, "--out", tmp_path, code=1)


# oats alone.


def test_oats_alone_shows_what_is_here_and_what_to_do_next(
    compressed: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(compressed.parent)
    (compressed.parent / "big").symlink_to(dense)
    (compressed.parent / "broken").mkdir()
    (compressed.parent / "broken" / "config.json").write_text("[1")
    output = run()
    assert re.search(r"small +llama, compressed, .*oats eval small", output)
    assert re.search(r"big +llama, dense, .*oats compress big big-oats", output)
    assert "broken" not in output
    for command in ("compress", "info", "eval", "generate", "bench"):
        assert f"oats {command} " in output
