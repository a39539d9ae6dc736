"""examples/vision.py on images that are made up: all of its path, in small."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import Dinov2ForImageClassification

from tests.scripts import load_script

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script("examples/vision.py")


def write_idx(file: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    file.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def data(example: ModuleType, tmp_path: Path) -> Path:
    """A class is the place of a bright bar."""
    directory = tmp_path / "data"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 256), ("test", 100)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = generator.integers(0, 40, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 3] = 230
        write_idx(directory / example.FILES[split, "images"], images)
        write_idx(directory / example.FILES[split, "labels"], labels)
    return directory


def test_the_example(example, data, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [
        "vision.py", "--model", "dinov2", "--epochs", "1", "--data", str(data), "--out", str(out),
        "--methods", "wanda", "oats", "--compressions", "0.5",
    ])  # fmt: skip
    monkeypatch.setattr(example, "CALIBRATION_IMAGES", 64)
    example.main()
    printed = capsys.readouterr().out
    table = (out / "table.md").read_text().splitlines()
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in table[2:5])}
    assert list(rows) == ["dense", "wanda", "oats"]
    accuracies = {name: float(cells[5].removesuffix(" % ")) for name, cells in rows.items()}
    images, labels = (
        np.frombuffer(
            gzip.decompress((data / example.FILES["test", what]).read_bytes())[skip:], dtype=np.uint8
        )
        for what, skip in (("images", 16), ("labels", 8))
    )
    pixels = (torch.from_numpy(images.copy()).view(100, 1, 28, 28) / 255 - example.MEAN) / example.STD
    with torch.no_grad():
        model = Dinov2ForImageClassification.from_pretrained(out / "dense-1-256-0")
        right = model(pixels).logits.argmax(1).numpy() == labels
    assert accuracies["dense"] == pytest.approx(100 * right.mean())
    assert "epoch 1 of 1" in printed and "3/3  oats 0.5: " in printed
    for picture in ("accuracy.png", "rollout.png", "test-0.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")

    def fail(*_):
        pytest.fail("it was trained again")

    monkeypatch.setattr(example, "train", fail)
    before = (out / "table.md").read_bytes()
    example.main()
    assert (out / "table.md").read_bytes() == before
