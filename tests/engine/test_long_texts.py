"""Rotary frequencies that depend on the length of a text, against transformers with its own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from oats.engine.engine import Engine  # noqa: E402
from tests.engine.test_engine import LONG, SIZES, WITH_HEAD_DIM, assert_close, model_of, text  # noqa: E402

ORIGINAL = 64
NEW = 12
# Weights so large that attention, and so the rotation, decides what comes next.
LARGE = {"initializer_range": 0.3}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
CONFIGS = {
    "longrope": lambda: transformers.Phi3Config(
        **SIZES, **LARGE, rope_parameters=LONG, original_max_position_embeddings=ORIGINAL
    ),
    "dynamic": lambda: transformers.LlamaConfig(
        **{**WITH_HEAD_DIM, **LARGE, "max_position_embeddings": ORIGINAL}, rope_parameters=DYNAMIC
    ),
}

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")


@torch.no_grad()
def expected_logits(model: Any, ids: list[int], prompt: int) -> Tensor:
    """Of the prompt's last token and of each one behind it."""
    cache = transformers.DynamicCache(config=model.config)
    pieces = [ids[:prompt], *([token] for token in ids[prompt:])]
    steps = [model(torch.tensor([piece]), past_key_values=cache).logits[0, -1] for piece in pieces]
    return torch.stack(steps)


# It stays short, ends at the border, crosses it while it grows, begins beyond it.
@pytest.mark.parametrize("prompt", [ORIGINAL - 20, ORIGINAL, ORIGINAL - 5, 150])
@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_transformers(
    name: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name_of_module in ("engine", "batch"):
        monkeypatch.setattr(f"oats.engine.{name_of_module}.CHUNK", 32)
    model = model_of(CONFIGS[name])
    engine, ids = Engine(model), text(prompt + NEW)
    assert engine.reason is None
    expected = expected_logits(model, ids, prompt)
    tokens = engine.new()
    got = [engine.prefill(tokens, ids[:prompt])]
    got += [engine.step([(tokens, [token])])[0] for token in ids[prompt:]]
    assert_close(torch.stack(got), expected, torch.float32)


def test_sequences_of_a_step_have_their_own_frequencies() -> None:
    engine = Engine(model_of(CONFIGS["longrope"]))
    texts, expected, together = [text(length, length) for length in (20, 200, ORIGINAL)], [], []
    for ids in texts:
        tokens = engine.new()
        engine.prefill(tokens, ids)
        together.append((tokens, [5]))
        alone = engine.fork(tokens)
        expected.append(engine.step([(alone, [5])])[0])
    torch.testing.assert_close(engine.step(together), torch.stack(expected))


def test_a_shorter_text_has_the_short_frequencies_again() -> None:
    engine, ids = Engine(model_of(CONFIGS["dynamic"])), text(100)
    tokens = engine.new()
    expected = engine.prefill(tokens, ids[:40])
    engine._cache.truncate(tokens, 0)
    engine.prefill(tokens, ids)
    engine._cache.truncate(tokens, 0)
    assert torch.equal(engine.prefill(tokens, ids[:40]), expected)


# transformers' generate() of Phi-3 computes a text again that grows beyond the border.
@pytest.mark.parametrize("prompt", [20, ORIGINAL, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_texts_are_those_of_transformers(
    name: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name_of_module in ("engine", "batch"):
        monkeypatch.setattr(f"oats.engine.{name_of_module}.CHUNK", 32)
    model, ids = model_of(CONFIGS[name]), text(prompt)
    engine = Engine(model)
    expected = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, prompt),
        max_new_tokens=60,
        do_sample=False,
        eos_token_id=None,
    )
    other = text(7)
    assert engine.generate([ids, other], 60)[0] == expected[0, prompt:].tolist()
    assert all(pool.in_use == 0 for pool in engine._cache.pools)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_share_a_beginning_only_below_the_border(name: str) -> None:
    model, ids = model_of(CONFIGS[name]), text(100)
    engine = Engine(model)
    for length in (40, 100, 90, 50):
        shared = engine.statistics.shared_tokens
        assert engine.generate([ids[:length]], 5) == Engine(model).generate([ids[:length]], 5)
        assert (engine.statistics.shared_tokens > shared) == (length == 50)
