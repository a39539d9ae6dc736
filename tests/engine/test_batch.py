"""Texts that join and leave, the share of each in a step, and beginnings that texts share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from oats.engine import batch as batches
from oats.engine.batch import CHUNK, share_out
from oats.engine.cache import PAGE
from oats.engine.engine import Engine, most_likely
from oats.engine.prefixes import Prefixes
from tests.engine.test_engine import expected_logits, model_of, text


@pytest.fixture(scope="module")
def whole() -> Engine:
    """Every token sees all before it."""
    return Engine(model_of("llama"))


@pytest.fixture
def engine(whole: Engine) -> Iterator[Engine]:
    whole.forget()
    yield whole
    whole.forget()
    assert whole._cache.nbytes == 0


def test_a_short_prompt_does_not_wait_for_long_ones_and_the_oldest_always_moves() -> None:
    parts = share_out([5000, 10, 7000, 1, 1])
    assert parts[1] == 10 and parts[3:] == [1, 1] and sum(parts) == CHUNK + 2
    pending, steps = [5000, 300], 0
    while pending[0] > 1:  # there is always another short one
        pending = [pending[0] - share_out([*pending, 300])[0], 300]
        steps += 1
    assert steps <= 5000 / (CHUNK // 3)


def test_a_text_joins_while_another_is_in_the_middle_of_its_prompt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "CHUNK", 40)
    expected = [engine.generate([prompt], 6)[0] for prompt in (text(300, 1), text(5, 2))]
    engine.forget()
    batch = engine.batch()
    long = batch.add(text(300, 1))
    assert batch.step() == []
    short = batch.add(text(5, 2))
    first = []
    while batch.texts:
        for running, logits in batch.step():
            first.append(running)
            running.output.append(most_likely(logits))
            if len(running.output) == 6:
                batch.remove(running)
    assert first[0] is short and [long.output, short.output] == expected


def test_tokens_are_told_as_they_come(engine: Engine) -> None:
    seen: list[list[int]] = [[], []]
    outputs = engine.generate([text(4), text(9)], 5, on_token=lambda index, token: seen[index].append(token))
    assert seen == outputs


def test_a_removed_text_gives_its_memory_back(engine: Engine) -> None:
    batch = engine.batch()
    kept, gone = batch.add(text(100, 1)), batch.add(text(100, 2))
    batch.step()
    batch.remove(gone)
    engine.forget()
    assert engine._cache.pools[0].in_use == 2 and batch.texts == [kept]
    batch.remove(kept)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_common_beginning_is_computed_once_and_changes_no_token(name: str) -> None:
    engine = Engine(model_of(name))
    start = text(2 * PAGE + 9, 1)
    prompts = [start + text(20, seed) for seed in (2, 3)]
    alone = []
    for prompt in prompts:
        alone.append(engine.generate([prompt], 20)[0])
        engine.forget()
    before = engine.statistics.prompt_tokens
    assert [engine.generate([prompt], 20)[0] for prompt in prompts] == alone
    shared, computed = engine.statistics.shared_tokens, engine.statistics.prompt_tokens - before
    assert shared + computed == sum(map(len, prompts))
    assert shared >= len(start)
    # The next turn of a conversation begins where the last one ended, whatever the window.
    turn = prompts[1] + alone[1] + text(5, 4)
    expected = Engine(model_of(name)).generate([turn], 10)
    before = engine.statistics.shared_tokens
    assert engine.generate([turn], 10) == expected
    assert engine.statistics.shared_tokens - before >= len(prompts[1]) + 19


def test_what_left_the_window_of_a_layer_is_computed_again() -> None:
    engine = Engine(model_of("gemma3"))
    outputs = [engine.generate([text(PAGE)], 2 * PAGE) for _ in range(2)]
    assert outputs[0] == outputs[1] and engine.statistics.shared_tokens == 0


def test_the_same_prompt_again_computes_its_last_token(engine: Engine) -> None:
    first = engine.generate([text(50)], 8)
    before = engine.statistics.prompt_tokens
    assert engine.generate([text(50)], 8) == first and engine.statistics.prompt_tokens == before


def test_kept_texts_are_few_and_bounded_in_bytes(engine: Engine) -> None:
    page = engine._cache.pools[0].pages[0].nbytes
    for count, pages in ((3, 1000), (1000, 4)):
        prefixes = Prefixes(engine._cache, count, pages * page)
        for seed in range(10):
            tokens = engine.new()
            ids = text(PAGE + 5, seed)
            engine.prefill(tokens, ids)
            prefixes.keep(ids, tokens)
            assert len(prefixes._kept) <= count and prefixes.nbytes <= pages * page
        assert engine._cache.pools[0].in_use == min(2 * count, pages)
        assert [entry[0] for entry in prefixes._kept][-1] == text(PAGE + 5, 9)
        prefixes.clear()


def test_statistics(engine: Engine) -> None:
    before = engine.statistics.new_tokens, engine.statistics.decoded_tokens
    engine.generate([text(30, 1), text(40, 2)], 5)
    assert engine.statistics.new_tokens - before[0] == 10
    assert engine.statistics.decoded_tokens - before[1] == 8
    assert engine.statistics.prefill_rate > 0 and engine.statistics.decode_rate > 0
    assert 0 < engine.statistics.cache_bytes <= engine.statistics.most_cache_bytes


def test_logits_of_a_text_and_of_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = text(150)
    expected = expected_logits(model_of("llama"), ids)
    monkeypatch.setattr("oats.engine.engine.CHUNK", 64)
    for keep in (None, 150, 100, 64, 1):
        got = engine.logits(ids, keep)
        assert (got - expected[-(keep or 150) :]).norm() <= 1e-5 * expected.norm()
    with pytest.raises(Exception, match="logits of 4 tokens were asked for, of a text of 3"):
        engine.logits(ids[:3], 4)


def test_pieces_before_the_last_compute_no_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CHUNK", 40)
    rows: list[int] = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda work, wanted: rows.append(len(wanted)) or run(work, wanted))
    engine.generate([text(100)], 3)
    assert rows == [0, 0, 1, 1, 1]
    assert torch.isfinite(engine.logits(text(3))).all()
