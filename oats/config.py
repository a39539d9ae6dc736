"""`OatsConfig`: every knob of the compression, validated once, here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from oats.errors import ConfigError

Pattern = str
"""``"row"``, ``"layer"``, or ``"N:M"`` such as ``"2:4"``."""

PRUNING = ("magnitude", "wanda", "sparsegpt", "dsnot")
"""The methods without a low-rank part: their rank ratio is 0 (:mod:`oats.decomposition.baselines`)."""

METHODS = ("oats", "oats-hessian", *PRUNING)
BUDGETS = ("uniform", "owl", "error")
MOMENTS = ("sequential", "dense")
OPTIONAL = frozenset(
    (
        *("method", "moments", "block_matching", "budget", "rank_ratios"),
        *("values", "low_rank", "scale_columns", "head"),
    )
)
"""Settings beyond the published method: a checkpoint made without them does not name them."""

SCALE_COLUMNS = (64, 128)
"""How many columns of a row may share a scale."""

DEFAULT_ITERATIONS = {"fast": 40, "exact": 80}
DEFAULT_MOMENTUM = {"fast": 0.9, "exact": 0.0}


def parse_n_m(pattern: Pattern) -> tuple[int, int] | None:
    """Read an N:M pattern.

    >>> parse_n_m("2:4")
    (2, 4)
    >>> parse_n_m("row") is None
    True
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


Values = Literal["exact", "int8", "int4"]
LowRank = Literal["exact", "int8"]

VALUES: tuple[Values, ...] = ("exact", "int8", "int4")
"""Storages of the kept values, in the order of the core's numbers."""

LOW_RANK: tuple[LowRank, ...] = ("exact", "int8")
"""Storages of the low-rank factors, in the same order."""


@dataclass(frozen=True)
class Storage:
    """Which of a layer's numbers are stored as integer codes (docs/format.md).

    A code stands for itself times the scale of its row and its `scale_columns` columns; an int4 code for an
    int8 of the layer's codebook times that scale. S and V are then those for inputs that are multiplied by 2
    to the `input_exponent` of each: inputs differ in size by orders of magnitude, so do the weights for them.

    Args:
        values: of the kept values: ``"exact"`` (the layer's dtype), ``"int8"``, or ``"int4"``.
        low_rank: of U and V: ``"exact"`` or ``"int8"``.
        scale_columns: columns that share a scale, 64 or 128; 0 where nothing is a code.

    Raises:
        ConfigError: there is no such storage.
    """

    values: Values = "exact"
    low_rank: LowRank = "exact"
    scale_columns: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("values", VALUES), ("low_rank", LOW_RANK)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} are {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.scale_columns not in (SCALE_COLUMNS if self.has_codes else (0,)):
            raise ConfigError(
                f"scale_columns is {self.scale_columns!r}, expected "
                + ("64 or 128" if self.has_codes else "0, because nothing has a scale")
            )

    @classmethod
    def of(cls, values: Values, low_rank: LowRank, scale_columns: int) -> Storage:
        """The storage of both, with scales where one of them has codes.

        Raises:
            ConfigError: there is no such storage.

        >>> Storage.of("exact", "exact", 128) == EXACT
        True
        """
        return cls(values, low_rank, 0 if values == low_rank == "exact" else scale_columns)

    @property
    def has_codes(self) -> bool:
        """Whether any number is stored as a code."""
        return self.values != "exact" or self.low_rank != "exact"

    def scales(self, columns: int) -> int:
        """Number of scales in a row of so many columns."""
        return -(-columns // self.scale_columns)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of a layer beyond its rank and non-zeros; nothing where all is exact."""
        if not self.has_codes:
            return {}
        return {"values": self.values, "low_rank": self.low_rank, "scale_columns": self.scale_columns}

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any]) -> Storage:
        """The inverse of :meth:`to_dict`; other keys are not looked at."""
        given = {name: sizes[name] for name in ("values", "low_rank", "scale_columns") if name in sizes}
        return cls(**given)


EXACT = Storage()
"""All in the layer's dtype."""


@dataclass(frozen=True)
class OatsConfig:
    """Settings of one compression run.

    The names and the default budget are the paper's (arXiv 2409.13652, section 3). The default low-rank
    step is not: ``svd="exact"`` is the published algorithm to the letter, ``svd="fast"``
    reaches an error at least as low in a fraction of the time (docs/decomposition.md).

    Args:
        method: ``"oats"``, the published one; ``"oats-hessian"``, which weighs a layer's error by the
            whole Hessian of its inputs instead of its diagonal (:func:`oats.decompose_hessian`); or, to
            compare with, ``"magnitude"``, ``"wanda"``, ``"sparsegpt"``, ``"dsnot"``
            (:mod:`oats.decomposition.baselines`).
        compression: share of a layer's parameters that is removed, in [0, 1).
        rank_ratio: share of the parameters kept that goes to the low-rank part, in [0, 1]; 0 for the methods
            in `PRUNING`, which have none, without being asked for.
        pattern: where non-zeros may sit: ``"row"`` keeps the same number in each row, ``"layer"``
            the largest of the whole matrix, ``"N:M"`` the N largest of every M contiguous inputs.
        svd: the low-rank step, ``"fast"`` or ``"exact"``.
        iterations: alternations at most; None means 40 for ``fast``, 80 for ``exact``.
        momentum: extrapolation of the sparse part before the low-rank step, in [0, 1); None
            means 0.9 for ``fast``, 0 for ``exact``.
        dtype: of the layers, ``"bf16"`` or ``"fp32"``: of what goes in and out, and of what is stored
            exactly; None means the weight's own dtype (bf16 for an fp16 weight).
        skip: glob patterns of layer names that stay dense, e.g. ``("*.down_proj",)``; one may be a str.
        seed: of the random start of the fast low-rank step.
        moments: the inputs that a layer is fitted to: ``"sequential"``, what the compressed blocks before its
            own make of the calibration data, as published; or ``"dense"``, those of the dense model.
        block_matching: passes over the calibration data in which the kept values and the factors of each
            block are tuned for the block's output (:mod:`oats.compression.matching`); 0 is the published one.
        budget: how `compression` is spread over the layers (:mod:`oats.compression.allocation`):
            ``"uniform"``, the published way; ``"owl"``, less of it in blocks with more outliers; ``"error"``,
            less of it where the measured error grows faster with the parameters removed. Not with N:M
            patterns.
        rank_ratios: for each layer the one of these with the lowest error replaces `rank_ratio`; none of them
            leaves it.
        values: how the kept values are stored: ``"int8"`` or ``"int4"`` codes, or None for `dtype`, which
            ``"bf16"`` and ``"fp32"`` set too.
        low_rank: how the factors are stored: ``"int8"``, ``"bf16"`` or ``"fp32"``; None means as the values,
            int8 beside int4.
        scale_columns: columns of a row whose codes share a scale, 64 or 128.
        head: ``"int8"`` stores the output head as codes, and with it an input embedding that is tied to it;
            nothing of it is removed. None leaves both as they are, as published.

    Raises:
        ConfigError: a setting is out of its range.

    >>> OatsConfig(compression=0.5).resolved_iterations
    40
    >>> OatsConfig(compression=1.5)
    Traceback (most recent call last):
        ...
    oats.errors.ConfigError: compression must be in [0, 1), got 1.5
    """

    method: Literal["oats", "oats-hessian", "magnitude", "wanda", "sparsegpt", "dsnot"] = "oats"
    compression: float = 0.5
    rank_ratio: float = 0.25
    pattern: Pattern = "row"
    svd: Literal["fast", "exact"] = "fast"
    iterations: int | None = None
    momentum: float | None = None
    dtype: Literal["bf16", "fp32"] | None = None
    skip: tuple[str, ...] = ()
    seed: int = 0
    moments: Literal["sequential", "dense"] = "sequential"
    block_matching: int = 0
    budget: Literal["uniform", "owl", "error"] = "uniform"
    rank_ratios: tuple[float, ...] = ()
    values: Literal["int8", "int4", "bf16", "fp32"] | None = None
    low_rank: Literal["int8", "bf16", "fp32"] | None = None
    scale_columns: int = 128
    head: Literal["int8"] | None = None
    # transformers reads it from whatever is passed as `quantization_config`.
    quant_method: ClassVar[str] = "oats"

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}", self.method)
        _require(
            _is_number(self.compression) and 0 <= self.compression < 1,
            "compression must be in [0, 1)",
            self.compression,
        )
        _require(
            _is_number(self.rank_ratio) and 0 <= self.rank_ratio <= 1,
            "rank_ratio must be in [0, 1]",
            self.rank_ratio,
        )
        _require(self.svd in DEFAULT_ITERATIONS, 'svd must be "fast" or "exact"', self.svd)
        _require(
            self.iterations is None or _is_whole(self.iterations, 1),
            "iterations must be a whole number of at least 1",
            self.iterations,
        )
        _require(
            self.momentum is None or (_is_number(self.momentum) and 0 <= self.momentum < 1),
            "momentum must be in [0, 1)",
            self.momentum,
        )
        _require(self.dtype in (None, "bf16", "fp32"), 'dtype must be "bf16", "fp32" or None', self.dtype)
        _require(
            isinstance(self.pattern, str) and (self.pattern in ("row", "layer") or _is_n_m(self.pattern)),
            'pattern must be "row", "layer" or "N:M" with 0 < N <= M (such as "2:4")',
            self.pattern,
        )
        _require(_is_whole(self.seed, 0), "seed must be a whole number of at least 0", self.seed)
        _require(self.moments in MOMENTS, 'moments must be "sequential" or "dense"', self.moments)
        _require(
            _is_whole(self.block_matching, 0),
            "block_matching must be a whole number of passes, at least 0",
            self.block_matching,
        )
        _require(self.budget in BUDGETS, 'budget must be "uniform", "owl" or "error"', self.budget)
        _require(
            self.budget == "uniform" or parse_n_m(self.pattern) is None,
            f'an N:M pattern fixes what each layer keeps, so budget must be "uniform" with {self.pattern}',
            self.budget,
        )
        ratios = self.rank_ratios
        _require(
            isinstance(ratios, (tuple, list)) and all(_is_number(r) and 0 <= r <= 1 for r in ratios),
            "rank_ratios must be a list of numbers in [0, 1]",
            ratios,
        )
        object.__setattr__(self, "rank_ratios", tuple(ratios))
        self._check_storage()
        patterns = (self.skip,) if isinstance(self.skip, str) else self.skip
        _require(
            isinstance(patterns, (tuple, list)) and all(isinstance(p, str) for p in patterns),
            "skip must be a glob pattern or a list of them",
            self.skip,
        )
        object.__setattr__(self, "skip", tuple(patterns))
        if self.method in PRUNING:
            self._prune()

    def _prune(self) -> None:
        """Settle what a method without a low-rank part leaves no choice of."""
        _require(
            self.rank_ratio in (0, OatsConfig.rank_ratio),
            f"{self.method} has no low-rank part, so that rank_ratio must be 0",
            self.rank_ratio,
        )
        object.__setattr__(self, "rank_ratio", 0.0)
        n_m = parse_n_m(self.pattern)
        _require(
            n_m is None or abs(n_m[0] / n_m[1] - (1 - self.compression)) < 1e-9,
            f"{self.method} has no low-rank part, so that compression must be what pattern {self.pattern} "
            f"removes{'' if n_m is None else f', {1 - n_m[0] / n_m[1]:g}'}",
            self.compression,
        )

    def _check_storage(self) -> None:
        exact = (None, "bf16", "fp32")
        _require(
            self.values in (*exact, "int8", "int4"),
            'values must be "int8", "int4", "bf16", "fp32" or None',
            self.values,
        )
        _require(
            self.low_rank in (*exact, "int8"),
            'low_rank must be "int8", "bf16", "fp32" or None',
            self.low_rank,
        )
        _require(
            isinstance(self.scale_columns, int) and self.scale_columns in SCALE_COLUMNS,
            "scale_columns must be 64 or 128",
            self.scale_columns,
        )
        _require(self.head in (None, "int8"), 'head must be "int8" or None', self.head)
        named = {d for d in (self.dtype, self.values, self.low_rank) if d in ("bf16", "fp32")}
        _require(
            len(named) < 2,
            "what is stored exactly has one dtype; dtype, values and low_rank must not name two",
            tuple(sorted(named)),
        )
        object.__setattr__(self, "dtype", next(iter(named), None))
        if self.values in exact:
            object.__setattr__(self, "values", None)

    @property
    def storage(self) -> Storage:
        """How the tensors of a layer are stored."""
        values: Values = self.values if self.values in ("int8", "int4") else "exact"
        low_rank: LowRank = (
            "int8" if self.low_rank == "int8" or (self.values and self.low_rank is None) else "exact"
        )
        return Storage.of(values, low_rank, self.scale_columns)

    @property
    def resolved_iterations(self) -> int:
        """The number of alternations, with the default filled in."""
        return DEFAULT_ITERATIONS[self.svd] if self.iterations is None else self.iterations

    @property
    def resolved_momentum(self) -> float:
        """The momentum, with the default filled in."""
        return DEFAULT_MOMENTUM[self.svd] if self.momentum is None else self.momentum

    def decompose_options(self) -> dict[str, Any]:
        """The keyword arguments of the method's function (:mod:`oats.decomposition.methods`)."""
        names: tuple[str, ...] = ("compression", "pattern")
        if self.method not in PRUNING:
            names += ("rank_ratio", "svd", "iterations", "momentum", "seed")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values; those of `OPTIONAL` only where they are not the default."""
        settings = {**asdict(self), "skip": list(self.skip), "rank_ratios": list(self.rank_ratios)}
        settings = {k: v for k, v in settings.items() if k != "rank_ratios" or v}
        return {k: v for k, v in settings.items() if k not in OPTIONAL or v != getattr(OatsConfig, k)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_n_m(pattern: str) -> bool:
    parsed = parse_n_m(pattern)
    return parsed is not None and 0 < parsed[0] <= parsed[1]


def _require(condition: bool, message: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{message}, got {got!r}")
