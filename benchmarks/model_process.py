"""Whole models in processes of their own. This is our end of the second protocol in peers/worker.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from process import Worker
from torch import Tensor

from oats.errors import ConfigError


class ModelProcess(Worker):
    """A program that runs one model, for `oats.bench.model_speed`.

    Attributes:
        bytes_per_token: of the weights that a token reads; None where the program does not say it.
        tokens: that the last text got.

    Raises:
        PeerError: it does not start; the message ends with what it printed last.
    """

    bytes_per_token: int | None = None
    tokens: Sequence[int] = ()

    def load(self, model: Mapping[str, Any], context: int) -> None:
        """Load a model; prompt and new tokens of a text may have `context` tokens together.

        Args:
            model: what to load, in the program's own words.
            context: a number of tokens.

        Raises:
            PeerError: it cannot be loaded.
        """
        answer = self.ask(do="load", **model, threads=torch.get_num_threads(), context=context)
        self.bytes_per_token = answer["bytes_per_token"]

    def timed_generate(self, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
        """Generate greedily; see `oats.bench.model_speed.TimesItself`."""
        answer = self.ask(do="generate", prompt=prompt.tolist(), new_tokens=new_tokens)
        self.tokens = answer["tokens"]
        return 0.0, answer["seconds"]

    def together(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Tokens a second of all texts, while all of them are decoded at once; see :func:`rate_of_all`."""
        return rate_of_all(self.ask(do="together", prompts=prompts, new_tokens=new_tokens)["arrivals"])

    def memory(self, field: str) -> int:
        """A field of the process in /proc, such as "VmHWM" (the most that it ever held), in bytes."""
        assert self._process is not None
        return memory(field, f"/proc/{self._process.pid}/status")


def rate_of_all(arrivals: Sequence[Sequence[float]]) -> float:
    """Tokens a second of several texts, in the time in which all of them get new ones.

    That is from the moment when the last of them has its first token, until the first of them has its last
    one. So no prompt is computed in it, and no text has ended.

    Args:
        arrivals: for each text, when each of its tokens was there.

    Raises:
        ConfigError: there is no such time.

    >>> rate_of_all([[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    2.0
    """
    start, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    if start >= end:
        raise ConfigError("the first text ends before the last one begins; give more new tokens")
    return sum(start < time <= end for times in arrivals for time in times) / (end - start)


def memory(field: str, file: str = "/proc/self/status") -> int:
    """A field of a file in /proc, in bytes."""
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
