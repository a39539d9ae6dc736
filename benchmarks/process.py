"""Peers: other software in processes of their own. This is our end of the protocol in peers/worker.py."""

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

from oats.bench.contenders import TOLERANCES, Dtype, Loaded, cycled_bytes
from oats.bench.random_layer import Form, RandomWeight
from oats.errors import OatsError


class PeerError(OatsError):
    """A peer does not start, fails, or does not answer."""


# A peer that needs longer than this to compile a layer for a batch size is left out.
_PATIENCE_SECONDS = 120.0

# Tolerances of quantised weights: half a step of 8 or 4 bits in standard deviations of the weight, times 6:
# the largest of millions of outputs is 6 standard deviations large.
_QUANTISED = {"q8_0": 2.0**-4, "q4_k": 0.75}


class Worker:
    """Another process, with its own Python, that answers requests.

    Between requests the process is stopped (SIGSTOP), so that its threads do not spin while others are timed.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the worker and wait for its greeting.

        Raises:
            PeerError: it does not start; the message ends with what it printed last.
        """
        self.name = name
        self._command, self._environment = list(command), {**os.environ, **(environment or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="oats-bench-")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except PeerError:
            self.close()
            raise

    @property
    def running(self) -> bool:
        """True while the process exists."""
        return self._process is not None and self._process.poll() is None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request, and return the reply.

        Raises:
            PeerError: the request failed, the process has ended, or it takes too long.
        """
        if not self.running:
            raise PeerError(f"{self.name} has ended before")
        assert self._process is not None and self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        answer = self._answer()
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process. A second call does nothing."""
        self._end()
        self._folder.cleanup()

    def _start(self) -> None:
        self._end()
        self._pending = b""
        with open(self._path("log"), "wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                )
            except OSError as error:
                raise PeerError(f"{self.name} cannot be started: {error}") from None
        self.version = str(self._answer()["version"])

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _path(self, name: str) -> str:
        return f"{self._folder.name}/{name}"

    def _answer(self) -> dict[str, Any]:
        """The next line that the worker writes. It is stopped as soon as the line is there."""
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        until = time.monotonic() + _PATIENCE_SECONDS
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self._end()
                raise PeerError(f"{self.name} did not answer for {_PATIENCE_SECONDS:.0f} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._failure()
            self._pending += piece
        self._process.send_signal(signal.SIGSTOP)
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> PeerError:
        """An error that quotes the line of the log that most likely says why the process has ended."""
        self._end()
        printed = Path(self._path("log")).read_text(errors="replace").strip().splitlines()
        telling = [line for line in printed if "rror" in line or "ssertion" in line]
        reason = (telling or printed or [""])[-1].strip()
        return PeerError(f"{self.name} ended" + (f": {reason[:300]}" if reason else ""))


class PeerProcess(Worker):
    """A contender (`oats.bench.contenders.Contender`) in another process."""

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
        self.form, self.stored_dtype, self.batches = form, stored_dtype, batches
        self.isa = ""
        self.compression: float | None = None
        self.dtype: Dtype = "fp32" if stored_dtype == "fp32" else "bf16"
        self.tolerance = {**TOLERANCES, **_QUANTISED}[stored_dtype]
        super().__init__(name, command, environment=environment)

    def load(self, weight: RandomWeight) -> Loaded:
        """See `Contender`. If the process has ended at an earlier layer, it is started again."""
        if not self.running:
            self._start()
        paths = [self._write("weight", weight.sparse)]
        if weight.rank:
            paths += [self._write("u", weight.low_rank_u), self._write("v", weight.low_rank_v)]
        answer = self.ask(
            do="load",
            weight=paths[0],
            factors=paths[1:],
            threads=torch.get_num_threads(),
            cycled_bytes=cycled_bytes(),
        )
        for path in paths:
            os.unlink(path)
        return Loaded(answer["weight_bytes"], answer["copies"])

    def output(self, x: Tensor) -> Tensor:
        """See `Contender`."""
        y = self._path("y.npy")
        self.ask(do="output", x=self._write("x", x), y=y)
        return torch.from_numpy(np.load(y))

    def time(self, calls: int, warm_up: int) -> list[float]:
        """See `Contender`."""
        return list(self.ask(do="time", calls=calls, warm_up=warm_up)["ms"])

    def _write(self, name: str, tensor: Tensor) -> str:
        np.save(path := self._path(f"{name}.npy"), tensor.float().numpy())
        return path
