"""`OatsConfig`: the settings of a compression. `Storage`: which of a layer's numbers are integer codes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

from oats.errors import ConfigError

Pattern = str
"""``"row"``, ``"layer"``, or ``"N:M"`` such as ``"2:4"``."""

PRUNING = ("magnitude", "wanda", "sparsegpt", "dsnot")
"""The methods without a low-rank part (:mod:`oats.decomposition.baselines`); their rank ratio is 0."""

METHODS = ("oats", "oats-hessian", *PRUNING)

OPTIONAL = frozenset(
    (
        *("method", "moments", "block_matching", "budget", "rank_ratios"),
        *("values", "low_rank", "scale_columns", "head"),
    )
)
"""Settings beyond the published method. A checkpoint names one only if it is not the default."""

DEFAULT_ITERATIONS = {"fast": 40, "exact": 80}
DEFAULT_MOMENTUM = {"fast": 0.9, "exact": 0.0}

Values = Literal["exact", "int8", "int4", "int3", "int2"]
LowRank = Literal["exact", "int8"]

VALUES: tuple[Values, ...] = ("exact", "int8", "int4", "int3", "int2")
"""How kept values can be stored; the core knows each by its index here."""

CODE_BITS: dict[str, int] = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
"""Bits of a code. Those below 8 index a codebook."""

LOW_RANK: tuple[LowRank, ...] = ("exact", "int8")
"""The same for the low-rank factors."""

SCALE_COLUMNS = (64, 128)
"""How many neighbours in a row may share a scale."""


@dataclass(frozen=True)
class OatsConfig:
    """Settings of one compression run.

    Names and the default budget are the paper's (arXiv 2409.13652, section 3). The default ``svd="fast"`` is
    not: the paper computes a full SVD in each step, ``svd="exact"``. ``"fast"`` reaches an error at least as
    low in a fraction of the time (docs/decomposition.md).

    Args:
        method: how a weight is decomposed. ``"oats"`` (default) is the published method. ``"oats-hessian"``
            measures a layer's error with the whole Hessian of its inputs, not only its diagonal
            (:func:`oats.decompose_hessian`). ``"magnitude"``, ``"wanda"``, ``"sparsegpt"`` and ``"dsnot"``
            only prune; they are here for comparison (:mod:`oats.decomposition.baselines`).
        compression: share of each layer's parameters to remove, in [0, 1). Default 0.5.
        rank_ratio: share of the remaining parameters that goes to the low-rank part, in [0, 1]. Default 0.25;
            always 0 for the methods that only prune. Not used with an N:M pattern: N:M fixes the sparse part,
            and the low-rank part gets what `compression` leaves.
        pattern: where non-zeros may sit. ``"row"`` (default) keeps the same number in every row, ``"layer"``
            the largest of the whole matrix, ``"N:M"`` (such as ``"2:4"``) N of every M neighbours in a row.
        svd: the low-rank step. ``"fast"`` (default) updates the last subspace, ``"exact"`` computes a full
            SVD, as published.
        iterations: most alternations between the sparse and the low-rank part. Default None: 40 for ``fast``,
            80 for ``exact``.
        momentum: extrapolation of the sparse part before the low-rank step, in [0, 1). Default None: 0.9 for
            ``fast``, 0 for ``exact``, as published.
        dtype: dtype of the compressed layers, ``"bf16"`` or ``"fp32"``: of their inputs and outputs, and of
            every stored number that is not a code. Default None: the weight's own, and bf16 for fp16.
        skip: glob patterns of the names of layers to leave dense, such as ``("*.down_proj",)``; or one
            pattern as a str. Default: none.
        seed: seed of the random start of the fast low-rank step. Default 0.
        moments: the inputs that a layer is fitted to. ``"sequential"`` (default) takes those that the blocks
            compressed before produce, as published. ``"dense"`` takes those of the dense model.
        block_matching: number of passes over the calibration data that tune the values and factors of each
            block towards the dense block's output (:mod:`oats.compression.matching`). Default 0: none, as
            published.
        budget: how `compression` is spread over the layers (:mod:`oats.compression.allocation`).
            ``"uniform"`` (default) gives all layers the same, as published. ``"owl"`` removes less from
            blocks with more outliers (arXiv 2310.05175). ``"error"`` removes less where the measured error
            rises faster. An N:M pattern allows ``"uniform"`` only.
        rank_ratios: rank ratios to try instead of `rank_ratio`; each layer takes the one with the lowest
            error. Default: none, `rank_ratio` is used.
        values: how kept values are stored: ``"int8"``, ``"int4"``, ``"int3"`` or ``"int2"`` codes, ``"bf16"``
            or ``"fp32"``. Default None: in `dtype`. ``"bf16"`` and ``"fp32"`` also set `dtype`.
        low_rank: how the low-rank factors are stored: ``"int8"`` codes, ``"bf16"`` or ``"fp32"``. Default
            None: int8 if the values are codes, else in `dtype`.
        scale_columns: number of neighbouring codes in a row that share a scale, 64 or 128. Default 128.
        head: ``"int8"`` stores the output head, and an input embedding tied to it, as codes; no weight of it
            is removed. Default None: both stay as they are, as published.

    Raises:
        ConfigError: a setting is out of its range, or two contradict each other.

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
    values: Literal["int8", "int4", "int3", "int2", "bf16", "fp32"] | None = None
    low_rank: Literal["int8", "bf16", "fp32"] | None = None
    scale_columns: int = 128
    head: Literal["int8"] | None = None
    # transformers reads it from whatever is passed as `quantization_config`.
    quant_method: ClassVar[str] = "oats"

    def __post_init__(self) -> None:
        for name, (accepts, expected) in _RULES.items():
            value = getattr(self, name)
            _require(accepts(value), f"{name} must be {expected}", value)
        self._set("skip", (self.skip,) if isinstance(self.skip, str) else tuple(self.skip))
        self._set("rank_ratios", tuple(self.rank_ratios))
        _require(
            self.budget == "uniform" or parse_n_m(self.pattern) is None,
            f'an N:M pattern fixes what each layer keeps, so budget must be "uniform" with {self.pattern}',
            self.budget,
        )
        named = {d for d in (self.dtype, self.values, self.low_rank) if d in ("bf16", "fp32")}
        _require(
            len(named) < 2,
            "what is stored exactly has one dtype; dtype, values and low_rank must not name two",
            tuple(sorted(named)),
        )
        self._set("dtype", next(iter(named), None))
        if self.values not in CODE_BITS:
            self._set("values", None)
        if self.method in PRUNING:
            _require(
                self.rank_ratio in (0, OatsConfig.rank_ratio),
                f"{self.method} has no low-rank part, so that rank_ratio must be 0",
                self.rank_ratio,
            )
            self._set("rank_ratio", 0.0)
            self._check_pattern_is_the_budget()

    def _check_pattern_is_the_budget(self) -> None:
        n_m = parse_n_m(self.pattern)
        if n_m is not None:
            removed = 1 - n_m[0] / n_m[1]
            _require(
                abs(removed - self.compression) < 1e-9,
                f"{self.method} has no low-rank part, so that compression must be what pattern "
                f"{self.pattern} removes, {removed:g}",
                self.compression,
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def storage(self) -> Storage:
        """Which numbers of a layer become codes."""
        values = cast(Values, self.values) if self.values in CODE_BITS else "exact"
        low_rank: LowRank = (
            "int8" if self.low_rank == "int8" or (self.values and self.low_rank is None) else "exact"
        )
        return Storage.of(values, low_rank, self.scale_columns)

    @property
    def resolved_iterations(self) -> int:
        """`iterations`, or its default."""
        return DEFAULT_ITERATIONS[self.svd] if self.iterations is None else self.iterations

    @property
    def resolved_momentum(self) -> float:
        """`momentum`, or its default."""
        return DEFAULT_MOMENTUM[self.svd] if self.momentum is None else self.momentum

    def decompose_options(self) -> dict[str, Any]:
        """The keyword arguments of the method's function (:mod:`oats.decomposition.methods`)."""
        names: tuple[str, ...] = ("compression", "pattern")
        if self.method not in PRUNING:
            names += ("rank_ratio", "svd", "iterations", "momentum", "seed")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values. Those of `OPTIONAL` are left out if they have their default."""
        settings = {**asdict(self), "skip": list(self.skip), "rank_ratios": list(self.rank_ratios)}
        settings = {k: v for k, v in settings.items() if k != "rank_ratios" or v}
        return {k: v for k, v in settings.items() if k not in OPTIONAL or v != getattr(OatsConfig, k)}


@dataclass(frozen=True)
class Storage:
    """Which of a layer's numbers are stored as integer codes (docs/format.md).

    An int8 code stands for itself times a scale, which `scale_columns` neighbours in a row share. A shorter
    code stands for an int8 of the layer's codebook times that scale. A layer with codes first multiplies each
    input by 2 to its `input_exponent`, because inputs, and so the weights for them, differ in size by orders
    of magnitude.

    Args:
        values: how kept values are stored: ``"exact"`` (in the layer's dtype), ``"int8"``, ``"int4"``,
            ``"int3"`` or ``"int2"``.
        low_rank: how U and V are stored: ``"exact"`` or ``"int8"``.
        scale_columns: number of neighbours in a row that share a scale, 64 or 128; 0 without codes.
        mask: False if every element of S is kept, so that no mask is stored.

    Raises:
        ConfigError: there is no such storage.
    """

    values: Values = "exact"
    low_rank: LowRank = "exact"
    scale_columns: int = 0
    mask: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("values", VALUES), ("low_rank", LOW_RANK)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} are {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.scale_columns not in (SCALE_COLUMNS if self.has_codes else (0,)):
            raise ConfigError(
                f"scale_columns is {self.scale_columns!r}, expected "
                + ("64 or 128" if self.has_codes else "0, because nothing has a scale")
            )
        if not isinstance(self.mask, bool):
            raise ConfigError(f"mask is {self.mask!r}, expected true or false")

    @classmethod
    def of(cls, values: Values, low_rank: LowRank, scale_columns: int, mask: bool = True) -> Storage:
        """Like the constructor; `scale_columns` is ignored if there are no codes.

        Raises:
            ConfigError: there is no such storage.

        >>> Storage.of("exact", "exact", 128) == EXACT
        True
        """
        return cls(values, low_rank, 0 if values == low_rank == "exact" else scale_columns, mask)

    @property
    def has_codes(self) -> bool:
        """True if any number is stored as a code."""
        return self.values != "exact" or self.low_rank != "exact"

    @property
    def has_codebook(self) -> bool:
        """True if values are indices of a codebook."""
        return CODE_BITS.get(self.values, 8) < 8

    def scales(self, columns: int) -> int:
        """Number of scales in a row of this many columns."""
        return -(-columns // self.scale_columns)

    def to_dict(self) -> dict[str, Any]:
        """The entries for ``config.json``; none if nothing is a code and there is a mask."""
        codes = {"values": self.values, "low_rank": self.low_rank, "scale_columns": self.scale_columns}
        return (codes if self.has_codes else {}) | ({} if self.mask else {"mask": False})

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any]) -> Storage:
        """The inverse of :meth:`to_dict`. Other keys are ignored."""
        names = ("values", "low_rank", "scale_columns", "mask")
        given = {name: sizes[name] for name in names if name in sizes}
        return cls(**given)


EXACT = Storage()
"""No codes: every number is in the layer's dtype."""


def parse_n_m(pattern: Pattern) -> tuple[int, int] | None:
    """N and M of an N:M pattern, None of another one.

    >>> parse_n_m("2:4")
    (2, 4)
    >>> parse_n_m("row") is None
    True
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    return (int(match[1]), int(match[2])) if match else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_share_below_1(value: Any) -> bool:
    return _is_share(value) and value < 1


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_pattern(value: object) -> bool:
    n_m = parse_n_m(value) if isinstance(value, str) else None
    return value in ("row", "layer") or (n_m is not None and 0 < n_m[0] <= n_m[1])


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list(value: object, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(value, (tuple, list)) and all(accepts(item) for item in value)


def _one_of(*allowed: object) -> Callable[[Any], bool]:
    return lambda value: value in allowed


# Setting → which values it accepts, and the words for them.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (_one_of(*METHODS), f"one of {', '.join(METHODS)}"),
    "compression": (_is_share_below_1, "in [0, 1)"),
    "rank_ratio": (_is_share, "in [0, 1]"),
    "pattern": (_is_pattern, '"row", "layer" or "N:M" with 0 < N <= M (such as "2:4")'),
    "svd": (_one_of("fast", "exact"), '"fast" or "exact"'),
    "iterations": (lambda v: v is None or _is_whole(v, 1), "a whole number of at least 1"),
    "momentum": (lambda v: v is None or _is_share_below_1(v), "in [0, 1)"),
    "dtype": (_one_of("bf16", "fp32", None), '"bf16", "fp32" or None'),
    "skip": (lambda v: _is_text(v) or _is_list(v, _is_text), "a glob pattern or a list of them"),
    "seed": (lambda v: _is_whole(v, 0), "a whole number of at least 0"),
    "moments": (_one_of("sequential", "dense"), '"sequential" or "dense"'),
    "block_matching": (lambda v: _is_whole(v, 0), "a whole number of passes, at least 0"),
    "budget": (_one_of("uniform", "owl", "error"), '"uniform", "owl" or "error"'),
    "rank_ratios": (lambda v: _is_list(v, _is_share), "a list of numbers in [0, 1]"),
    "values": (
        _one_of(*CODE_BITS, "bf16", "fp32", None),
        '"int8", "int4", "int3", "int2", "bf16", "fp32" or None',
    ),
    "low_rank": (_one_of("int8", "bf16", "fp32", None), '"int8", "bf16", "fp32" or None'),
    "scale_columns": (lambda v: isinstance(v, int) and v in SCALE_COLUMNS, "64 or 128"),
    "head": (_one_of("int8", None), '"int8" or None'),
}


def _require(condition: bool, message: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{message}, got {got!r}")
