"""Several processes compress one model: what one process makes of it, but for the order of summation."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oats.compression.distributed import Ranks
from tests.checkpoint.test_streaming import child, command, content, dense, killed_at_rename, text, wait  # noqa: F401

transformers = pytest.importorskip("transformers")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(arguments, directory: Path, size: int = 2, before=lambda rank: lambda: None) -> list[int]:
    """Start forked processes that find each other as those of torchrun do; their logs are `rank<n>`."""
    port = free_port()

    def environment(rank: int):
        def enter() -> None:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            torch.set_num_threads(1)
            before(rank)()

        return enter

    return [child(arguments, directory / f"rank{rank}", environment(rank)) for rank in range(size)]


def assert_close(first: Path, second: Path) -> None:
    """Two compressed models compute the same, but for rounding that was summed in another order."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (first, second)]
    tokens = torch.arange(26)[None]
    with torch.no_grad():
        ours, theirs = (model(tokens).logits for model in models)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    tables = [model.config.quantization_config.to_dict()["layers"] for model in models]
    assert tables[0] == tables[1]


def options(*more):
    # Several batches: they are what is shared.
    return ["--samples", 16, "--length", 24, *more]


@pytest.mark.parametrize(
    "more",
    [[], ["--method", "oats-hessian", "--match-blocks", 1, "--budget", "error"]],
    ids=["published", "hessian, matched, by error"],
)
def test_two_processes_make_what_one_makes(dense, text, tmp_path, monkeypatch, more) -> None:  # noqa: F811
    for module in ("oats.compression.compress", "oats.checkpoint.streaming"):
        monkeypatch.setattr(f"{module}.tokens_per_batch", lambda config: 48)
    arguments = [*command(dense, tmp_path / "out", text), *options(*more)]
    pids = start(arguments, tmp_path)
    assert [wait(pid) for pid in pids] == [0, 0], [(tmp_path / f"rank{r}").read_text() for r in (0, 1)]
    assert "compressed in" in (tmp_path / "rank0").read_text() and (tmp_path / "rank1").read_text() == ""
    one = [*command(dense, tmp_path / "one", text), *options(*more)]
    assert wait(child(one, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert content(tmp_path / "out").keys() == content(tmp_path / "one").keys()
    assert_close(tmp_path / "out", tmp_path / "one")


def test_a_rank_that_dies_ends_the_run_and_one_process_goes_on(dense, text, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("oats.checkpoint.streaming.tokens_per_batch", lambda config: 48)
    out = tmp_path / "out"
    arguments = [*command(dense, out, text), *options()]
    # Each rank writes hidden states of four batches a block: it dies in the second block.
    pids = start(arguments, tmp_path, before=lambda rank: killed_at_rename(6) if rank == 1 else lambda: None)
    assert [wait(pid) for pid in pids] == [1, -signal.SIGKILL]
    message = (tmp_path / "rank0").read_text()
    assert "rank 0 of 2: another rank has ended" in message and "Traceback" not in message
    assert wait(child(arguments, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert wait(child([*command(dense, tmp_path / "one", text), *options()], tmp_path / "log")) == 0
    assert_close(out, tmp_path / "one")


def test_an_error_of_one_rank_ends_the_others(dense, text, tmp_path) -> None:  # noqa: F811
    # One batch for two ranks.
    pids = start(command(dense, tmp_path / "out", text), tmp_path)
    assert [wait(pid) for pid in pids] == [1, 1]
    assert "2 ranks share 1 calibration batches; start at most 1" in (tmp_path / "rank0").read_text()
    assert not (tmp_path / "out").exists()


def test_two_hosts_meet_by_rendezvous(dense, text, tmp_path) -> None:  # noqa: F811
    """torchrun twice, as on two machines; both find the rendezvous on the loopback interface."""
    out, port = tmp_path / "out", free_port()
    arguments = [*command(dense, out, text), "--samples", 5, "--length", 1000]
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "oats",
                "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "oats", *map(str, arguments),
            ],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("compressed in" in stdout for stdout, _ in outputs) == 1
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(out)(torch.arange(26)[None]).logits.isfinite().all()
    )


def test_the_costliest_matrices_are_spread_first() -> None:
    owners = Ranks(0, 3).owners({"q": 4, "k": 1, "v": 1, "o": 4, "gate": 9, "up": 9, "down": 9})
    loads = [0, 0, 0]
    for name, rank in owners.items():
        loads[rank] += {"q": 4, "k": 1, "v": 1, "o": 4}.get(name, 9)
    assert sorted(loads) == [11, 13, 13]
