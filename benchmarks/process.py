"""A peer in a process of its own, as a contender: the parent's side of the protocol in peers/worker.py."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oats.errors import OatsError
from oats.evaluate.contenders import TOLERANCES, Dtype, Loaded, cycled_bytes
from oats.evaluate.layer import Form, RandomWeight


class PeerError(OatsError):
    """A peer cannot be started, failed, or does not answer."""


# A peer compiles a layer for a batch in this time, or it is left out.
_PATIENCE_SECONDS = 120.0

# Of quantised weights: half a step of 8 or 4 bits in units of the weights' deviation, times the 6 deviations
# of the largest of millions of outputs.
_QUANTISED = {"q8_0": 2.0**-4, "q4_k": 0.75}


class PeerProcess:
    """A contender that lives in another process, with its own Python.

    Between requests the process is stopped (SIGSTOP), so that no thread of it spins while others are timed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        stored_dtype: str,
        form: Form,
        batches: Collection[int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the worker and wait for its greeting.

        Raises:
            PeerError: it does not start; the message ends with what it printed last.
        """
        self.name, self.form, self.stored_dtype, self.batches = name, form, stored_dtype, batches
        self.isa = ""
        self.dtype: Dtype = "fp32" if stored_dtype == "fp32" else "bf16"
        self.tolerance = {**TOLERANCES, **_QUANTISED}[stored_dtype]
        self._folder = tempfile.TemporaryDirectory(prefix="oats-bench-")
        self._log = Path(self._folder.name) / "log"
        self._pending = b""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        try:
            self.version = str(self._answer()["version"])
        except PeerError:
            self.close()
            raise

    def load(self, weight: RandomWeight) -> Loaded:
        """See `Contender`."""
        if weight.rank:
            raise PeerError(f"{self.name} takes no low-rank part")
        path = self._write("weight", weight.sparse)
        threads = torch.get_num_threads()
        answer = self._ask(do="load", weight=path, threads=threads, cycled_bytes=cycled_bytes())
        os.unlink(path)
        return Loaded(answer["weight_bytes"], answer["copies"])

    def output(self, x: Tensor) -> Tensor:
        """See `Contender`."""
        y = f"{self._folder.name}/y.npy"
        self._ask(do="output", x=self._write("x", x), y=y)
        return torch.from_numpy(np.load(y))

    def time(self, calls: int, warm_up: int) -> list[float]:
        """See `Contender`."""
        return list(self._ask(do="time", calls=calls, warm_up=warm_up)["ms"])

    def close(self) -> None:
        """End the process; it can be done again."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._folder.cleanup()

    def _write(self, name: str, tensor: Tensor) -> str:
        path = f"{self._folder.name}/{name}.npy"
        np.save(path, tensor.float().numpy())
        return path

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        if self._process.poll() is not None:
            raise PeerError(f"{self.name} has ended before")
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None
        answer = self._answer()
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        """The next line that the worker writes; it is stopped as soon as that is there."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        until = time.monotonic() + _PATIENCE_SECONDS
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.close()
                raise PeerError(f"{self.name} did not answer for {_PATIENCE_SECONDS:.0f} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._failure("ended")
            self._pending += piece
        self._process.send_signal(signal.SIGSTOP)
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self, what: str) -> PeerError:
        printed = self._log.read_text(errors="replace").strip().splitlines()
        return PeerError(f"{self.name} {what}" + (f": {printed[-1][:300]}" if printed else ""))
