"""Several projections of one input in one call: gated MLPs, and the parts of a split projection."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import oats
from oats.nn import experts, split_linear
from oats.nn.fusion import gated_mlp
from oats.nn.fusion.gated_mlp import merge_gated_mlps_
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from oats.nn.split_linear import SplitLinear
from tests.conftest import random_layer
from tests.rounding import assert_equal_sums, terms_of

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many projections each merged call had."""
    seen: list[int] = []
    for user, name in (
        (gated_mlp, "linear_many"),
        (experts, "linear_many"),
        (split_linear, "linear_joined"),
    ):
        original = getattr(user, name)

        def counted(x: Tensor, projections: list[Any], original: Any = original) -> Any:
            seen.append(len(projections))
            return original(x, projections)

        monkeypatch.setattr(user, name, counted)
    return seen


def layer(d_out: int, d_in: int, seed: int, bias: bool = False) -> SparseLowRankLinear:
    tensors = random_layer(d_out, d_in, 5, 0.4, torch.float32, seed)
    return SparseLowRankLinear.from_canonical(tensors, d_in, torch.randn(d_out) if bias else None)


def llama_mlp() -> LlamaMLP:
    mlp = LlamaMLP(LlamaConfig(**SIZES)).eval()
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = layer(48, 32, 0, True), layer(48, 32, 1), layer(32, 48, 2)
    return mlp


def compressed(model: nn.Module) -> nn.Module:
    ids = torch.randint(0, 99, (4, 16), generator=torch.Generator().manual_seed(0))
    oats.compress_(model.eval(), ids, oats.OatsConfig(compression=0.4, rank_ratio=0.3))
    return model


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaMLP, LlamaConfig),
        (MistralMLP, MistralConfig),
        (Qwen3MLP, Qwen3Config),
        (Gemma3MLP, Gemma3TextConfig),
    ],
)
def test_the_same_bits_in_one_call(kind: Any, config: Any, calls: list[int]) -> None:
    mlp = kind(config(**SIZES)).eval()
    for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        linear = getattr(mlp, name)
        setattr(mlp, name, layer(linear.out_features, linear.in_features, seed))
    x = torch.randn(2, 3, 32)
    expected, names = mlp(x), list(mlp.state_dict())
    assert not calls
    merge_gated_mlps_(mlp)
    assert torch.equal(mlp(x), expected) and torch.equal(mlp(x=x), expected) and calls == [2, 2]
    assert list(mlp.state_dict()) == names
    assert isinstance(mlp, kind) and type(mlp).__name__ == kind.__name__
    kind_of_it = type(mlp)
    merge_gated_mlps_(mlp)
    assert type(mlp) is kind_of_it


def test_copies_are_merged_and_of_their_own(calls: list[int]) -> None:
    mlp = llama_mlp()
    merge_gated_mlps_(mlp)
    x = torch.randn(3, 32)
    expected = mlp(x)
    for other in (copy.deepcopy(mlp), copy.copy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert type(other) is type(mlp) and torch.equal(other(x), expected)
    assert calls == [2] * 4
    other = copy.deepcopy(mlp)
    other.up_proj = layer(48, 32, 7)
    assert not torch.equal(other(x), expected) and torch.equal(mlp(x), expected)


@pytest.mark.parametrize("what", ["hook", "pre-hook", "global hook", "forward", "gradient", "layer", "dtype"])
def test_layers_are_called_where_each_must_be_seen(what: str, calls: list[int]) -> None:
    mlp, x = llama_mlp(), torch.randn(3, 32)
    plain = copy.deepcopy(mlp)
    merge_gated_mlps_(mlp)
    seen: list[nn.Module] = []
    handle = None
    for m in (mlp, plain):
        gate = m.gate_proj
        if what == "hook":
            gate.register_forward_hook(lambda module, args, y: (seen.append(module), y + 1)[1])
        elif what == "pre-hook":
            gate.register_forward_pre_hook(lambda module, args: seen.append(module))
        elif what == "forward":
            gate.forward = lambda x, original=gate.forward: original(2 * x)
        elif what == "layer":
            m.gate_proj = nn.Sequential(gate, nn.Tanh())
    if what == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    if what == "gradient":
        x.requires_grad_()
    try:
        if what == "dtype":
            with pytest.raises(ValueError, match="convert one"):
                mlp(x.bfloat16())
        else:
            assert torch.equal(mlp(x), plain(x))
    finally:
        if handle is not None:
            handle.remove()
    assert not calls
    assert bool(seen) == ("hook" in what)
    if what == "gradient":
        mlp(x).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0


def test_another_forward_is_left_alone() -> None:
    class Scaled(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(2 * x))

    mlp = llama_mlp()
    mlp.__class__ = Scaled
    merge_gated_mlps_(mlp)
    assert type(mlp) is Scaled
    dense = LlamaMLP(LlamaConfig(**SIZES))
    merge_gated_mlps_(dense)
    assert type(dense) is LlamaMLP


def test_a_compressed_llama_is_the_same_model(tmp_path: Path, calls: list[int]) -> None:
    torch.manual_seed(0)
    model = compressed(LlamaForCausalLM(LlamaConfig(**SIZES)))
    ids = torch.randint(0, 99, (2, 9))
    with torch.inference_mode():
        merged = model(ids).logits
        assert calls == [2, 2]
        model.save_pretrained(tmp_path / "merged")
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(loaded(ids).logits, merged) and calls == [2] * 4
        for block in model.model.layers:
            assert type(block.mlp) is not LlamaMLP
            block.mlp.__class__ = LlamaMLP
        assert torch.equal(model(ids).logits, merged) and calls == [2] * 4
        model.save_pretrained(tmp_path / "separate")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "separate" / file).read_bytes()
    compiled = torch.compile(loaded.model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 32)
    mlp = model.model.layers[0].mlp
    assert_equal_sums(compiled(x), mlp(x), terms_of(mlp))


def test_a_compressed_phi3_computes_its_projections_in_one_call(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = compressed(Phi3ForCausalLM(Phi3Config(**SIZES, pad_token_id=0, eos_token_id=1)))
    calls.clear()
    ids = torch.randint(0, 99, (2, 9))
    with torch.inference_mode():
        merged = model(ids).logits
        assert calls == [3, 3]
        for module in model.modules():
            if isinstance(module, SplitLinear):
                module["k"].register_forward_hook(lambda *_: None)
        assert torch.equal(model(ids).logits, merged) and calls == [3, 3]
