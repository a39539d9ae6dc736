"""Attention rollout of a compressed vision transformer and of its parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import oats
from oats.errors import CalibrationError, CheckpointError, UnsupportedModelError
from oats.inspection.rollout import attention_rollout, figure, only, rollouts
from oats.integrations.vision import load_vision_model, read_images
from tests.cli.test_cli import entries, fails, run
from tests.rounding import assert_equal_sums, terms_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
)
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SHAPE)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # attention that differs between patches
    oats.compress_(model, {"pixel_values": torch.randn(20, 3, 16, 16)}, oats.OatsConfig(iterations=3))
    directory = tmp_path_factory.mktemp("models") / "vit"
    model.save_pretrained(directory)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.2]}
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def model(saved: Path):
    return load_vision_model(saved, attn_implementation="eager")


def rolled_out(model, pixels: torch.Tensor) -> np.ndarray:
    """From the definition: token by token, how the blocks mix the patches into the class token."""
    with torch.no_grad():
        attentions = [a.double().numpy() for a in model(pixels, output_attentions=True).attentions]
    maps = []
    for i in range(len(pixels)):
        shares = np.zeros(attentions[0].shape[-1])
        shares[0] = 1.0  # all of the class token's output comes from the class token
        for attention in reversed(attentions):
            mixed = 0.5 * attention[i].mean(0) + 0.5 * np.eye(len(shares))
            shares = shares @ mixed
        assert shares.sum() == pytest.approx(1)
        maps.append(shares[1:].reshape(4, 4))
    return np.stack(maps)


def test_rollout_is_that_of_its_definition(model) -> None:
    found = attention_rollout(model, PIXELS)
    assert_equal_sums(found, torch.from_numpy(rolled_out(model, PIXELS)), terms_of(model))
    assert found.shape == (3, 4, 4) and found.std() > 1e-4


def test_the_parts_add_up_to_the_layer(model) -> None:
    layer = model.get_submodule(oats.models.architecture.find_blocks(model)[0])[1].mlp.fc1
    x = torch.randn(5, 48)
    whole = layer(x)
    with only(model, "sparse"):
        sparse = layer(x)
    with only(model, "low-rank"):
        low_rank = layer(x)
    assert_equal_sums(sparse + low_rank - layer.bias, whole, 48 + layer.rank)
    assert torch.equal(layer(x), whole)
    assert sparse.std() > 0.01 and low_rank.std() > 0.01


def test_the_rollouts_of_the_parts_are_those_of_models_made_of_them(model) -> None:
    found = rollouts(model, PIXELS)
    assert list(found) == ["whole model", "sparse part alone", "low-rank part alone"]
    for part in ("sparse", "low-rank"):
        with only(model, part):
            expected = rolled_out(model, PIXELS)
        assert_equal_sums(found[f"{part} part alone"], torch.from_numpy(expected), terms_of(model))
        assert not np.allclose(expected, rolled_out(model, PIXELS), rtol=1e-3)
    picture = figure(PIXELS, found, ["a", "b", "c"])
    assert len(picture.axes) == 12 + 1  # and the scale
    for i in range(3):  # each map from its least to its most: transparent to nearly opaque
        overlay = picture.axes[4 * i + 1].images[1].get_array()
        assert overlay.shape == (128, 128, 4)
        assert overlay[..., 3].min() == 0 and overlay[..., 3].max() == pytest.approx(0.95)


def test_models_without_parts_or_without_attention() -> None:
    dense = Dinov2Model._from_config(Dinov2Config(**SHAPE), attn_implementation="eager").eval()
    assert list(rollouts(dense, PIXELS)) == ["whole model"]
    with pytest.raises(UnsupportedModelError, match="no sparse part"), only(dense, "sparse"):
        pass
    with pytest.raises(UnsupportedModelError, match="attn_implementation"):
        attention_rollout(Dinov2Model._from_config(Dinov2Config(**SHAPE), attn_implementation="sdpa"), PIXELS)


def test_the_command(saved: Path, model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    generator = np.random.default_rng(0)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    pixels = read_images(files, model, saved)
    first = torch.from_numpy(np.array(Image.open(files[0]))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.2])
    torch.testing.assert_close(pixels[0], (first - mean[:, None, None]) / std[:, None, None])

    out = tmp_path / "out.png"
    result = run("rollout", saved, *files, "--out", out)
    assert "whole model, sparse part alone, low-rank part alone" in " ".join(result.stdout.split())
    with Image.open(out) as picture:
        assert picture.width > picture.height > 300
    assert "is there already; give another name" in fails("rollout", saved, *files, "--out", out)
    assert run("rollout", saved, files[0], "--out", out, "--overwrite").exit_code == 0
    assert "no config.json" in fails("rollout", tmp_path, *files, "--out", tmp_path / "x.png")
    assert "cannot read the image" in fails(
        "rollout", saved, saved / "config.json", "--out", tmp_path / "x.png"
    )
    assert "cannot write" in fails("rollout", saved, files[0], "--out", tmp_path / "x.nope")
    assert entries(tmp_path) == ["a.png", "b.png", "out.png"]


def test_what_is_no_vision_model(tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a class of transformers that takes images"):
        load_vision_model(tmp_path)
    with pytest.raises(CalibrationError, match="cannot read the image"):
        read_images(
            [tmp_path / "none.png"],
            LlamaForCausalLM(LlamaConfig(**sizes, image_size=1, num_channels=1)),
            tmp_path,
        )
