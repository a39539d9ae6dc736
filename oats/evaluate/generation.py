"""Latency of whole models: prefill and decode tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oats.errors import ConfigError
from oats.evaluate.spread import Spread


@dataclass(frozen=True)
class GenerationSpeed:
    """Speed of one model.

    Attributes:
        decode: tokens a second after the first one, each from one forward pass with a KV cache.
        prefill: tokens of the prompt a second, until the first new token is there.
    """

    decode: Spread
    prefill: Spread


def generation_speed(
    models: Mapping[str, Any],
    prompt: Tensor,
    *,
    new_tokens: int = 32,
    repetitions: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, GenerationSpeed]:
    """Time ``generate`` (greedy, batch 1, KV cache) of several models, alternating between them.

    Each model warms up once. A repetition times one ``generate`` call: from its start to the first new
    token is prefill, from the first to the last new token is decoding.

    Args:
        models: name → causal language model of transformers.
        prompt: (n,) token ids.
        new_tokens: generated in each call, at least 2.
        repetitions: timed calls of each model.
        progress: called as progress(done, total, name) after each call.

    Raises:
        ConfigError: the prompt is empty, or there are too few new tokens or repetitions.
    """
    if prompt.numel() < 1 or new_tokens < 2 or repetitions < 1:
        raise ConfigError(
            "timing generation needs a prompt of at least 1 token, 2 new tokens and 1 repetition, got "
            f"{prompt.numel()}, {new_tokens} and {repetitions}"
        )
    decode: dict[str, list[float]] = {name: [] for name in models}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    total = (repetitions + 1) * len(models)
    for repetition in range(repetitions + 1):
        for index, (name, model) in enumerate(models.items()):
            start, arrivals = _timed_generate(model, prompt, new_tokens)
            if repetition > 0:
                decode[name].append((new_tokens - 1) / (arrivals[-1] - arrivals[0]))
                prefill[name].append(prompt.numel() / (arrivals[0] - start))
            if progress is not None:
                progress(repetition * len(models) + index + 1, total, name)
    return {name: GenerationSpeed(Spread.of(decode[name]), Spread.of(prefill[name])) for name in models}


def _timed_generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """When the call started, and when each new token came."""
    clock = _Clock()
    start = time.perf_counter()
    model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        streamer=clock,
    )
    # The first thing that `generate` hands to a streamer is the prompt.
    return start, clock.times[1:]


class _Clock:
    """A streamer, in the sense of transformers, that keeps the time of each call."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
