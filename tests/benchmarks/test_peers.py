"""The benchmarks' peers: the protocol, with small workers, and each peer that is installed."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from oats import OatsConfig
from oats.bench import contenders
from oats.bench.contenders import compressed
from oats.bench.layer_latency import layer_rows
from oats.bench.random_layer import RandomWeight, Reference, random_input
from oats.bench.shapes import LayerShape
from tests.scripts import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

from process import PeerError, PeerProcess
from run import main, peer_kinds, start_peers

ENVIRONMENTS = BENCHMARKS.parent / ".bench"
KINDS = peer_kinds(ENVIRONMENTS, os.environ.get("SPARAMX"))


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(contenders, "_CYCLED_BYTES", 1_000_000)
    monkeypatch.setattr(contenders, "_last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr("oats.bench.layer_latency.read_time", lambda: lambda: 40.0)


def worker(tmp_path, body, **options):
    """A peer whose `calls` and so on are given as the body of a class."""
    script = tmp_path / "peer.py"
    script.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n"
        "from worker import Peer, serve\n"
        "class Test(Peer):\n"
        "    version = '1.0'\n"
        "    def size(self, weight): return weight.nbytes\n"
        "    def load(self, weight, factors, copies, threads):\n"
        "        self._weight = weight\n"
        "        return weight.nbytes\n" + "".join(f"    {line}\n" for line in body) + "serve(Test())\n"
    )
    return PeerProcess("test", [sys.executable, str(script)], stored_dtype="fp32", form="dense", **options)


NUMPY = ["def calls(self, x): return [lambda: x @ self._weight.T]"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.name} {kind.stored_dtype} {kind.form}")
def test_every_peer_that_is_installed_computes_the_layer(kind):
    left_out = []
    peers = start_peers([kind], ENVIRONMENTS, [1, 5], left_out)
    if not peers:
        pytest.skip(left_out[0].reason)
    (peer,) = peers
    try:
        config = OatsConfig(dtype=peer.dtype)
        weight = RandomWeight.make(kind.form, 64, 256, config)
        loaded = peer.load(weight)
        assert loaded.copies >= 2
        for batch in (1, 5):
            x = random_input(weight, batch)
            y = peer.output(x)
            assert y.shape == (batch, 64)
            assert Reference.of(weight, x).error(y) <= peer.tolerance
            assert all(ms > 0 for ms in peer.time(3, 1)) and len(peer.time(3, 1)) == 3
    finally:
        peer.close()


def test_a_peer_is_timed_beside_ours_and_stopped_in_between(tmp_path):
    peer = worker(tmp_path, ["most_copies = 3", *NUMPY], batches=[1])
    try:
        config = OatsConfig(compression=0.5)
        rows = list(
            layer_rows(
                LayerShape("64 x 64", 64, 64), [1, 2], config, [compressed("fp32")], [peer],
                repetitions=3, seconds=0.01,
            )
        )  # fmt: skip
        assert [(row.batch, row.peer.label, row.peer.version, row.peer.copies) for row in rows] == [
            (1, "test fp32 dense", "1.0", 3)
        ]
        state = Path(f"/proc/{peer._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        assert state == "T"
    finally:
        peer.close()


def test_what_a_library_prints_does_not_disturb_the_protocol(tmp_path):
    peer = worker(tmp_path, ["def calls(self, x):", "    os.system('echo hello')", "    print('hello')", *[
        f"    return {NUMPY[0].split('return ')[1]}"]])  # fmt: skip
    weight = RandomWeight.make("dense", 8, 8, OatsConfig(dtype="fp32"))
    x = random_input(weight, 2)
    try:
        peer.load(weight)
        torch.testing.assert_close(peer.output(x), x @ weight.sparse.T)
    finally:
        peer.close()


def test_an_error_of_a_peer_is_its_message_and_the_peer_goes_on(tmp_path):
    body = ["def calls(self, x):", "    if len(x) > 1: raise ValueError('one row only')"]
    peer = worker(tmp_path, [*body, f"    return {NUMPY[0].split('return ')[1]}"])
    weight = RandomWeight.make("dense", 8, 8, OatsConfig(dtype="fp32"))
    try:
        peer.load(weight)
        with pytest.raises(PeerError, match="test: ValueError: one row only"):
            peer.output(random_input(weight, 2))
        assert peer.output(random_input(weight, 1)).shape == (1, 8)
    finally:
        peer.close()


def test_a_peer_that_dies_says_why_and_is_started_again_for_the_next_layer(tmp_path):
    body = ["def calls(self, x):", "    print('Assertion at planner', flush=True)", "    os._exit(3)"]
    peer = worker(tmp_path, body)
    weight = RandomWeight.make("dense", 8, 8, OatsConfig(dtype="fp32"))
    try:
        peer.load(weight)
        with pytest.raises(PeerError, match="test ended: Assertion at planner"):
            peer.output(random_input(weight, 1))
        with pytest.raises(PeerError, match="test has ended before"):
            peer.output(random_input(weight, 1))
        assert peer.load(weight).copies >= 1
    finally:
        peer.close()


def test_a_peer_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("process._PATIENCE_SECONDS", 1.0)
    peer = worker(tmp_path, ["def calls(self, x): time.sleep(60)"])
    pid = peer._process.pid
    weight = RandomWeight.make("dense", 8, 8, OatsConfig(dtype="fp32"))
    try:
        peer.load(weight)
        with pytest.raises(PeerError, match="did not answer for 1 s"):
            peer.output(random_input(weight, 1))
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        peer.close()


def test_a_worker_ends_with_its_parent(tmp_path):
    code = (
        f"import sys, time; sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]\n"
        "from process import PeerProcess\n"
        f"peer = PeerProcess('test', [sys.executable, {str(tmp_path / 'peer.py')!r}], stored_dtype='fp32',"
        " form='dense')\n"
        "print(peer._process.pid, flush=True); time.sleep(60)"
    )
    worker(tmp_path, NUMPY).close()
    import subprocess

    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_a_peer_that_is_not_installed_is_said_to_be(tmp_path, capsys):
    options = ["--out", str(tmp_path / "out"), "--environments", str(tmp_path), "--shapes", "64x64"]
    options += ["--batches", "1", "--repetitions", "2", "--no-plot", "--only", "deepsparse"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "- DeepSparse fp32 (everywhere): not installed; make bench-peers installs it" in printed
    assert "torch bf16 dense" in printed
    assert (tmp_path / "out/table.md").read_text() in printed and (tmp_path / "out/rows.json").exists()
    assert main(options) == 1
    assert "table.md exists; give another directory" in capsys.readouterr().err


def test_a_run_that_fails_keeps_what_it_measured(tmp_path, capsys, monkeypatch):
    forward = torch.nn.Linear.forward

    def interrupted(self, x):
        if len(x) > 1:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", interrupted)
    options = ["--out", str(tmp_path / "out"), "--shapes", "64x64", "--batches", "1,2", "--repetitions", "2"]
    assert main([*options, "--no-plot", "--no-peers"]) == 1
    printed = capsys.readouterr()
    assert "error: interrupted" in printed.err and "torch bf16 dense" in printed.out
    assert '"failure": "interrupted"' in (tmp_path / "out/rows.json").read_text()
