"""Speed of whole models: tokens a second of prefill and of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from oats.bench.spread import Spread
from oats.engine.engine import Engine
from oats.engine.most_likely import most_likely
from oats.errors import ConfigError
from oats.models.linear import is_linear
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear


@dataclass(frozen=True)
class ModelSpeed:
    """Speed of one model.

    Attributes:
        decode: new tokens a second, from the first new token to the last; one forward pass each.
        prefill: tokens of the prompt a second, from the start to the first new token.
    """

    decode: Spread
    prefill: Spread


@runtime_checkable
class TimesItself(Protocol):
    """A model that something else than transformers runs, and that reports its own times."""

    def timed_generate(self, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
        """Generate (greedy, batch 1, KV cache). Returns the time of the start, and of each new token."""


class InEngine:
    """A model in the engine, which :class:`TimesItself`.

    Args:
        engine: `Engine.reason` is None.
    """

    def __init__(self, engine: Engine) -> None:
        engine.check_native()
        self._engine = engine

    def timed_generate(self, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
        """Generate (greedy). Returns the time of the start, and of each new token."""
        ids = prompt.tolist()
        tokens = self._engine.new()  # not `generate`, which would share the prompt with the call before
        times: list[float] = []
        start = time.perf_counter()
        try:
            newest = most_likely(self._engine.prefill(tokens, ids))
            times.append(time.perf_counter())
            while len(times) < new_tokens:
                newest = most_likely(self._engine.step([(tokens, [newest])])[0])
                times.append(time.perf_counter())
        finally:
            self._engine.release(tokens)
        return start, times


def in_engine(models: Mapping[str, Any]) -> dict[str, Any]:
    """The same models, those that the engine runs as :class:`InEngine`; the others as they are."""
    timed: dict[str, Any] = {}
    for name, model in models.items():
        engine = None if isinstance(model, TimesItself) else Engine(model)
        timed[name] = InEngine(engine) if engine is not None and engine.reason is None else model
    return timed


def model_speeds(
    models: Mapping[str, Any], prompt: Tensor, *, new_tokens: int = 32, repetitions: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, ModelSpeed]:  # fmt: skip
    """Time ``generate`` (greedy, batch 1, KV cache) of several models, which take turns.

    Each model warms up once. Then each repetition times one ``generate`` call of each model: from its start
    to the first new token is prefill, from the first to the last new token is decoding.

    Args:
        models: name → causal language model of transformers, or a model that :class:`TimesItself`.
        prompt: (n,) token ids.
        new_tokens: tokens to generate in each call, at least 2.
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
            if isinstance(model, TimesItself):
                start, arrivals = model.timed_generate(prompt, new_tokens)
            else:
                start, arrivals = _timed_generate(model, prompt, new_tokens)
            if len(arrivals) != new_tokens:
                raise ConfigError(f"{name} made {len(arrivals)} tokens of {new_tokens}; it cannot be timed")
            if repetition > 0:
                decode[name].append((new_tokens - 1) / (arrivals[-1] - arrivals[0]))
                prefill[name].append(prompt.numel() / (arrivals[0] - start))
            if progress is not None:
                progress(repetition * len(models) + index + 1, total, name)
    return {name: ModelSpeed(Spread.of(decode[name]), Spread.of(prefill[name])) for name in models}


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that one decoded token reads in a causal language model, dense or compressed.

    All count, except the input embedding: only one row of it is read. If the output head shares its weight,
    it counts.
    """
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = isinstance(head, nn.Linear) and head.weight is embedding
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    packed = [layer.packed.nbytes for layer in layers if layer.packed is not None]
    total: int = sum(packed) + sum(p.nbytes for p in model.parameters() if p is not embedding or tied)
    return total


@dataclass(frozen=True)
class DecodeTime:
    """Seconds of a decoded token in the linear layers of the blocks, in the output head, and in the rest.

    The rest is attention, norms, activations and Python.
    """

    linear: float
    head: float
    rest: float


def decode_time(model: Any, prompt: Tensor, *, new_tokens: int = 32) -> DecodeTime:
    """Divide the time of decoding at least 2 tokens after a prompt (n,) (greedy, batch 1, KV cache).

    The clocks around each layer add a little to it.
    """
    head = model.get_output_embeddings()
    spent = {"linear": 0.0, "head": 0.0}
    clock = _Clock()
    started = 0.0

    def before(*_: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def after(module: nn.Module, *_: Any) -> None:
        if len(clock.times) > 1:  # prefill is over
            spent["head" if module is head else "linear"] += time.perf_counter() - started

    layers = [m for m in model.modules() if is_linear(m) or isinstance(m, SparseLowRankLinear)]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        _timed_generate(model, prompt, new_tokens, clock)
    finally:
        for handle in handles:
            handle.remove()
    tokens = new_tokens - 1
    linear, of_head = spent["linear"] / tokens, spent["head"] / tokens
    return DecodeTime(linear, of_head, (clock.times[-1] - clock.times[1]) / tokens - linear - of_head)


def _timed_generate(
    model: Any, prompt: Tensor, new_tokens: int, clock: _Clock | None = None
) -> tuple[float, list[float]]:
    """The time of the start, and of each new token."""
    clock = clock or _Clock()
    start = time.perf_counter()
    # With eos_token_id=None no token ends the text. `min_new_tokens` would do too, but costs a pass over the
    # vocabulary per token.
    model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], eos_token_id=None,
        max_new_tokens=new_tokens, do_sample=False, use_cache=True, streamer=clock,
    )  # fmt: skip
    # `generate` hands the prompt to the streamer first.
    return start, clock.times[1:]


class _Clock:
    """A streamer of transformers that records the time of each call."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
