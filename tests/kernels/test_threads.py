"""One OpenMP pool with torch: its thread count is obeyed, and a forked child does not wait for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from oats.format.layer_spec import LayerSpec
from oats.kernels.keep_largest import keep_largest_in_rows
from oats.kernels.packing import pack, unpack
from oats.kernels.sparse_low_rank_linear import linear
from tests.conftest import random_layer, spec_of
from tests.kernels.test_kernels import assert_close

D_OUT, D_IN = 400, 700
SECONDS = 60


@pytest.fixture(scope="module")
def layer() -> dict[str, Tensor]:
    return random_layer(D_OUT, D_IN, 50, 0.4, torch.float32)


@pytest.fixture(scope="module")
def packed(layer: dict[str, Tensor]) -> Tensor:
    """Large enough that two threads share the work."""
    return pack(layer, spec_of(layer))


@pytest.fixture(scope="module")
def spec(layer: dict[str, Tensor]) -> LayerSpec:
    return spec_of(layer)


def start_the_pool() -> None:
    """Both torch's own regions and ours have run on two threads."""
    torch.set_num_threads(2)
    torch.randn(1000, 1000).exp_()
    keep_largest_in_rows(torch.randn(64, 200), 50)


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_any_thread_count_of_torch(
    layer: dict[str, Tensor], packed: Tensor, spec: LayerSpec, batch: int
) -> None:
    x = torch.randn(batch, D_IN)
    for threads in (2, 1, 2, 4, 1):
        torch.set_num_threads(threads)
        assert_close(linear(x, packed, None, spec), layer, x, None)
        kept = keep_largest_in_rows(x, 30)
        assert torch.equal(kept.count_nonzero(1), torch.full((batch,), 30))
        unpacked = unpack(pack(layer, spec), spec)
        assert all(torch.equal(unpacked[name], tensor) for name, tensor in layer.items())


_ONE_RUNTIME = """
import os, sys, torch
from oats.kernels.keep_largest import keep_largest_in_rows
from oats.kernels.packing import pack
from oats.kernels.sparse_low_rank_linear import linear
from tests.conftest import random_layer, spec_of

def threads():
    return len(os.listdir("/proc/self/task"))

layer = random_layer(400, 700, 50, 0.4, torch.float32)
torch.set_num_threads(3)
torch.randn(1000, 1000).exp_()
pool = threads()
spec = spec_of(layer)
packed = pack(layer, spec)
linear(torch.randn(1, 700), packed, None, spec)
linear(torch.randn(200, 700), packed, None, spec)
keep_largest_in_rows(torch.randn(64, 200), 50)
assert pool >= 3, f"torch has {pool} threads"
assert threads() == pool, f"oats started {threads() - pool} threads beside torch's"
names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
runtimes = sorted(n for n in names if os.path.basename(n).startswith(("libgomp", "libomp", "libiomp")))
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_one_openmp_runtime_and_one_pool_in_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ONE_RUNTIME], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr


def in_forked_child(work: Callable[[], bool]) -> None:
    """`work()` in a fork of this process returns True, before SECONDS have passed."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)
    for _ in range(SECONDS * 50):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the forked child ended with {status}"
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("batch", [1, 100])
def test_forked_child(layer: dict[str, Tensor], packed: Tensor, spec: LayerSpec, batch: int) -> None:
    x = torch.randn(batch, D_IN)
    start_the_pool()
    expected = linear(x, packed, None, spec)
    kept = keep_largest_in_rows(x, 30)

    def work() -> bool:
        return (
            torch.get_num_threads() == 2
            and torch.equal(linear(x, packed, None, spec), expected)
            and torch.equal(linear(x, pack(layer, spec), None, spec), expected)
            and torch.equal(keep_largest_in_rows(x, 30), kept)
            # torch's own regions too: a model is never made of our layers alone.
            and bool(torch.zeros(1000, 1000).exp_().eq(1).all())
        )

    in_forked_child(work)
    # The parent is as it was.
    assert torch.equal(linear(x, packed, None, spec), expected)
    in_forked_child(work)


class Products(Dataset[Tensor]):
    """Item i is the layer's output for row i, computed in the worker on `threads` threads."""

    def __init__(self, x: Tensor, packed: Tensor, spec: LayerSpec, threads: int | None) -> None:
        self.x, self.packed, self.spec, self.threads = x, packed, spec, threads

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        if self.threads:
            torch.set_num_threads(self.threads)
        return linear(self.x[i], self.packed, None, self.spec)


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [None, 2], ids=["torch's one thread", "two threads"])
def test_forked_data_loader_worker(packed: Tensor, spec: LayerSpec, threads: int | None) -> None:
    x = torch.randn(6, D_IN)
    start_the_pool()
    expected = torch.stack([linear(row, packed, None, spec) for row in x])
    loader = DataLoader(
        Products(x, packed, spec, threads),
        batch_size=2,
        num_workers=1,
        multiprocessing_context="fork",
        timeout=SECONDS,
        # Tensors would come through a socket in TMPDIR, which has no room for a long path.
        collate_fn=lambda rows: torch.stack(rows).numpy(),
    )
    assert torch.equal(torch.cat([torch.from_numpy(rows) for rows in loader]), expected)
