"""One compression spread over layers: the same parameters in all, where the formulas put them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import oats
from oats.compression.allocation import Measure, allocate, outlier_share
from oats.compression.block_runner import BlockRunner
from oats.compression.calibration import as_batches
from oats.compression.statistics import second_moments

TOKENS = torch.randint(0, 61, (6, 24), generator=torch.Generator().manual_seed(1))


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


def removed(measures: list[dict[str, Measure]], compressions: dict[str, float]) -> float:
    each = {name: m.parameters for block in measures for name, m in block.items()}
    return sum(compressions[name] * size for name, size in each.items()) / sum(each.values())


def test_outliers_are_counted_as_in_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 60, generator=generator).pow(3)
    inputs = torch.randn(60, 500, generator=generator) * torch.rand(60, 1, generator=generator)
    # arXiv 2310.05175: |W_ij| times the norm of input j, against M times the layer's mean.
    scores = weight.abs() * inputs.norm(dim=1)
    expected = (scores > 5 * scores.mean()).float().mean()
    assert outlier_share(weight, inputs.square().sum(1)) == pytest.approx(float(expected))
    assert outlier_share(weight, inputs @ inputs.T) == pytest.approx(float(expected))


@pytest.mark.parametrize("compression", [0.0, 0.04, 0.3, 0.5, 0.95])
def test_owl_keeps_the_mean_and_its_spread(compression) -> None:
    sizes, shares = [100, 400, 250], [0.02, 0.05, 0.03]
    measures = [
        {f"m{i}": Measure(size, outliers=share)}
        for i, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]
    found = allocate(measures, oats.OatsConfig(budget="owl", compression=compression))
    assert removed(measures, found) == pytest.approx(compression, abs=1e-4)
    assert all(0 <= c < 1 for c in found.values())
    spread = min(0.08, compression, (1 - compression) / 2)
    assert max(found.values()) - min(found.values()) == pytest.approx(2 * spread, abs=2e-4)
    if spread:
        # Linear in the share of outliers.
        assert found["m1"] < found["m2"] < found["m0"]
        assert found["m0"] - found["m2"] == pytest.approx((found["m0"] - found["m1"]) / 3, abs=2e-4)


def test_equal_blocks_are_compressed_alike() -> None:
    measures = [{"a": Measure(100, outliers=0.01)}, {"b": Measure(300, outliers=0.01)}]
    assert allocate(measures, oats.OatsConfig(budget="owl")) == {"a": 0.5, "b": 0.5}


def test_errors_give_the_least_sum_of_squares() -> None:
    sizes = {"a": 100, "b": 300, "c": 200}
    errors = {"a": (0.10, 0.30), "b": (0.20, 0.26), "c": (0.05, 0.25)}
    measures = [{n: Measure(sizes[n], errors=((0.4, e[0]), (0.6, e[1]))) for n, e in errors.items()}]
    found = allocate(measures, oats.OatsConfig(budget="error"))
    assert removed(measures, found) == pytest.approx(0.5, abs=1e-4)

    def loss(compressions: dict[str, float]) -> float:
        total = 0.0
        for name, c in compressions.items():
            first, second = (2 * math.log(e) for e in errors[name])
            total += math.exp(first + (second - first) * (c - 0.4) / 0.2)
        return total

    # Every other way on a grid that removes as many parameters.
    grid = torch.linspace(0.4, 0.6, 81, dtype=torch.float64).tolist()
    others = []
    for a, c in itertools.product(grid, grid):
        b = (0.5 * 600 - a * 100 - c * 200) / 300
        if 0.4 <= b <= 0.6:
            others.append(loss({"a": a, "b": b, "c": c}))
    assert loss(found) <= min(others) * (1 + 1e-4)
    assert found["b"] > 0.5 > found["c"]


@pytest.mark.parametrize("budget", ["owl", "error"])
def test_a_model_loses_as_many_parameters_as_with_a_uniform_budget(budget) -> None:
    reports = {
        b: oats.compress_(llama(), TOKENS, oats.OatsConfig(budget=b, iterations=2, pattern="layer"))
        for b in ("uniform", budget)
    }
    kept = {b: report.parameters_after / report.parameters_before for b, report in reports.items()}
    # A rank is a whole number: in layers this small, one more is 4 % of the parameters that are kept.
    assert kept[budget] == pytest.approx(kept["uniform"], abs=0.02)
    densities = {layer.nnz / (layer.d_out * layer.d_in) for layer in reports[budget].layers}
    assert len(densities) > 1 and max(densities) - min(densities) > 0.03


def test_the_dense_model_is_what_is_measured() -> None:
    """Blocks with outliers get them from their own weights and inputs, before anything is compressed."""
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[:, 3] *= 30
    blocks = list(model.model.layers)
    config = oats.OatsConfig(budget="owl", iterations=2)
    expected = []
    runner = BlockRunner(model, blocks, as_batches(model, TOKENS))
    with torch.no_grad():
        for index, block in enumerate(blocks):
            linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            moments = second_moments(runner, index, linears)
            runner.advance(index)
            counts = [outlier_share(m.weight, moments[n]) * m.weight.numel() for n, m in linears.items()]
            expected.append(sum(counts) / sum(m.weight.numel() for m in linears.values()))
    report = oats.compress_(model, TOKENS, config)
    kept = [sum(x.nnz for x in report.layers if x.name.startswith(f"model.layers.{i}.")) for i in range(3)]
    assert expected.index(max(expected)) == 2 and kept[2] > 1.1 * max(kept[:2])


def test_the_best_rank_ratio_is_taken_for_each_layer() -> None:
    ratios = (0.0, 0.25, 0.9)
    chosen = oats.compress_(llama(), TOKENS, oats.OatsConfig(rank_ratios=ratios, iterations=3)).layers
    singles = [
        oats.compress_(llama(), TOKENS, oats.OatsConfig(rank_ratio=ratio, iterations=3)).layers
        for ratio in ratios
    ]
    # In the first block all see the same inputs.
    for layer, *alone in list(zip(chosen, *singles, strict=True))[:7]:
        best = min(alone, key=lambda each: each.relative_error)
        assert (layer.rank, layer.nnz) == (best.rank, best.nnz)
        assert layer.relative_error == pytest.approx(best.relative_error)
