"""Tokens into text, one request after another, and `oats chat`."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from oats.engine import batch
from oats.errors import ConfigError, QueueFullError
from oats.serving.decoding import IncrementalDecoder
from oats.serving.request import Finished, Sampling
from oats.serving.request_queue import RequestQueue
from tests.tiny import CHAT_TEMPLATE, CONTEXT, byte_tokenizer, continuation, load, save_compressed, slow_queue

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compressed(tmp_path_factory.mktemp("models") / "small", CHAT_TEMPLATE)


# Text out of tokens.


def pieces(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], IncrementalDecoder]:
    decoder = IncrementalDecoder(byte_tokenizer(), stop)
    return [decoder.push(token) for token in ids] + [decoder.flush()], decoder


@pytest.mark.parametrize("text", ["plain", "Ähm, 語 🙂 é", "", " leading and  double"])
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
    found, _ = pieces(ids)
    assert "".join(found) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    # A character that is cut off at the end is shown for what it is.
    cut = byte_tokenizer()("語", add_special_tokens=False).input_ids[:2]
    assert "\N{REPLACEMENT CHARACTER}" in "".join(pieces(cut)[0])


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("stop",), "one two s"), (("two", "stop"), "one "), (("xyz",), "one two stop s"), (("s",), "one two ")],
)
def test_stop_strings_end_the_text_and_are_not_in_it(stop: tuple[str, ...], expected: str) -> None:
    text = "one two sstop s" if stop == ("stop",) else "one two stop s"
    ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
    found, decoder = pieces(ids, stop)
    assert "".join(found) == expected and decoder.stopped == (stop != ("xyz",))
    # Nothing is shown that has to be taken back.
    assert all(expected.startswith("".join(found[:n])) for n in range(len(found)))


# The queue.


@pytest.fixture(scope="module")
def queue(directory: Path) -> Iterator[RequestQueue]:
    queue = RequestQueue(*load(directory), max_waiting=4, max_batch=1)
    yield queue
    queue.close()


def collect(queue: RequestQueue, prompt: str, sampling: Sampling) -> tuple[str, Finished]:
    events, done = [], threading.Event()

    def deliver(event: Any) -> None:
        events.append(event)
        if not isinstance(event, str):
            done.set()

    queue.submit(queue.tokenizer(prompt).input_ids, sampling, deliver)
    assert done.wait(60)
    if isinstance(events[-1], Exception):
        raise events[-1]
    return "".join(events[:-1]), events[-1]


def test_the_engine_gives_what_generate_gives(queue: RequestQueue) -> None:
    text, finished = collect(queue, "The quick", Sampling(12, temperature=0))
    assert text == continuation(queue.model, queue.tokenizer, "The quick", 12)
    assert finished == Finished("length", 12)


def test_sampling_depends_on_the_seed_and_the_temperature(queue: RequestQueue) -> None:
    def sample(**settings: Any) -> str:
        return collect(queue, "a", Sampling(16, **settings))[0]

    assert (
        sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    )
    greedy = sample(temperature=0)
    assert sample(temperature=1e-4, seed=3) == sample(top_p=1e-6, seed=3) == greedy == sample()
    assert sample(temperature=1e-40) == greedy
    assert sample(temperature=2.0, seed=1) != greedy


def test_the_end_of_the_text_is_told_from_the_limit(queue: RequestQueue) -> None:
    ids = queue.tokenizer("The quick", return_tensors="pt").input_ids
    third = int(queue.model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    other = RequestQueue(queue.model, queue.tokenizer)
    other._ends = {third}
    _, finished = collect(other, "The quick", Sampling(12, temperature=0))
    other.close()
    assert finished.reason == "stop" and finished.tokens <= 3


def test_a_stop_string_ends_the_generation(queue: RequestQueue) -> None:
    whole = continuation(queue.model, queue.tokenizer, "The quick", 40)
    stop = whole[6:8]
    text, finished = collect(queue, "The quick", Sampling(40, temperature=0, stop=(stop,)))
    assert text == whole[: whole.index(stop)] and finished.reason == "stop" and finished.tokens < 40


def test_the_engine_refuses(queue: RequestQueue) -> None:
    with pytest.raises(
        ConfigError, match=f"3 tokens and {CONTEXT} more .* context is {CONTEXT} tokens; shorten"
    ):
        queue.submit([1, 2, 3], Sampling(CONTEXT), print)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        queue.submit([], Sampling(1), print)


def test_a_full_queue_and_cancelling(queue: RequestQueue) -> None:
    gate, events = threading.Event(), []
    first = queue.submit([1], Sampling(100, 0), lambda event: (gate.wait(30), events.append(event)))
    deadline = time.time() + 30
    while queue.waiting and time.time() < deadline:
        time.sleep(0.01)
    ends: list[Any] = []
    waiting = [queue.submit([1], Sampling(5, 0), ends.append) for _ in range(4)]
    with pytest.raises(QueueFullError, match="4 requests are waiting already"):
        queue.submit([1], Sampling(5, 0), print)
    first.cancel()
    for generation in waiting[:3]:
        generation.cancel()
    gate.set()
    while len([end for end in ends if isinstance(end, Finished)]) < 4 and time.time() < deadline:
        time.sleep(0.01)
    assert events[-1].reason == "cancelled" and events[-1].tokens < 100
    assert [end.reason for end in ends if isinstance(end, Finished)] == ["cancelled"] * 3 + ["length"]


# Several texts at once.


def collect_all(queue: RequestQueue, requests: list[tuple[list[int], Sampling]]) -> list[tuple[str, Any]]:
    """Text and end of each, all submitted before the first is finished."""
    events: list[list[Any]] = [[] for _ in requests]
    done = threading.Semaphore(0)

    def deliver(index: int, event: Any) -> None:
        events[index].append(event)
        if not isinstance(event, str):
            done.release()

    for index, (ids, sampling) in enumerate(requests):
        queue.submit(ids, sampling, functools.partial(deliver, index))
    assert all(done.acquire(timeout=60) for _ in requests)
    return [("".join(found[:-1]), found[-1]) for found in events]


def tiny_gemma() -> Gemma3ForCausalLM:
    """Layers with a window of 8 tokens and one without."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], eos_token_id=9999,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """The engine does not know it: one request at a time."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        eos_token_id=9999,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_texts_of_a_batch_are_what_each_is_alone(
    kind: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = {"gemma": tiny_gemma, "gpt2": tiny_gpt2}
    model = makers[kind]() if kind in makers else load(directory)[0]
    model.generation_config.repetition_penalty = 1.3  # depends on all tokens so far
    monkeypatch.setattr(batch, "CHUNK", 7)  # prompts come in pieces, between which the others go on
    torch.manual_seed(1)
    lengths = [(3, 40), (50, 12), (7, 5), (20, 30), (1, 25)]  # of prompt and output
    prompts = [torch.randint(2, 258, (1, length)) for length, _ in lengths]
    queue = RequestQueue(model, byte_tokenizer(), max_batch=3)
    try:
        found = collect_all(
            queue,
            [
                (ids[0].tolist(), Sampling(tokens, temperature=0))
                for ids, (_, tokens) in zip(prompts, lengths, strict=True)
            ],
        )
    finally:
        queue.close()
    for ids, (length, tokens), (text, end) in zip(prompts, lengths, found, strict=True):
        output = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, length:]
        assert text == byte_tokenizer().decode(output, skip_special_tokens=True)
        assert end == Finished("length", tokens)


def test_a_seed_gives_the_same_text_whoever_else_is_there(directory: Path) -> None:
    queue = RequestQueue(*load(directory), max_batch=4)
    try:
        wanted = Sampling(20, temperature=1.0, seed=5)
        alone = collect_all(queue, [([1, 70, 80], wanted)])[0]
        others = [([5] * n, Sampling(15, temperature=t)) for n, t in ((9, 1.0), (2, 0))]
        assert collect_all(queue, [*others, ([1, 70, 80], wanted)])[2] == alone
    finally:
        queue.close()


def test_a_short_request_does_not_wait_for_a_long_one_and_a_cancelled_one_makes_room(directory: Path) -> None:
    queue = RequestQueue(*load(directory), max_batch=2)
    ends: list[str] = []
    done = threading.Semaphore(0)
    started = threading.Semaphore(0)

    def deliver(name: str, event: Any) -> None:
        if isinstance(event, str):
            started.release()
            return
        ends.append(f"{name} {event.reason}")
        done.release()

    try:
        long = queue.submit([1], Sampling(120, 0), functools.partial(deliver, "long"))
        assert started.acquire(timeout=30)
        queue.submit([1, 2], Sampling(3, 0), functools.partial(deliver, "short"))
        assert done.acquire(timeout=30) and ends == ["short length"]
        queue.submit([1, 2, 3], Sampling(110, 0), functools.partial(deliver, "second"))
        queue.submit([1, 2], Sampling(2, 0), functools.partial(deliver, "third"))
        long.cancel()
        assert all(done.acquire(timeout=30) for _ in range(3))
        assert ends[1:] == ["long cancelled", "third length", "second length"]
        assert queue.running == queue.waiting == 0
    finally:
        queue.close()


def test_a_model_with_a_recurrent_state_takes_one_request_at_a_time() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=258, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0, eos_token_id=9999
    )
    model = MambaForCausalLM(config).eval()
    queue = RequestQueue(model, byte_tokenizer(), max_batch=4)
    try:
        assert queue.max_batch == 1
        requests = [([5, 6, 7], Sampling(6, 0)), ([9], Sampling(4, 0))]
        for (ids, sampling), (text, end) in zip(requests, collect_all(queue, requests), strict=True):
            output = model.generate(torch.tensor([ids]), max_new_tokens=sampling.max_tokens, do_sample=False)
            assert text == byte_tokenizer().decode(output[0, len(ids) :], skip_special_tokens=True)
            assert end == Finished("length", sampling.max_tokens)
    finally:
        queue.close()


def test_closing_ends_what_runs_and_what_waits(directory: Path) -> None:
    queue = RequestQueue(*load(directory), max_batch=2)
    ends: list[Any] = []
    for _ in range(5):
        queue.submit([1], Sampling(120, 0), lambda event: isinstance(event, str) or ends.append(event))
    queue.close()
    assert [end.reason for end in ends] == ["cancelled"] * 5 and not queue.alive
    with pytest.raises(QueueFullError, match="stopping"):
        queue.submit([1], Sampling(1), print)


# oats chat.


def talk(directory: Path, lines: str, *options: str) -> Any:
    from typer.testing import CliRunner

    from oats.cli import app

    return CliRunner().invoke(app, ["chat", str(directory), "--max-new-tokens", "8", *options], input=lines)


def test_chat_in_the_terminal(directory: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )

    def answer(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    first = answer(("user", "Hi"))
    second = answer(("user", "Hi"), ("assistant", first), ("user", "More"))
    result = talk(directory, "Hi\n\nMore\n/reset\nHi\n/what\n/exit\nnever\n", "--temperature", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(first) >= 2 and second in result.stdout
    assert result.stderr.count("/reset forgets") == 2  # at the start and after /what
    with_system = talk(directory, "Hi\n", "--temperature", "0", "--system", "be brief")
    assert answer(("system", "be brief"), ("user", "Hi")) in with_system.stdout


def test_chat_says_when_the_conversation_is_too_long(directory: Path) -> None:
    result = talk(directory, "x" * 200 + "\nHi\n", "--temperature", "0")
    assert result.exit_code == 0 and "context is 128 tokens" in result.stderr
    assert result.stdout.strip()


def test_chat_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    base = save_compressed(tmp_path / "base")
    result = talk(base, "Hi\n")
    assert (
        result.exit_code == 1 and "has no chat template" in result.stderr and "oats generate" in result.stderr
    )
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    assert talk(base, "Hi\n", "--chat-template", str(tmp_path / "template.jinja")).exit_code == 0
    assert "cannot read the chat template" in talk(base, "", "--chat-template", str(tmp_path / "no")).stderr


def test_serving_without_its_packages_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from oats.cli import app

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["serve", str(directory)])
    assert result.exit_code == 1
    assert result.stderr == (
        "oats: error: serving needs more packages (uvicorn is missing): pip install 'oats-torch[serve]'\n"
    )


def test_ctrl_c_stops_an_answer_and_not_the_chat(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from oats.cli.chat import _answer

    queue = slow_queue(*load(directory))
    turns = [{"role": "user", "content": "Hi"}]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    # A shell that starts tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        text = _answer(queue, turns, Sampling(90, temperature=0))
        assert capsys.readouterr().out == f"{text} [stopped]\n"
        assert _answer(queue, turns, Sampling(3, temperature=0))
        whole = _answer(queue, turns, Sampling(30, temperature=0))
        assert text and (whole.startswith(text) or text.startswith(whole))
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
        queue.close()
