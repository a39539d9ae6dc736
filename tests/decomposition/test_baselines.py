"""The pruning baselines against their formulas, written again from the papers in plain float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import oats
from oats.compression.block_runner import BlockRunner
from oats.compression.calibration import as_batches
from oats.compression.statistics import means_and_variances
from oats.config import PRUNING, OatsConfig
from oats.decomposition.baselines import sparsegpt
from oats.decomposition.baselines.by_score import prune_magnitude, prune_wanda
from oats.decomposition.baselines.dsnot import CYCLES, THRESHOLD, prune_dsnot
from oats.decomposition.baselines.sparsegpt import prune_sparsegpt
from oats.decomposition.error_feedback import DAMPING
from oats.errors import ConfigError, WeightError
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.rounding import assert_equal_sums, terms_of

pytestmark = pytest.mark.usefixtures("one_thread")

D_OUT, D_IN, TOKENS = 24, 48, 400
PATTERNS = [("row", 0.5), ("row", 0.3), ("layer", 0.6), ("2:4", 0.5), ("3:8", 0.625)]


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs (d_in, tokens) whose sizes and means differ."""
    generator = torch.Generator().manual_seed(seed)
    weight, mixing = (torch.randn(n, D_IN, generator=generator) for n in (D_OUT, D_IN))
    inputs = torch.randn(D_IN, TOKENS, generator=generator) + 0.3 * torch.randn(D_IN, 1, generator=generator)
    size = torch.exp(torch.randn(D_IN, 1, generator=generator))
    return weight, size * (inputs + 0.2 * mixing @ inputs)


def largest(scores: np.ndarray, pattern: str, compression: float) -> np.ndarray:
    """Mask of the entries to keep: sort each row, matrix or group of M."""
    if pattern == "layer":
        units = scores.reshape(1, -1)
    elif pattern == "row":
        units = scores
    else:
        units = scores.reshape(-1, int(pattern.split(":")[1]))
    removed = round(compression * units.shape[1], 6)
    removed = math.ceil(removed) if pattern == "layer" else math.floor(removed)
    mask = np.ones_like(units, dtype=bool)
    for row, unit in zip(mask, units, strict=True):
        row[np.argsort(unit, kind="stable")[:removed]] = False
    return mask.reshape(scores.shape)


@pytest.mark.parametrize(("pattern", "compression"), PATTERNS)
def test_magnitude(pattern, compression) -> None:
    weight, inputs = problem()
    result = prune_magnitude(weight, inputs.square().sum(1), compression=compression, pattern=pattern)
    kept = torch.from_numpy(largest(np.abs(weight.numpy()), pattern, compression))
    assert torch.equal(result.sparse, weight * kept)
    assert result.rank == 0 and result.nnz == int(kept.sum())


@pytest.mark.parametrize(("pattern", "compression"), PATTERNS)
def test_wanda(pattern, compression) -> None:
    weight, inputs = problem()
    result = prune_wanda(weight, inputs.square().sum(1), compression=compression, pattern=pattern)
    norms = np.linalg.norm(inputs.numpy().astype(float), axis=1)
    kept = torch.from_numpy(largest(np.abs(weight.numpy().astype(float)) * norms, pattern, compression))
    assert torch.equal(result.sparse, weight * kept)
    lost = np.linalg.norm((weight - result.sparse).numpy() * norms)
    assert result.relative_error == pytest.approx(lost / np.linalg.norm(weight.numpy() * norms), rel=1e-5)


def test_wanda_is_oats_without_a_low_rank_part() -> None:
    weight, inputs = problem()
    moment = inputs.square().sum(1)
    for pattern in ("row", "layer", "2:4"):
        ours = oats.decompose(weight, moment, rank_ratio=0, pattern=pattern)
        # Ours is multiplied by the root of the moment, and divided by it.
        assert_equal_sums(prune_wanda(weight, moment, pattern=pattern).sparse, ours.sparse, 4)


def optimal_brain_surgeon(
    weight: np.ndarray, hessian: np.ndarray, pattern: str, compression: float, width: int
) -> np.ndarray:
    """Column by column; each inverts the remaining Hessian anew."""
    w = weight.astype(float).copy()
    d_out, d_in = w.shape
    hessian = hessian.astype(float) + DAMPING * np.diag(hessian).mean() * np.eye(d_in)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(d_in)]
    diagonal = np.array([inverse[0, 0] for inverse in inverses])
    mask = np.zeros(w.shape, dtype=bool)
    unit = d_out * d_in if pattern == "layer" else d_in
    total = (
        unit - math.floor(compression * unit) if pattern == "row" else math.floor((1 - compression) * unit)
    )
    kept_before = 0
    for j in range(d_in):
        if ":" in pattern:
            m = int(pattern.split(":")[1])
            if j % m == 0:
                group = slice(j, j + m)
                mask[:, group] = largest(w[:, group] ** 2 / diagonal[group], "row", compression)
        elif j % width == 0:
            block = slice(j, min(j + width, d_in))
            kept_until = total * block.stop // d_in
            scores = w[:, block] ** 2 / diagonal[block]
            removed = 1 - (kept_until - kept_before) / (unit * scores.shape[1] / d_in)
            mask[:, block] = largest(scores, pattern, removed)
            kept_before = kept_until
        # Brain Surgeon: to set w_j to 0, move the rest by −w_j [H⁻¹]_j / [H⁻¹]_jj.
        error = np.where(mask[:, j], 0.0, w[:, j]) / diagonal[j]
        w[:, j:] -= error[:, None] * inverses[j][0]
        w[~mask[:, j], j] = 0.0
    return w


@pytest.mark.parametrize("width", [16, 20, 128])
@pytest.mark.parametrize(("pattern", "compression"), PATTERNS)
def test_sparsegpt(monkeypatch, pattern, compression, width) -> None:
    weight, inputs = problem()
    hessian = inputs @ inputs.T
    monkeypatch.setattr(sparsegpt, "BLOCK", width)
    result = prune_sparsegpt(weight, hessian, compression=compression, pattern=pattern)
    expected = optimal_brain_surgeon(weight.numpy(), hessian.numpy(), pattern, compression, width)
    assert torch.equal(result.sparse != 0, torch.from_numpy(expected != 0))
    torch.testing.assert_close(result.sparse.double(), torch.from_numpy(expected), atol=1e-4, rtol=1e-4)
    lost = float(((weight - result.sparse) @ inputs).norm() / (weight @ inputs).norm())
    assert result.relative_error == pytest.approx(lost, rel=1e-4)


def test_sparsegpt_where_inputs_are_never_active_or_fewer_tokens_than_inputs() -> None:
    weight, inputs = problem()
    inputs[3] = inputs[10] = 0
    for tokens in (TOKENS, 20):
        x = inputs[:, :tokens]
        result = prune_sparsegpt(weight, x @ x.T)
        assert result.sparse.isfinite().all() and not result.sparse[:, [3, 10]].any()
        assert (result.sparse != 0).sum() <= D_OUT * D_IN // 2
        small = prune_sparsegpt(weight, 2.0**-20 * (x @ x.T))  # the scale does not matter
        assert torch.equal(small.sparse, result.sparse)
    assert not prune_sparsegpt(weight, torch.zeros(D_IN, D_IN)).sparse.any()


def swapped(weight: np.ndarray, inputs: np.ndarray, pattern: str, compression: float) -> np.ndarray:
    """The mask of dynamic sparse no training, computed one row and one swap at a time."""
    mean, variance = inputs.mean(1), inputs.var(1)
    scores = np.abs(weight) * np.linalg.norm(inputs, axis=1)
    mask = largest(scores, pattern, compression)
    m = int(pattern.split(":")[1]) if ":" in pattern else None
    for w, score, kept in zip(weight, scores, mask, strict=True):
        c = w * mean
        growable, prunable = set(np.flatnonzero(~kept)), set(np.flatnonzero(kept))
        error = sum(c[j] for j in growable)
        for _ in range(CYCLES):
            grow = [j for j in growable if c[j] * error > 0]
            if abs(error) <= THRESHOLD or not grow:
                break
            grown = max(grow, key=lambda j, c=c: abs(c[j]) / variance[j])
            if m is None:
                prune = [j for j in prunable if c[j] * error < 0]
            else:
                prune = [j for j in prunable if j // m == grown // m]
            if not prune:
                break
            pruned = min(prune, key=lambda j, score=score: score[j])
            after = error - c[grown] + c[pruned]
            if after * error <= 0:
                break
            kept[grown], kept[pruned] = True, False
            growable.remove(grown)
            prunable.remove(pruned)
            error = after
    return mask


@pytest.mark.parametrize(("pattern", "compression"), PATTERNS)
def test_dsnot(pattern, compression) -> None:
    changed = 0
    for seed in range(3):
        weight, inputs = problem(seed)
        moments = torch.stack([inputs.double().mean(1), inputs.double().var(1, correction=0)])
        result = prune_dsnot(weight, moments, compression=compression, pattern=pattern)
        kept = swapped(weight.numpy().astype(float), inputs.numpy().astype(float), pattern, compression)
        assert torch.equal(result.sparse, weight * torch.from_numpy(kept))
        wanda = prune_wanda(weight, inputs.square().sum(1), compression=compression, pattern=pattern)
        changed += int(((wanda.sparse != 0) != torch.from_numpy(kept)).sum())
        assert result.nnz == wanda.nnz
        lost = [((weight - each.sparse) @ inputs).mean(1).abs().mean() for each in (wanda, result)]
        # Under N:M a swap may prune a weight that makes the error larger.
        assert lost[1] < lost[0] or ":" in pattern
    assert changed > 20


def test_each_method_loses_less_than_the_one_that_knows_less() -> None:
    weight, inputs = problem()
    moment = inputs.square().sum(1)
    results = (
        prune_sparsegpt(weight, inputs @ inputs.T),
        prune_wanda(weight, moment),
        prune_magnitude(weight, moment),
    )
    errors = [float(((weight - result.sparse) @ inputs).norm()) for result in results]
    assert errors == sorted(errors) and errors[0] < 0.95 * errors[1] < 0.9 * errors[2]


@pytest.mark.parametrize("method", PRUNING)
def test_dtypes_and_bad_arguments(method) -> None:
    weight, inputs = problem()
    prune, statistic = {
        "magnitude": (prune_magnitude, inputs.square().sum(1)),
        "wanda": (prune_wanda, inputs.square().sum(1)),
        "sparsegpt": (prune_sparsegpt, inputs @ inputs.T),
        "dsnot": (prune_dsnot, torch.stack([inputs.mean(1), inputs.var(1)])),
    }[method]
    before = weight.clone(), statistic.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        result = prune(weight.to(dtype), statistic)
        assert {result.sparse.dtype, result.low_rank_u.dtype, result.low_rank_v.dtype} == {dtype}
        assert result.to_dense().shape == weight.shape
    assert torch.equal(weight, before[0]) and torch.equal(statistic, before[1])
    assert prune(torch.zeros(4, D_IN), statistic).relative_error == 0
    with pytest.raises(WeightError, match="q_proj"):
        prune(weight, statistic[..., :-1], name="q_proj")
    with pytest.raises(WeightError, match=r"q_proj.*NaN"):
        prune(weight, statistic * float("nan"), name="q_proj")
    with pytest.raises(WeightError, match=r"q_proj.*NaN"):
        prune(weight * float("nan"), statistic, name="q_proj")
    with pytest.raises(ConfigError, match="compression"):
        prune(weight, statistic, compression=1.0)
    with pytest.raises(ConfigError, match="multiple of 5"):
        prune(weight, statistic, pattern="2:5", compression=0.6)
    with pytest.raises(ConfigError, match=r"what pattern 2:4 removes, 0\.5, got 0\.4"):
        prune(weight, statistic, pattern="2:4", compression=0.4)


def test_settings() -> None:
    for method in PRUNING:
        config = OatsConfig(method=method)
        assert config.rank_ratio == 0 == config.to_dict()["rank_ratio"]
        assert OatsConfig(**config.to_dict()) == config
        with pytest.raises(
            ConfigError, match=f"{method} has no low-rank part, .* rank_ratio must be 0, got 0.3"
        ):
            OatsConfig(method=method, rank_ratio=0.3)
        with pytest.raises(ConfigError, match=r"pattern 2:4 removes, 0\.5, got 0\.6"):
            OatsConfig(method=method, pattern="2:4", compression=0.6)


SIZES = dict(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
IDS = torch.randint(0, 61, (6, 24), generator=torch.Generator().manual_seed(1))


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize("method", PRUNING)
def test_a_model_is_pruned_saved_and_loaded(tmp_path, method) -> None:
    for pattern in ("row", "2:4"):
        model = llama()
        report = oats.compress_(model, IDS, OatsConfig(method=method, pattern=pattern))
        assert len(report.layers) == 14 and {layer.rank for layer in report.layers} == {0}
        assert report.parameters_after == report.parameters_before / 2
        model.save_pretrained(tmp_path / pattern)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / pattern)
        assert isinstance(loaded.model.layers[1].mlp.up_proj, SparseLowRankLinear)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert loaded.config.quantization_config.settings.method == method


def test_means_and_variances_count_the_tokens_of_the_mask() -> None:
    model = llama()
    mask = torch.ones_like(IDS)
    mask[:, 20:] = 0
    name = "model.layers.0.mlp.down_proj"
    linear, inputs = model.get_submodule(name), []
    handle = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        model(IDS, attention_mask=mask)
        handle.remove()
        batches = as_batches(
            model,
            [{"input_ids": i, "attention_mask": m} for i, m in zip(IDS.split(4), mask.split(4), strict=True)],
        )
        runner = BlockRunner(model, list(model.model.layers), batches)
        mean, variance = means_and_variances(runner, 0, {name: linear})[name]
    x = inputs[0][:, :20].reshape(-1, 80).double()
    terms = len(x) + terms_of(model)
    assert_equal_sums(mean, x.mean(0), terms, torch.float32)
    assert_equal_sums(variance, x.var(0, correction=0), terms, torch.float32)
