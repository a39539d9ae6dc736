"""Latency of layers: all contenders get the same weight and input, and take turns.

Each output is compared with float64 before anything is timed.
"""

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

# A turn starts with calls that are not timed, for this long and at least two. Meanwhile caches fill, spinning
# threads of the contender before go to sleep, and threads that woke up on one core spread over the cores.
_WARM_UP_MS = 20.0

_ROUNDS = 10

# Between rounds no contender works for this long: what the CPUs do then is the work of other processes.
_REST_SECONDS = 0.05
_BANDWIDTH_READS = 4

# A contender is left out at a batch where a single call takes longer than this.
_LONGEST_CALL_MS = 5000.0


@dataclass(frozen=True)
class Timing:
    """The times of one contender on one layer at one batch size.

    Attributes:
        name: name of the contender; `version`, `isa`, `form` and `compression` as in `Contender`.
        dtype: dtype in which it stores the weight.
        weight_bytes: bytes of the weight that a call reads; None if that is not known.
        copies: number of copies of the weight that the calls cycle through.
        ms: milliseconds of one call.
        error: largest error against float64, in units of √(Σ w² x²).
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
        """Name, dtype, form and instruction set, which tell the contenders apart."""
        return contender_label(self.name, self.dtype, self.form, self.isa)

    @property
    def input_dtype(self) -> Dtype:
        """Dtype of inputs and outputs; codes and quantised dtypes take bf16."""
        return "fp32" if self.dtype == "fp32" else "bf16"

    @property
    def gb_per_s(self) -> float | None:
        """Gigabytes of the weight read a second; None if its bytes are not known."""
        return None if self.weight_bytes is None else self.weight_bytes / self.ms.median / 1e6


@dataclass(frozen=True)
class Row:
    """Ours and one peer on one layer at one batch size, timed in turn.

    Attributes:
        layer: name of the layer in its model, or its shape.
        model: name of the model; "" for a shape that was given directly.
        read_gb_per_s: read bandwidth between the rounds: torch's sum of 32 MB of fp32, with the same threads.
        others: share of all CPUs that other processes took between the rounds; NaN if the system does not
            say.
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
        """How many times as fast as the peer ours is, by medians; below 1 ours is slower."""
        return self.peer.ms.median / self.ours.ms.median

    def gflops(self, timing: Timing) -> float:
        """Effective GFLOP/s: the operations of the dense product, 2 d_out d_in batch, over the time."""
        return 2 * self.d_out * self.d_in * self.batch / timing.ms.median / 1e6

    def share_of_bandwidth(self, timing: Timing) -> float | None:
        """Share of `read_gb_per_s` at which the weight is read; None if its bytes are not known."""
        return None if timing.gb_per_s is None else timing.gb_per_s / self.read_gb_per_s

    def to_dict(self) -> dict[str, Any]:
        """The fields and the numbers that follow from them, as plain JSON values."""
        row = asdict(self) | {"ratio": self.ratio}
        for side, timing in (("ours", self.ours), ("peer", self.peer)):
            row[side] |= {
                "gb_per_s": timing.gb_per_s,
                "share_of_bandwidth": self.share_of_bandwidth(timing),
                "gflops": self.gflops(timing),
            }
        return row


def contender_label(name: str, dtype: str, form: Form, isa: str = "") -> str:
    """Name, dtype, form and instruction set in one text.

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


def layer_rows(
    shape: LayerShape, batches: Sequence[int], config: OatsConfig, ours: Sequence[Contender],
    peers: Sequence[Contender], *, model: str = "", repetitions: int = 200, seconds: float = 0.5,
    seed: int = 0, left_out: list[LeftOut] | None = None,
    progress: Callable[[str], None] = lambda note: None,
) -> Iterator[Row]:  # fmt: skip
    """Time one layer at several batch sizes: each of `ours` against each of `peers`.

    The weights are random (`RandomWeight`), and the same for all contenders with one form, dtype and
    compression. Each output is compared with float64 first. Then all contenders take turns, in rounds.

    Args:
        config: compression, rank ratio and pattern of the weight. A contender has its own dtype, and may have
            its own compression.
        ours: a wrong result of one of these is an error.
        peers: one of these that fails, or is wrong, is left out; `left_out` gets the reason.
        repetitions: most timed calls of each contender at a batch size.
        seconds: time that these calls take together, about; there are at least 3.
        progress: called with a note about the next step.

    Yields:
        Rows, one batch size after another. Ours in bf16 is compared with the peers in bf16 or a quantised
        dtype, and with peers that have only fp32; ours in fp32 with the peers in fp32.

    Raises:
        ConfigError: a setting is out of range, or impossible for this shape.
        OatsError: a result of ours is wrong.
    """
    if min([shape.d_out, shape.d_in, repetitions, *batches], default=0) < 1 or not batches:
        raise ConfigError(
            "d_out, d_in, batches and repetitions must be at least 1, got "
            f"{shape.d_out}, {shape.d_in}, {list(batches)} and {repetitions}"
        )
    label = f"{shape.d_out} x {shape.d_in}"

    def leave_out(contender: Contender, where: str, error: OatsError) -> None:
        """Record why a contender is not timed. A wrong result of ours ends the run."""
        if contender in ours and not isinstance(error, _TooSlowError):
            raise error
        if left_out is not None:
            left_out.append(LeftOut(_label(contender), where, str(error)))

    weights: dict[_Key, RandomWeight] = {}
    loaded: list[tuple[Contender, Loaded]] = []
    for contender in (*ours, *peers):
        key = _key(contender)
        if key not in weights:
            progress(f"{label}: a random {contender.form} weight, {contender.dtype}")
            budget = replace(config, dtype=contender.dtype, compression=_compression(contender, config))
            weights[key] = RandomWeight.make(contender.form, shape.d_out, shape.d_in, budget, seed)
        progress(f"{label}: loading {_label(contender)}")
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
                progress(f"{where}: float64 reference")
                x = random_input(weights[key], batch)
                inputs[key] = x, Reference.of(weights[key], x)
            progress(f"{where}: {_label(contender)}")
            try:
                off_by = _checked(contender, *inputs[key])
                ready.append(_Turns(contender, weights[key], held, off_by, repetitions, seconds))
            except OatsError as error:
                leave_out(contender, where, error)
        progress(f"{where}: timing {len(ready)} in turn")
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


def _label(contender: Contender) -> str:
    return contender_label(contender.name, contender.stored_dtype, contender.form, contender.isa)


def _key(contender: Contender) -> _Key:
    """Contenders with the same key share weight and input."""
    return contender.form, contender.dtype, contender.compression


def _compression(one: Contender | Timing, config: OatsConfig) -> float:
    return config.compression if one.compression is None else one.compression


class _TooSlowError(OatsError):
    """A contender takes too long to be timed at this batch size."""


def _checked(contender: Contender, x: Tensor, reference: Reference) -> float:
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
    """The timed calls of one contender at one batch size."""

    def __init__(
        self, contender: Contender, weight: RandomWeight, loaded: Loaded, error: float, repetitions: int,
        seconds: float,
    ) -> None:  # fmt: skip
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
    """Time all of them; return the read bandwidth in GB/s, and the share of the CPUs of other processes."""
    bandwidths, busy, passed = [], 0, 0
    for round_ in range(max((turns.rounds for turns in ready), default=1)):
        # Each round starts with another one, so that no contender always comes after the same one.
        start = round_ % max(len(ready), 1)
        for turns in (*ready[start:], *ready[:start]):
            if round_ < turns.rounds:
                turns.take()
        bandwidths += [read() for _ in range(_BANDWIDTH_READS)][1:]
        # Give spinning threads the time to go to sleep.
        time.sleep(_WARM_UP_MS / 1e3)
        before = _cpu_ticks()
        time.sleep(_REST_SECONDS)
        after = _cpu_ticks()
        busy, passed = busy + after[0] - before[0], passed + after[1] - before[1]
    return Spread.of(bandwidths).median, busy / passed if passed else math.nan


def _cpu_ticks() -> tuple[int, int]:
    """Busy ticks and all ticks of all CPUs since the start; zeros on a system without /proc/stat."""
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
            only_fp32 = our.input_dtype == "bf16" and peer.name not in in_bf16
            if our.input_dtype == peer.input_dtype or only_fp32:
                yield our, peer
