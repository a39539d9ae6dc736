"""Hessians of a block's inputs, the walk with the methods past the published one, and block-wise matching."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import oats
from oats.compression import matching
from oats.compression.block_runner import BlockRunner
from oats.compression.calibration import as_batches
from oats.compression.matching import match_block
from oats.compression.statistics import hessians, second_moments
from oats.errors import CalibrationError
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.compression.test_compress import ROWS, TOKENS, Chain, llama, opt
from tests.rounding import assert_equal_sums, terms_of

pytestmark = pytest.mark.usefixtures("one_thread")

HESSIAN = oats.OatsConfig(method="oats-hessian", iterations=5)


def runner_of(model: nn.Module, data=TOKENS, tokens: int = 48) -> BlockRunner:
    model.eval()
    blocks = model.layers if isinstance(model, Chain) else model.model.layers
    return BlockRunner(model, list(blocks), as_batches(model, data, tokens))


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def test_hessians_are_sums_of_outer_products_and_shared_where_inputs_are() -> None:
    model = llama()
    model.config.use_cache = False
    linears = linears_of(model.model.layers[0])
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
        for name, linear in linears.items()
    ]
    model(TOKENS)
    for handle in handles:
        handle.remove()
    found = hessians(runner_of(model), 0, linears)
    assert found.keys() == linears.keys()
    for name, x in inputs.items():
        x = x.reshape(-1, x.shape[-1]).double()
        assert_equal_sums(found[name], x.T @ x, len(x) + terms_of(model.model.layers[0]))
    assert found["self_attn.q_proj"] is found["self_attn.k_proj"] is found["self_attn.v_proj"]
    assert found["mlp.gate_proj"] is found["mlp.up_proj"]
    assert len({id(each) for each in found.values()}) == 4


class Branches(nn.Module):
    """The first layer always runs; the second on the same inputs, but only for a batch of even size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        y = self.first(x)
        if len(x) % 2 == 0:
            y = y + self.second(x)
        x.mul_(2)
        return y + self.first(x)


@torch.no_grad()
def test_statistics_of_layers_that_share_some_inputs() -> None:
    model = Chain(block=Branches)
    linears = linears_of(model.layers[0])
    parts = ROWS[:21].split([8, 7, 6])
    stem = [model.stem(part) for part in parts]
    # The first layer sees each x, and 2 x, which is the same tensor changed in place.
    first = sum(x.double().T @ x.double() for x in stem) * 5
    second = sum(x.double().T @ x.double() for x in (stem[0], stem[2]))
    found = hessians(runner_of(model, list(parts)), 0, linears)
    for name, expected in {"first": first, "second": second}.items():
        assert_equal_sums(found[name], expected, 2 * 21 + 32)
        moments = second_moments(runner_of(model, list(parts)), 0, linears)[name]
        assert_equal_sums(moments, expected.diagonal(), 2 * 21 + 32)


@torch.no_grad()
def test_hessians_leave_out_masked_tokens() -> None:
    model = opt()
    model.config.use_cache = False
    mask = torch.ones_like(TOKENS)
    mask[:, 15:] = 0
    blocks = list(model.model.decoder.layers)
    linears = linears_of(blocks[0])
    masked = [{"input_ids": TOKENS, "attention_mask": mask}]
    cut = as_batches(model, TOKENS[:, :15])
    found = hessians(BlockRunner(model, blocks, masked), 0, linears)
    expected = hessians(BlockRunner(model, blocks, cut), 0, linears)
    for name in linears:
        assert_equal_sums(found[name], expected[name], TOKENS.numel() + terms_of(blocks[0]))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_the_walk_by_the_hessian_loses_less_and_stores_as_much() -> None:
    dense = outputs(llama())
    lost = {}
    for method in ("oats", "oats-hessian"):
        model = llama()
        report = oats.compress_(model, TOKENS, oats.OatsConfig(method=method))
        lost[method] = float((outputs(model) - dense).norm()), report.parameters_after
    assert lost["oats-hessian"][0] < 0.9 * lost["oats"][0]
    assert lost["oats-hessian"][1] == lost["oats"][1]


def compressed_block(model: nn.Module, index: int) -> list[SparseLowRankLinear]:
    """Compress one block in place, by magnitude."""
    block = model.model.layers[index]
    layers = []
    for name, linear in linears_of(block).items():
        ones = torch.ones(linear.in_features)
        layers.append(SparseLowRankLinear.from_linear(linear, ones, oats.OatsConfig(compression=0.6)))
        block.set_submodule(name, layers[-1])
    return layers


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_matching_brings_the_output_of_a_block_nearer(index: int) -> None:
    model = llama()
    model.config.use_cache = False
    runner, dense = runner_of(model), runner_of(model)
    for i in range(index + 1):
        dense.advance(i)
    for i in range(index):
        runner.advance(i)
    layers = compressed_block(model, index)
    held = [{name: x.clone() for name, x in layer.canonical().items()} for layer in layers]
    others = {n: p.clone() for n, p in model.named_parameters()}

    before, after = match_block(runner, index, layers, dense.hidden_states, 20)
    assert after < 0.85 * before
    errors = [
        ((y - t).square().sum(-1) / t.square().sum(-1)).mean()
        for y, t in zip(runner.run(index), dense.hidden_states, strict=True)
    ]
    assert after == pytest.approx(float(sum(errors) / len(errors)), rel=1e-4)
    for layer, canonical in zip(layers, held, strict=True):
        now = layer.canonical()
        assert torch.equal(now["mask"], canonical["mask"])
        assert all(now[n].shape == canonical[n].shape and now[n].dtype == canonical[n].dtype for n in now)
        assert not torch.equal(now["values"], canonical["values"])
        assert not torch.equal(now["low_rank_u"], canonical["low_rank_u"])
    assert all(torch.equal(p, others[n]) and p.grad is None for n, p in model.named_parameters())


@torch.no_grad()
def test_layers_stay_as_they_were_where_matching_does_not_help(monkeypatch) -> None:
    model = llama()
    runner = runner_of(model)
    layers = compressed_block(model, 0)
    targets = list(runner.run(0))  # what the block returns already
    held = [layer.to_dense() for layer in layers]
    assert match_block(runner, 0, layers, targets, 1) == (0, 0)
    assert all(torch.equal(layer.to_dense(), dense) for layer, dense in zip(layers, held, strict=True))


@torch.no_grad()
def test_matching_refuses_what_it_cannot_measure() -> None:
    model = llama()
    runner = runner_of(model)
    layers = compressed_block(model, 0)
    with pytest.raises(CalibrationError, match="block returns a dict"):
        match_block(runner, 0, layers, [{}] * 3, 1)
    broken = [torch.full_like(x, torch.nan) for x in runner.run(0)]
    with pytest.raises(CalibrationError, match=r"block 0: .* not finite"):
        match_block(runner, 0, layers, broken, 1)


def test_masked_tokens_do_not_count_in_the_loss() -> None:
    y, t = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    y[0, 2], y[1, 0] = 3, 2
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert float(matching._relative_error(y, t, {})) == pytest.approx((4 + 1) / 6)
    batch = {"attention_mask": mask}
    assert float(matching._relative_error(y, (t,), batch)) == pytest.approx(1 / 5)
    assert float(matching._relative_error(y.view(6, 4), t.view(6, 4), batch)) == pytest.approx(1 / 5)


def test_the_walk_with_matching(tmp_path) -> None:
    model, plain = llama(), llama()
    dense = outputs(model)
    config = oats.OatsConfig(method="oats-hessian", iterations=5, block_matching=10)
    oats.compress_(plain, TOKENS, HESSIAN)
    report = oats.compress_(model, TOKENS, config)
    assert list(report.matched) == [f"model.layers.{i}" for i in range(3)]
    assert all(after < before for before, after in report.matched.values())
    assert float((outputs(model) - dense).norm()) < 0.9 * float((outputs(plain) - dense).norm())
    masks = [
        (a.canonical()["mask"], b.canonical()["mask"])
        for a, b in zip(model.model.layers[0].modules(), plain.model.layers[0].modules(), strict=True)
        if isinstance(a, SparseLowRankLinear)
    ]
    assert len(masks) == 7 and all(torch.equal(a, b) for a, b in masks)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    settings = loaded.config.quantization_config.settings
    assert (settings.method, settings.block_matching) == ("oats-hessian", 10)


def test_a_layer_of_an_earlier_block_is_not_tuned_again() -> None:
    model = llama()
    shared = model.model.layers[0].mlp.down_proj
    model.model.layers[1].mlp.down_proj = shared
    tuned = []
    original = matching.match_block

    def spy(runner, index, layers, *args):
        tuned.append(list(layers))
        return original(runner, index, layers, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oats.compression.walk.match_block", spy)
        oats.compress_(model, TOKENS, oats.OatsConfig(iterations=3, block_matching=1))
    assert [len(layers) for layers in tuned] == [7, 6, 7]
    assert model.model.layers[0].mlp.down_proj is model.model.layers[1].mlp.down_proj
    assert model.model.layers[1].mlp.down_proj not in tuned[1]
