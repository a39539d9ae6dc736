"""A process that has used an engine forks, and the child uses it too."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from oats.engine.engine import Engine
from tests.tiny import llama

SECONDS = 60


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_gives_the_same_texts(threads: int) -> None:
    torch.set_num_threads(2)
    engine = Engine(llama())
    expected = engine.generate([list(range(2, 40))], 20)
    child = os.fork()
    if child == 0:
        same = False
        try:
            torch.set_num_threads(threads)
            engine.forget()
            same = engine.generate([list(range(2, 40))], 20) == expected
        finally:
            os._exit(0 if same else 1)
    for _ in range(SECONDS * 50):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"the forked child ended with {status}"
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert engine.generate([list(range(2, 40))], 20) == expected
