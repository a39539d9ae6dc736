"""Tokens into text, one request after another, and `oats chat`."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from oats.errors import ConfigError, QueueFullError
from oats.serving.decoding import IncrementalDecoder
from oats.serving.engine import Engine, Finished, Sampling
from tests.tiny import CHAT_TEMPLATE, CONTEXT, byte_tokenizer, continuation, load, save_compressed

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


# The engine.


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Engine]:
    engine = Engine(*load(directory), max_waiting=4)
    yield engine
    engine.close()


def collect(engine: Engine, prompt: str, sampling: Sampling) -> tuple[str, Finished]:
    events, done = [], threading.Event()

    def deliver(event: Any) -> None:
        events.append(event)
        if not isinstance(event, str):
            done.set()

    engine.submit(engine.tokenizer(prompt).input_ids, sampling, deliver)
    assert done.wait(60)
    if isinstance(events[-1], Exception):
        raise events[-1]
    return "".join(events[:-1]), events[-1]


def test_the_engine_gives_what_generate_gives(engine: Engine) -> None:
    text, finished = collect(engine, "The quick", Sampling(12, temperature=0))
    assert text == continuation(engine.model, engine.tokenizer, "The quick", 12)
    assert finished == Finished("length", 12)


def test_sampling_depends_on_the_seed_and_the_temperature(engine: Engine) -> None:
    def sample(**settings: Any) -> str:
        return collect(engine, "a", Sampling(16, **settings))[0]

    assert (
        sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)
    )
    greedy = sample(temperature=0)
    assert sample(temperature=1e-4, seed=3) == sample(top_p=1e-6, seed=3) == greedy == sample()
    assert sample(temperature=1e-40) == greedy
    assert sample(temperature=2.0, seed=1) != greedy


def test_the_end_of_the_text_is_told_from_the_limit(engine: Engine) -> None:
    ids = engine.tokenizer("The quick", return_tensors="pt").input_ids
    third = int(engine.model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    other = Engine(engine.model, engine.tokenizer)
    other._ends = {third}
    _, finished = collect(other, "The quick", Sampling(12, temperature=0))
    other.close()
    assert finished.reason == "stop" and finished.tokens <= 3


def test_a_stop_string_ends_the_generation(engine: Engine) -> None:
    whole = continuation(engine.model, engine.tokenizer, "The quick", 40)
    stop = whole[6:8]
    text, finished = collect(engine, "The quick", Sampling(40, temperature=0, stop=(stop,)))
    assert text == whole[: whole.index(stop)] and finished.reason == "stop" and finished.tokens < 40


def test_the_engine_refuses(engine: Engine) -> None:
    with pytest.raises(
        ConfigError, match=f"3 tokens and {CONTEXT} more .* context is {CONTEXT} tokens; shorten"
    ):
        engine.submit([1, 2, 3], Sampling(CONTEXT), print)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        engine.submit([], Sampling(1), print)


def test_a_full_queue_and_cancelling(engine: Engine) -> None:
    gate, events = threading.Event(), []
    first = engine.submit([1], Sampling(100, 0), lambda event: (gate.wait(30), events.append(event)))
    deadline = time.time() + 30
    while engine.waiting and time.time() < deadline:
        time.sleep(0.01)
    ends: list[Any] = []
    waiting = [engine.submit([1], Sampling(5, 0), ends.append) for _ in range(4)]
    with pytest.raises(QueueFullError, match="4 requests are waiting already"):
        engine.submit([1], Sampling(5, 0), print)
    first.cancel()
    for generation in waiting[:3]:
        generation.cancel()
    gate.set()
    while len([end for end in ends if isinstance(end, Finished)]) < 4 and time.time() < deadline:
        time.sleep(0.01)
    assert events[-1].reason == "cancelled" and events[-1].tokens < 100
    assert [end.reason for end in ends if isinstance(end, Finished)] == ["cancelled"] * 3 + ["length"]


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
    assert result.exit_code == 0 and re.search(r"context is\s+128\s+tokens", result.stderr)
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

    model, tokenizer = load(directory)
    original = model.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return original(*arguments, **options)

    model.forward = forward
    engine = Engine(model, tokenizer)
    turns = [{"role": "user", "content": "Hi"}]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        text = _answer(engine, turns, Sampling(90, temperature=0))
        assert capsys.readouterr().out == f"{text} [stopped]\n"
        assert _answer(engine, turns, Sampling(3, temperature=0))
        whole = _answer(engine, turns, Sampling(30, temperature=0))
        assert text and (whole.startswith(text) or text.startswith(whole))
    finally:
        timer.cancel()
        engine.close()
