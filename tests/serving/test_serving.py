"""`oats serve`, asked by the real client of OpenAI."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from oats.serving.request_queue import RequestQueue
from tests.tiny import CHAT_TEMPLATE, CONTEXT, continuation, load, save_compressed, slow_queue

openai = pytest.importorskip(
    "openai", reason="the openai client is not installed: pip install 'oats-torch[dev]'"
)
uvicorn = pytest.importorskip(
    "uvicorn", reason="the server is not installed: pip install 'oats-torch[serve]'"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compressed(tmp_path_factory.mktemp("models") / "small", CHAT_TEMPLATE)


class Served:
    def __init__(self, queue: RequestQueue) -> None:
        from oats.serving.openai_api.app import build_app

        self.queue = queue
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(
            build_app(self.queue, "small"), log_level="error", timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.queue.close()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def served(directory: Path) -> Iterator[Served]:
    served = Served(RequestQueue(*load(directory), max_batch=4))
    yield served
    served.close()


MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hi"}]
PROMPT = "system: be brief\nuser: Hi\nassistant: "


def chat(served: Served, **options: Any) -> Any:
    settings = {"model": "small", "messages": MESSAGES, "max_tokens": 10, "temperature": 0, **options}
    return served.client.chat.completions.create(**settings)


def complete(served: Served, prompt: Any = "The quick", **options: Any) -> Any:
    settings = {"model": "small", "max_tokens": 10, "temperature": 0, **options}
    return served.client.completions.create(prompt=prompt, **settings)


def test_models_and_health(served: Served) -> None:
    (model,) = served.client.models.list().data
    assert model.id == "small" == served.client.models.retrieve("small").id
    assert json.loads(served.get("/health")) == {"status": "ok", "model": "small", "waiting": 0}


def test_completion(served: Served) -> None:
    wanted = continuation(served.queue.model, served.queue.tokenizer, "The quick", 10)
    result = complete(served)
    assert (result.choices[0].text, result.choices[0].finish_reason) == (wanted, "length")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (
        10,
        10,
        20,
    )
    ids = served.queue.tokenizer("The quick").input_ids
    assert all(complete(served, prompt).choices[0].text == wanted for prompt in (["The quick"], ids, [ids]))
    chunks = list(complete(served, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_chat(served: Served) -> None:
    wanted = continuation(served.queue.model, served.queue.tokenizer, PROMPT, 10)
    result = chat(served)
    # The template makes the text; the tokenizer puts its BOS in front of it, or not, as it is asked.
    ids = served.queue.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert result.usage.prompt_tokens == len(ids)
    if ids == served.queue.tokenizer(PROMPT).input_ids:
        assert result.choices[0].message.content == wanted
    assert result.choices[0].message.role == "assistant" and result.object == "chat.completion"
    parts = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert chat(served, messages=parts).choices[0].message.content == result.choices[0].message.content
    chunks = list(chat(served, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == result.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage == result.usage


def test_concurrent_requests_each_get_their_own_answer(served: Served) -> None:
    prompts = [f"{word} and" for word in ("one", "two", "three", "four", "five", "six")]
    wanted = [continuation(served.queue.model, served.queue.tokenizer, prompt, 10) for prompt in prompts]

    def ask(index: int) -> str:
        if index % 2:
            return complete(served, prompts[index]).choices[0].text
        return "".join(chunk.choices[0].text for chunk in complete(served, prompts[index], stream=True))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == wanted


def test_the_default_length_ends_with_the_context(served: Served) -> None:
    result = complete(served, "x" * 100, max_tokens=None)
    assert result.usage.total_tokens == CONTEXT and result.choices[0].finish_reason == "length"


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.fixture
def slow(directory: Path) -> Iterator[Served]:
    served = Served(slow_queue(*load(directory), max_waiting=1, max_batch=1))
    yield served
    served.close()


def test_a_cancelled_stream_stops_the_generation(slow: Served) -> None:
    stream = chat(slow, stream=True, max_tokens=90)
    assert next(iter(stream)).choices
    wait_for(lambda: slow.queue.running)
    stream.close()
    wait_for(lambda: not slow.queue.running, 3)  # 90 tokens take longer
    assert slow.metric("oats_cancelled_total") == 1 and slow.metric("oats_generated_tokens_total") < 60


def test_a_client_that_gives_up_waiting_stops_the_generation(slow: Served) -> None:
    with pytest.raises(openai.APITimeoutError):
        slow.client.with_options(timeout=0.5).completions.create(model="small", prompt="a", max_tokens=120)
    wait_for(lambda: not slow.queue.running, 4)
    wait_for(lambda: slow.metric("oats_cancelled_total") == 1, 3)


def test_more_requests_than_may_wait_are_told_to_come_back(slow: Served) -> None:
    streams = [complete(slow, stream=True, max_tokens=60)]
    wait_for(lambda: slow.queue.running and not slow.queue.waiting)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(complete, slow, "a", max_tokens=1)
        wait_for(lambda: slow.queue.waiting == 1)
        with pytest.raises(openai.InternalServerError, match="1 requests are waiting already") as raised:
            complete(slow)
        assert raised.value.status_code == 503 and raised.value.response.headers["retry-after"] == "1"
        streams[0].close()
        assert waiting.result().usage.completion_tokens == 1


def refused(served: Served, call: Any, status: int = 400, **options: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as raised:
        call(served, **options)
    assert raised.value.status_code == status
    assert raised.value.body["message"] and raised.value.body["type"] == "invalid_request_error"
    return raised.value


def test_an_over_long_prompt(served: Served) -> None:
    error = refused(served, complete, prompt="x" * 200)
    assert error.code == "context_length_exceeded"
    assert "the prompt has 201 tokens and 10 more" in str(error)
    refused(served, chat, messages=[{"role": "user", "content": "x" * 200}], stream=True)
    refused(served, complete, max_tokens=CONTEXT)
    assert complete(served).choices[0].text  # and it goes on


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1}, "temperature"), ({"temperature": 3}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"), ({"n": 2}, "n"), ({"logprobs": 3}, "logprobs"),
        ({"echo": True}, "echo"), ({"presence_penalty": 1}, "presence_penalty"),
        ({"logprobs": 0}, "logprobs"), ({"seed": 2**70}, "seed"),
        ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": [999]}, "prompt"), ({"prompt": []}, "prompt"),
    ],
)  # fmt: skip
def test_what_is_not_possible_or_not_implemented_is_said(served: Served, options: Any, param: str) -> None:
    error = refused(served, complete, **options)
    assert error.param == param


def test_what_changes_nothing_is_accepted(served: Served) -> None:
    wanted = complete(served).choices[0].text
    neutral = {"n": 1, "echo": False, "presence_penalty": 0, "logit_bias": {}, "user": "me"}
    assert complete(served, **neutral).choices[0].text == wanted
    chat(served, tools=[], response_format={"type": "text"}, tool_choice="none")


def test_other_kinds_of_messages(served: Served) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    assert "text only" in str(refused(served, chat, messages=[{"role": "user", "content": picture}]))
    assert "messages" in str(refused(served, chat, messages=[]))
    assert "response_format" in str(refused(served, chat, response_format={"type": "json_object"}))
    assert refused(served, chat, status=404, model="gpt-5").code == "model_not_found"


def post(served: Served, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(served.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not valid JSON"), (b"", "the body"), (b"[]", "the body"), (b"\xff\xfe", "the body"),
        (b'{"model": "small"}', "prompt: Field required"), (b'{"prompt": {"a": 1}}', "prompt"),
        (b'{"prompt": "a", "temperature": "warm"}', "temperature"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ],
)  # fmt: skip
def test_bad_json(served: Served, body: bytes, message: str) -> None:
    status, answer = post(served, "/v1/completions", body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert message in answer["error"]["message"]


def test_other_paths_and_methods(served: Served) -> None:
    assert post(served, "/v1/embeddings", b"{}")[0] == 404
    other = 'oats_requests_total{endpoint="other",status="404"}'
    before = served.metric(other)
    assert post(served, "/v1/audio", b"{}")[0] == 404
    assert post(served, "/v1/completions", b'{"model": "gpt-5", "prompt": "a"}')[0] == 404
    assert served.metric(other) == before + 1, "a model that is not here is no other path"
    status, answer = post(served, "/v1/models", b"{}")
    assert status == 405 and "POST /v1/models" in answer["error"]["message"]


def test_metrics(served: Served) -> None:
    label = 'oats_requests_total{endpoint="/v1/completions",status="200"}'
    names = ("oats_prompt_tokens_total", "oats_generated_tokens_total", "oats_request_seconds_count",
             "oats_time_to_first_token_seconds_count", label)  # fmt: skip
    before = [served.metric(name) for name in names]
    complete(served)
    list(complete(served, stream=True))
    after = [served.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [20, 20, 2, 2, 2]
    assert served.metric("oats_requests_waiting") == served.metric("oats_requests_running") == 0


def test_a_failure_of_the_model_is_an_error_and_the_server_goes_on(directory: Path) -> None:
    served = Served(RequestQueue(*load(directory)))
    native = served.queue.engine._native
    original = native.step
    native.step = lambda *_: (_ for _ in ()).throw(RuntimeError('it "broke"'))
    try:
        with pytest.raises(openai.InternalServerError, match='generation failed: it "broke"'):
            complete(served)
        with pytest.raises(openai.APIError, match="broke"):
            list(complete(served, stream=True))
        native.step = original
        assert complete(served).choices[0].text == continuation(
            served.queue.model, served.queue.tokenizer, "The quick", 10
        )
    finally:
        served.close()


def test_a_base_model_without_a_chat_template(tmp_path: Path) -> None:
    served = Served(RequestQueue(*load(save_compressed(tmp_path / "base"))))
    try:
        error = refused(served, chat)
        assert error.code == "no_chat_template" and "/v1/completions" in str(error)
        assert complete(served).choices[0].text
    finally:
        served.close()


def test_the_command_serves_until_it_is_interrupted(directory: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from oats.cli import app

    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{interruptible}\nfrom oats.cli import main; main()"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", directory, "--port", "0", "--name", "tiny"],
            stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def said(pattern: str) -> re.Match[str] | None:
        text = (tmp_path / "log").read_text()
        assert process.poll() is None, text
        return re.search(pattern, text)

    try:
        # Importing torch and transformers takes its time on a busy machine.
        wait_for(lambda: said("try: curl"), 120)
        url = said(r"tiny at (http://\S+/v1)")[1]
        client = openai.OpenAI(base_url=url, api_key="none", timeout=60)
        text = (
            client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5).choices[0].message
        )
        assert text.role == "assistant"
        taken = CliRunner().invoke(app, ["serve", str(directory), "--port", url.split(":")[2].split("/")[0]])
        assert taken.exit_code == 1 and "choose another with --host or --port" in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()


def test_the_port_is_taken_before_the_model_is_loaded() -> None:
    from oats.cli.serve import _listen
    from oats.errors import ConfigError

    with _listen("127.0.0.1", 0) as listening, pytest.raises(ConfigError, match="Address already in use"):
        _listen("127.0.0.1", listening.getsockname()[1])
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match="port must be 0 to 65535"):
            _listen("127.0.0.1", port)


def _answers(client: Any) -> bool:
    try:
        return bool(client.models.list().data)
    except openai.APIConnectionError:
        return False


def test_the_server_of_transformers_takes_a_compressed_model_too(directory: Path) -> None:
    pytest.importorskip("transformers.cli.serving", reason="this transformers has an earlier server")
    from transformers.cli.serve import Serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Serve(force_model=str(directory), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wait_for(lambda: _answers(client))
        answer = client.chat.completions.create(
            model=str(directory), messages=MESSAGES, max_tokens=5, temperature=0
        )
        model, tokenizer = load(directory)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        ids = tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer.choices[0].message.content == tokenizer.decode(output, skip_special_tokens=True)
    finally:
        server.kill_server()
