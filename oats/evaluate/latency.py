"""Latency of layers: every contender on the same weights and inputs, in turn, checked before it is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oats.config import OatsConfig
from oats.errors import ConfigError, OatsError
from oats.evaluate.contenders import Contender, Loaded, read_time
from oats.evaluate.layer import Form, RandomWeight, Reference, random_input
from oats.evaluate.shapes import LayerShape
from oats.evaluate.spread import Spread

# A turn starts with calls that are not timed for this long: caches and clocks settle, and threads of the one
# before that still spin go to sleep.
_WARM_UP_MS = 5.0

_ROUNDS = 10
_BANDWIDTH_READS = 4

# A contender whose single call takes longer than this is left out at that batch.
_LONGEST_CALL_MS = 5000.0


@dataclass(frozen=True)
class Timing:
    """One contender on one layer and batch.

    Attributes:
        name: of the contender.
        dtype: that it stores the weight in.
        isa: that it was told to use, "" where it chooses by itself.
        form: of the weight: sparse plus low-rank, sparse alone (unstructured), or dense.
        weight_bytes: of the weight as a call reads it, None where that is not known.
        copies: of the weight, cycled through.
        calls: that were timed.
        ms: of one call.
        error: the largest against float64, in units of √(Σ w² x²).
    """

    name: str
    version: str
    dtype: str
    isa: str
    form: Form
    rank: int
    nnz: int
    weight_bytes: int | None
    copies: int
    calls: int
    ms: Spread
    error: float

    @property
    def label(self) -> str:
        """Everything that tells one contender from another."""
        return contender_label(self.name, self.dtype, self.form, self.isa)

    @property
    def gb_per_s(self) -> float | None:
        """Bytes of the weight read a second, where they are known."""
        return None if self.weight_bytes is None else self.weight_bytes / self.ms.median / 1e6


@dataclass(frozen=True)
class Row:
    """Ours and one peer on one layer and batch, timed in turn.

    Attributes:
        layer: name of the layer in its model, or its shape.
        model: the model's name, "" for a shape given by hand.
        read_gb_per_s: of torch's sum of 32 MB of fp32 with the same threads, timed in between.
    """

    model: str
    layer: str
    d_out: int
    d_in: int
    batch: int
    compression: float
    rank_ratio: float
    pattern: str
    threads: int
    read_gb_per_s: float
    ours: Timing
    peer: Timing

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer ours is, by medians; below 1 it is slower."""
        return self.peer.ms.median / self.ours.ms.median

    def gflops(self, timing: Timing) -> float:
        """Effective GFLOP/s: what the dense product would have, 2 d_out d_in batch, over the time."""
        return 2 * self.d_out * self.d_in * self.batch / timing.ms.median / 1e6

    def share_of_bandwidth(self, timing: Timing) -> float | None:
        """Bytes of the weight read a second over `read_gb_per_s`, where they are known."""
        return None if timing.gb_per_s is None else timing.gb_per_s / self.read_gb_per_s

    def to_dict(self) -> dict[str, Any]:
        """The fields and what follows from them, as plain JSON values."""
        row = asdict(self) | {"ratio": self.ratio}
        for side, timing in (("ours", self.ours), ("peer", self.peer)):
            row[side] |= {
                "gb_per_s": timing.gb_per_s,
                "share_of_bandwidth": self.share_of_bandwidth(timing),
                "gflops": self.gflops(timing),
            }
        return row


def contender_label(name: str, dtype: str, form: Form, isa: str = "") -> str:
    """Name, dtype, form and instruction set in one.

    >>> contender_label("oats", "bf16", "oats", "avx2"), contender_label("torch", "fp32", "dense")
    ('oats bf16 avx2', 'torch fp32 dense')
    """
    kind = "" if name == form else {"oats": "sparse + low rank"}.get(form, form)
    return " ".join(filter(None, (name, dtype, kind, isa)))


@dataclass(frozen=True)
class LeftOut:
    """A contender that was not timed, and why."""

    name: str
    where: str
    reason: str


Progress = Callable[[str], None]


def layer_rows(
    shape: LayerShape,
    batches: Sequence[int],
    config: OatsConfig,
    ours: Sequence[Contender],
    peers: Sequence[Contender],
    *,
    model: str = "",
    repetitions: int = 200,
    seconds: float = 0.5,
    seed: int = 0,
    left_out: list[LeftOut] | None = None,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Time one layer at several batches: each of `ours` against each peer.

    The weights are random (`RandomWeight`), the same for all contenders of one form and dtype. Each output
    is compared with float64 first. Then all take turns, in rounds.

    Args:
        config: the budget; its dtype is not used, each contender has its own.
        ours: a wrong result of one of these is an error.
        peers: one of these that fails, or is wrong, is left out, and `left_out` says why.
        repetitions: timed calls of each contender at a batch, at most.
        seconds: that a contender's timed calls take at a batch, about; at least 3 are made.
        progress: called with what comes next.

    Yields:
        Rows, batch by batch. Ours in bf16 meets the peers in bf16 or a quantised dtype, and those in fp32
        where there is no bf16 version of them; ours in fp32 meets those in fp32.

    Raises:
        ConfigError: a setting is out of range, or cannot be met for this shape.
        OatsError: a result of ours is wrong.
    """
    if min([shape.d_out, shape.d_in, repetitions, *batches], default=0) < 1 or not batches:
        raise ConfigError(
            "d_out, d_in, batches and repetitions must be at least 1, got "
            f"{shape.d_out}, {shape.d_in}, {list(batches)} and {repetitions}"
        )
    left_out = [] if left_out is None else left_out
    say = progress or (lambda note: None)
    label = f"{shape.d_out} x {shape.d_in}"
    weights: dict[tuple[Form, str], RandomWeight] = {}
    loaded: dict[int, Loaded] = {}
    for contender in (*ours, *peers):
        key = (contender.form, contender.dtype)
        if key not in weights:
            say(f"{label}: a random {contender.form} weight, {contender.dtype}")
            budget = replace(config, dtype=contender.dtype)
            weights[key] = RandomWeight.make(contender.form, shape.d_out, shape.d_in, budget, seed)
        say(f"{label}: loading {_label(contender)}")
        try:
            loaded[id(contender)] = contender.load(weights[key])
        except OatsError as error:
            if contender in ours:
                raise
            left_out.append(LeftOut(_label(contender), label, str(error)))
    read = read_time()
    for batch in batches:
        references: dict[tuple[Form, str], tuple[Tensor, Reference]] = {}
        ready: list[_Turns] = []
        for contender in (*ours, *peers):
            if id(contender) not in loaded or batch not in (contender.batches or [batch]):
                continue
            key = (contender.form, contender.dtype)
            if key not in references:
                say(f"{label}, batch {batch}: float64 reference")
                x = random_input(weights[key], batch)
                references[key] = x, Reference.of(weights[key], x)
            say(f"{label}, batch {batch}: {_label(contender)}")
            try:
                ready.append(_checked(contender, *references[key], repetitions, seconds))
            except OatsError as error:
                if contender in ours:
                    raise
                left_out.append(LeftOut(_label(contender), f"{label}, batch {batch}", str(error)))
        say(f"{label}, batch {batch}: timing {len(ready)} in turn")
        bandwidth = _take_turns(ready, read)
        yield from _rows(shape, model, batch, config, bandwidth, ready, ours, weights, loaded)


class _Turns:
    """The timed calls of one contender at one batch."""

    def __init__(
        self, contender: Contender, call_ms: float, error: float, repetitions: int, seconds: float
    ) -> None:
        self.contender, self.error = contender, error
        calls = max(3, min(repetitions, math.ceil(1e3 * seconds / max(call_ms, 1e-3))))
        calls = min(calls, repetitions)
        self.rounds = min(_ROUNDS, calls)
        self._calls = math.ceil(calls / self.rounds)
        self._warm_up = 0 if call_ms > 20 * _WARM_UP_MS else math.ceil(_WARM_UP_MS / max(call_ms, 1e-3))
        self.taken: list[float] = []

    def take(self) -> None:
        self.taken += self.contender.time(self._calls, self._warm_up)


def _checked(
    contender: Contender, x: Tensor, reference: Reference, repetitions: int, seconds: float
) -> _Turns:
    """Check the output of a contender, and how long about a call takes."""
    error = reference.error(contender.output(x))
    if not error <= contender.tolerance:
        d_out = reference.output.shape[1]
        raise OatsError(
            f"{_label(contender)} is wrong at {d_out} x {x.shape[1]}, batch {len(x)}: error {error:.2e} in "
            f"units of √(Σ w² x²), allowed {contender.tolerance:.2e}; nothing was timed."
            + (" Please report this" if contender.name.startswith("oats") else "")
        )
    call_ms = contender.time(1, 0)[0]
    if call_ms > _LONGEST_CALL_MS:
        raise OatsError(f"one call takes {call_ms / 1e3:.1f} s")
    if call_ms < 100:
        call_ms = sorted(contender.time(3, 0))[1]
    return _Turns(contender, call_ms, error, repetitions, seconds)


def _take_turns(ready: Sequence[_Turns], read: Callable[[], float]) -> float:
    """Time all of them, and return the read bandwidth in GB/s."""
    bandwidths = []
    for round_ in range(max((turns.rounds for turns in ready), default=0)):
        # Each round starts with another one: nobody always follows the same neighbour.
        start = round_ % len(ready)
        for turns in (*ready[start:], *ready[:start]):
            if round_ < turns.rounds:
                turns.take()
        time.sleep(_WARM_UP_MS / 1e3)
        bandwidths += [read() for _ in range(_BANDWIDTH_READS)][1:]
    return Spread.of(bandwidths).median


def _rows(
    shape: LayerShape,
    model: str,
    batch: int,
    config: OatsConfig,
    bandwidth: float,
    ready: Sequence[_Turns],
    ours: Sequence[Contender],
    weights: dict[tuple[Form, str], RandomWeight],
    loaded: dict[int, Loaded],
) -> Iterator[Row]:
    timings = []
    for turns in ready:
        c = turns.contender
        weight, held = weights[c.form, c.dtype], loaded[id(c)]
        timings.append(
            Timing(
                c.name, c.version, c.stored_dtype, c.isa, c.form, weight.rank, weight.nnz, held.weight_bytes,
                held.copies, len(turns.taken), Spread.of(turns.taken), turns.error,
            )
        )  # fmt: skip
    mine = [t for t, turns in zip(timings, ready, strict=True) if turns.contender in ours]
    others = [t for t, turns in zip(timings, ready, strict=True) if turns.contender not in ours]
    in_bf16 = {t.name for t in others if t.dtype != "fp32"}
    for our in mine:
        for peer in others:
            same = peer.dtype == our.dtype if our.dtype == "fp32" else peer.dtype != "fp32"
            if same or (our.dtype != "fp32" and peer.name not in in_bf16):
                yield Row(
                    model, shape.name, shape.d_out, shape.d_in, batch, config.compression, config.rank_ratio,
                    config.pattern, torch.get_num_threads(), bandwidth, our, peer,
                )  # fmt: skip


def _label(contender: Contender) -> str:
    return contender_label(contender.name, contender.stored_dtype, contender.form, contender.isa)
