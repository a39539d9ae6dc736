"""Latency of layers: every contender on the same weights and inputs, in turn, checked before it is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats.bench.contenders import Contender, Dtype, Loaded, read_time
from oats.bench.random_layer import Form, RandomWeight, Reference, random_input
from oats.bench.shapes import LayerShape
from oats.bench.spread import Spread
from oats.config import OatsConfig
from oats.errors import ConfigError, OatsError

# A turn starts with calls that are not timed for this long, and two at least: caches settle, threads of the
# one before that still spin go to sleep, and threads that woke up on one core are spread.
_WARM_UP_MS = 20.0

_ROUNDS = 10

# Between rounds nobody works for this long, and what the CPUs do then is the work of other processes.
_REST_SECONDS = 0.05
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
        compression: of the weight, None for the one of the run.
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
    compression: float | None
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
    def input_dtype(self) -> Dtype:
        """Of inputs and outputs; codes and quantised dtypes take bf16."""
        return "fp32" if self.dtype == "fp32" else "bf16"

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
        others: share of all CPUs that other processes took in between, NaN where the system does not say.
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
    others: float
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
        config: the budget; its dtype is not used: each contender has its own, and may have its
            own compression.
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
    say = progress or (lambda note: None)
    label = f"{shape.d_out} x {shape.d_in}"

    def leave_out(contender: Contender, where: str, error: OatsError) -> None:
        """Note why a contender is not timed; a fault of ours ends the run."""
        if contender in ours and not isinstance(error, _TooSlowError):
            raise error
        if left_out is not None:
            left_out.append(LeftOut(_label(contender), where, str(error)))

    weights: dict[_Key, RandomWeight] = {}
    loaded: list[tuple[Contender, Loaded]] = []
    for contender in (*ours, *peers):
        key = _key(contender)
        if key not in weights:
            say(f"{label}: a random {contender.form} weight, {contender.dtype}")
            budget = replace(config, dtype=contender.dtype, compression=_compression(contender, config))
            weights[key] = RandomWeight.make(contender.form, shape.d_out, shape.d_in, budget, seed)
        say(f"{label}: loading {_label(contender)}")
        try:
            loaded.append((contender, contender.load(weights[key])))
        except OatsError as error:
            leave_out(contender, label, error)
    read = read_time()
    for batch in batches:
        where = f"{label}, batch {batch}"
        inputs: dict[_Key, tuple[Tensor, Reference]] = {}
        ready: list[_Turns] = []
        for contender, held in loaded:
            if contender.batches is not None and batch not in contender.batches:
                continue
            key = _key(contender)
            if key not in inputs:
                say(f"{where}: float64 reference")
                x = random_input(weights[key], batch)
                inputs[key] = x, Reference.of(weights[key], x)
            say(f"{where}: {_label(contender)}")
            try:
                off_by = _checked(contender, *inputs[key])
                ready.append(_Turns(contender, weights[key], held, off_by, repetitions, seconds))
            except OatsError as error:
                leave_out(contender, where, error)
        say(f"{where}: timing {len(ready)} in turn")
        bandwidth, others_share = _take_turns(ready, read)
        mine = [turns.timing() for turns in ready if turns.contender in ours]
        others = [turns.timing() for turns in ready if turns.contender not in ours]
        for our, peer in _pairs(mine, others):
            yield Row(
                model, shape.name, shape.d_out, shape.d_in, batch, _compression(our, config),
                config.rank_ratio, config.pattern, torch.get_num_threads(), bandwidth, others_share,
                our, peer,
            )  # fmt: skip


_Key = tuple[Form, str, float | None]


def _key(contender: Contender) -> _Key:
    """What contenders of one weight and input have in common."""
    return contender.form, contender.dtype, contender.compression


def _compression(one: Contender | Timing, config: OatsConfig) -> float:
    """Of its weight."""
    return config.compression if one.compression is None else one.compression


class _TooSlowError(OatsError):
    """A contender takes too long to be timed at this batch."""


def _checked(contender: Contender, x: Tensor, reference: Reference) -> float:
    """The error of a contender's output."""
    error = reference.error(contender.output(x))
    if not error <= contender.tolerance:
        d_out = reference.output.shape[1]
        raise OatsError(
            f"{_label(contender)} is wrong at {d_out} x {x.shape[1]}, batch {len(x)}: error {error:.2e} in "
            f"units of √(Σ w² x²), allowed {contender.tolerance:.2e}; nothing was timed."
            + (" Please report this" if contender.name == "oats" else "")
        )
    return error


class _Turns:
    """The timed calls of one contender at one batch."""

    def __init__(
        self,
        contender: Contender,
        weight: RandomWeight,
        loaded: Loaded,
        error: float,
        repetitions: int,
        seconds: float,
    ) -> None:
        self.contender = contender
        self._weight, self._loaded, self._error = weight, loaded, error
        self._taken: list[float] = []
        call_ms = contender.time(1, 0)[0]
        if call_ms > _LONGEST_CALL_MS:
            raise _TooSlowError(f"one call takes {call_ms / 1e3:.1f} s")
        if call_ms < 100:
            call_ms = sorted(contender.time(3, 0))[1]
        call_ms = max(call_ms, 1e-3)
        calls = min(repetitions, max(3, math.ceil(1e3 * seconds / call_ms)))
        self.rounds = min(_ROUNDS, calls)
        self._calls = math.ceil(calls / self.rounds)
        self._warm_up = 1 if call_ms > 100 else max(2, math.ceil(_WARM_UP_MS / call_ms))

    def take(self) -> None:
        self._taken += self.contender.time(self._calls, self._warm_up)

    def timing(self) -> Timing:
        c, weight = self.contender, self._weight
        return Timing(
            c.name, c.version, c.stored_dtype, c.isa, c.form, c.compression, weight.rank, weight.nnz,
            self._loaded.weight_bytes, self._loaded.copies, len(self._taken), Spread.of(self._taken),
            self._error,
        )  # fmt: skip


def _take_turns(ready: Sequence[_Turns], read: Callable[[], float]) -> tuple[float, float]:
    """Time all of them; return the read bandwidth in GB/s, and the share of the CPUs that others took."""
    bandwidths, busy, passed = [], 0, 0
    for round_ in range(max((turns.rounds for turns in ready), default=1)):
        # Each round starts with another one: nobody always follows the same neighbour.
        start = round_ % max(len(ready), 1)
        for turns in (*ready[start:], *ready[:start]):
            if round_ < turns.rounds:
                turns.take()
        bandwidths += [read() for _ in range(_BANDWIDTH_READS)][1:]
        # Threads that wait in a spin get the time to go to sleep.
        time.sleep(_WARM_UP_MS / 1e3)
        before = _cpu_ticks()
        time.sleep(_REST_SECONDS)
        after = _cpu_ticks()
        busy, passed = busy + after[0] - before[0], passed + after[1] - before[1]
    return Spread.of(bandwidths).median, busy / passed if passed else math.nan


def _cpu_ticks() -> tuple[int, int]:
    """Busy and all ticks of all CPUs since the start, zeros where Linux does not say."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def _pairs(ours: Sequence[Timing], peers: Sequence[Timing]) -> Iterator[tuple[Timing, Timing]]:
    in_bf16 = {peer.name for peer in peers if peer.input_dtype == "bf16"}
    for our in ours:
        for peer in peers:
            if our.input_dtype == "fp32":
                fits = peer.input_dtype == "fp32"
            else:
                fits = peer.input_dtype == "bf16" or peer.name not in in_bf16
            if fits:
                yield our, peer


def _label(contender: Contender) -> str:
    return contender_label(contender.name, contender.stored_dtype, contender.form, contender.isa)
