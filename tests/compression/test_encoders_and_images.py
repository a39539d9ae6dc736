"""`oats compress` of what is no language model: encoders on text, vision transformers on images."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from oats.checkpoint.companions import copy_companions
from oats.compression.calibration_text import Text
from oats.compression.tokenization import calibration_windows, framing_tokens
from oats.errors import CalibrationError, FormatError
from oats.integrations.vision import CALIBRATION_IMAGES, calibration_images, read_images
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.cli import test_cli
from tests.cli.test_cli import entries, fails, run
from tests.scripts import load_script

dense_llama, text = test_cli.dense, test_cli.text  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--iterations", "2"]
SIZES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "."]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT as sentence-transformers saves it."""
    directory = tmp_path_factory.mktemp("models") / "encoder"
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**SIZES, vocab_size=len(vocabulary))).save_pretrained(directory)
    (directory / "modules.json").write_text(
        json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../elsewhere"}])
    )
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return directory


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "vision"
    torch.manual_seed(0)
    config = hf.ViTConfig(**SIZES, image_size=16, patch_size=4, num_labels=3)
    hf.ViTForImageClassification(config).save_pretrained(directory)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.2], "size": {"height": 16}}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for kind in ("a", "b"):
        (directory / kind).mkdir()
        for i in range(6):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / kind / f"{i}.{'png' if i else 'JPG'}")
    for name in ("labels.txt", "paper.pdf"):  # Pillow writes PDF, and does not read it
        (directory / name).write_text("no image")
    return directory


def test_an_encoder(encoder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--calibration", text, "--samples", 4, "--length", 32, *FAST]
    report = json.loads(run("compress", encoder, out, *options, "--json").stdout)
    assert report["layers"] == 12 and not report["generates"]
    expected = hf.AutoModel.from_pretrained(encoder)
    model, info = hf.AutoModel.from_pretrained(out, output_loading_info=True)
    assert isinstance(model, hf.BertModel) and not any(info.values())
    assert sum(isinstance(m, SparseLowRankLinear) for m in model.modules()) == 12
    batch = hf.AutoTokenizer.from_pretrained(out)(
        ["the fox", "the quick brown dog jumps"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch).last_hidden_state for m in (model, expected))
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.5
    assert entries(out / "1_Pooling") == ["config.json"] and (out / "modules.json").is_file()
    card = (out / "README.md").read_text()
    assert "from transformers import BertModel, AutoTokenizer" in card and "generate" not in card

    coded = tmp_path / "int8"
    assert run("quantize", out, coded).exit_code == 0
    assert (coded / "1_Pooling" / "config.json").is_file()
    with torch.no_grad():
        codes = hf.AutoModel.from_pretrained(coded).eval()(**batch).last_hidden_state
    torch.testing.assert_close(codes, ours, atol=0.1, rtol=0.1)
    assert "saved as BertModel, but a causal language model is needed" in fails("eval", out, "--text", text)
    assert "takes tokens" in fails("compress", encoder, tmp_path / "x", "--images", encoder)
    assert entries(tmp_path) == ["int8", "out"]


def test_an_encoder_is_calibrated_between_cls_and_sep(encoder: Path, dense_llama: Path) -> None:
    assert framing_tokens(hf.AutoTokenizer.from_pretrained(encoder)) == (2, 3)
    assert framing_tokens(hf.AutoTokenizer.from_pretrained(dense_llama)) == (0, None)
    windows = calibration_windows(torch.arange(10, 30), 2, 6, bos=2, sep=3)
    assert windows.tolist() == [[2, 10, 11, 12, 13, 3], [2, 26, 27, 28, 29, 3]]
    with pytest.raises(CalibrationError, match="at least 1 sample of 3 tokens, got 2 of 2"):
        calibration_windows(torch.arange(10, 30), 2, 2, bos=2, sep=3)


def test_a_vision_model(vision: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "takes images" in fails("compress", vision, out)
    assert "not on a text" in fails("compress", vision, out, "--images", pictures, "--calibration", text)
    assert "holds 12 image files, but 13" in fails(
        "compress", vision, out, "--images", pictures, "--samples", 13
    )
    assert "holds 0 image files" in fails("compress", vision, out, "--images", vision)
    limited = fails("compress", vision, out, "--images", pictures, "--memory-limit", "6GB")
    assert "takes images" in limited and not out.exists()

    result = run("compress", vision, out, "--images", pictures, *FAST)
    assert result.exit_code == 0, result.stderr
    assert f"12 images of {pictures.name}" in " ".join(result.stdout.split())
    assert "oats eval" not in result.stdout
    assert "saved as ViTForImageClassification, but a" in fails(
        "compare", out, "--text", text, "--out", tmp_path
    )
    model, info = hf.AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert sum(isinstance(m, SparseLowRankLinear) for m in model.modules()) == 12
    assert (out / "preprocessor_config.json").read_bytes() == (
        vision / "preprocessor_config.json"
    ).read_bytes()
    assert "AutoTokenizer" not in (out / "README.md").read_text()
    # transformers spells the names of the layers otherwise in the files.
    layers = json.loads(run("info", out, "--json").stdout)["layers"]
    assert {layer["name"] for layer in layers} >= {"vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc2"}
    assert len(layers) == 12 and all(0 < layer["relative_error"] < 1 for layer in layers)
    assert run("report", out, "--out", tmp_path / "report.html").exit_code == 0
    assert run("quantize", out, tmp_path / "int4", "--values", "int4").exit_code == 0
    dense = hf.AutoModelForImageClassification.from_pretrained(vision).eval()
    pixels = read_images(sorted((pictures / "a").iterdir()), model, out)
    with torch.no_grad():
        ours, theirs = model.eval()(pixels).logits, dense(pixels).logits
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.7


def test_images_are_chosen_evenly(pictures: Path) -> None:
    chosen = [f"{file.parent.name}/{file.name}" for file in calibration_images(pictures, 4)]
    assert chosen == ["a/0.JPG", "a/3.png", "b/0.JPG", "b/3.png"]
    assert len(calibration_images(pictures)) == 12 < CALIBRATION_IMAGES


def test_images_are_cut_to_the_square_in_the_middle(vision: Path, tmp_path: Path) -> None:
    model = hf.ViTForImageClassification.from_pretrained(vision)
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, 8:24] = np.arange(16 * 16 * 3).reshape(16, 16, 3) % 256
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = read_images([tmp_path / "wide.png"], model, vision)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.2])
    middle = torch.from_numpy(pixels[:, 8:24]).permute(2, 0, 1) / 255
    torch.testing.assert_close(found[0], (middle - mean[:, None, None]) / std[:, None, None])

    shutil.copytree(vision, tmp_path / "cropped")
    settings = tmp_path / "cropped" / "preprocessor_config.json"
    crop = {"do_center_crop": True, "crop_size": {"height": 12, "width": 12}, "size": {"shortest_edge": 14}}
    settings.write_text(json.dumps(crop))
    assert read_images([tmp_path / "wide.png"], model, settings.parent).shape == (1, 3, 12, 12)
    settings.write_text("{")
    with pytest.raises(FormatError, match="preprocessor_config"):
        read_images([tmp_path / "wide.png"], model, settings.parent)


def test_companions_of_a_damaged_directory(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for directory in (source, out, source / "inside", tmp_path / "outside"):
        directory.mkdir()
        (directory / "config.json").write_text(directory.name)
    for modules in ("{", "[1]", '{"path": 1}', '[{"path": "../outside"}, {"path": "missing"}]'):
        (source / "modules.json").write_text(modules)
        copy_companions(source, out)
        assert entries(out) == ["config.json", "modules.json"]
        (out / "modules.json").unlink()
    (source / "modules.json").write_text('[{"path": "inside"}]')
    copy_companions(source, out)
    assert (out / "inside" / "config.json").read_text() == "inside"
    assert (out / "config.json").read_text() == "out"
    copy_companions("owner/name", out)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script("examples/encoder.py")


def test_pairs_of_the_encoder_example(example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = "The quick brown fox jumps over the lazy dog, they say."
    rest = "It has done so for as long as anybody remembers. " * 2
    text = Text(f"{first} {rest}\n\nToo short. It is.\n \n{first}", "x", "y")
    assert example.paragraphs(text) == [(first, rest.strip())]
    docstring = f'"""{first}\n\n    {rest}{rest}\n    """'
    (tmp_path / "a.py").write_text(
        f"def f():\n    {docstring}\n\nclass C:\n    {docstring}\n\ndef g(): pass\n"
    )
    (tmp_path / "b.py").write_text("def (")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert example.docstrings() == [(first, (rest + rest).strip())]
    vectors = torch.eye(3)
    assert example.found_first(vectors, vectors[[0, 2, 1]]) == pytest.approx(1 / 3)


def test_the_encoder_example(
    example, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    generator = np.random.default_rng(0)
    pairs = [tuple(" ".join(generator.choice(WORDS, n)) for n in (5, 9)) for _ in range(12)]
    monkeypatch.setattr(example, "docstrings", lambda: pairs)
    monkeypatch.setattr(example, "paragraphs", lambda _: pairs)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [
        "encoder.py", "--model", str(encoder), "--methods", "wanda", "wanda+int8", "--compressions", "0.5",
        "--out", str(out),
    ])  # fmt: skip
    example.main()
    assert "3/3  wanda+int8 0.5: " in capsys.readouterr().out
    cells = {file.stem: json.loads(file.read_text()) for file in (out / "cells-row").glob("*-*.json")}
    assert cells["dense-0"]["scores"]["cosine to dense"] == pytest.approx(1)
    assert cells["wanda+int8-50"]["layer_bytes"] < cells["wanda-50"]["layer_bytes"] / 2
    tokenizer, model = hf.AutoTokenizer.from_pretrained(encoder), hf.AutoModel.from_pretrained(encoder).eval()
    vectors = []
    for side in zip(*pairs, strict=True):
        with torch.no_grad():  # one text at a time: no padding
            each = [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in side]
        vectors.append(torch.stack(each))
    nearest = torch.cosine_similarity(vectors[0][:, None], vectors[1][None], dim=-1).argmax(1)
    expected = float((nearest == torch.arange(12)).float().mean())
    assert cells["dense-0"]["scores"]["accuracy, paragraphs"] == pytest.approx(expected)
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
