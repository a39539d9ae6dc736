"""The alternating decomposition of one matrix into sparse plus low-rank (OATS, arXiv 2409.13652)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from oats.config import OatsConfig, Pattern, parse_n_m
from oats.decomposition.budget import check_inputs, nnz_per_layer, nnz_per_row, rank_for
from oats.decomposition.selection import keep_largest, split_largest
from oats.decomposition.truncated_svd import (
    OVERSAMPLING,
    WarmSubspace,
    add_product,
    exact_low_rank,
    singular_order,
)
from oats.errors import WeightError
from oats.kernels.isa import active_isa
from oats.kernels.keep_largest import row_norms

MOMENT_FLOOR = 1e-12
"""The least second moment of a feature, as a share of the largest: unscaling a feature that was never active
does not divide by zero."""

PATIENCE = 8
STALL = 1e-5
"""The fast path stops when the best error fell by less than this share over `PATIENCE` alternations."""

BFLOAT16_FROM = 2**20
"""Elements of a weight from which the fast path multiplies in bfloat16, where that is several times
faster than float32. In smaller layers products are not what takes the time."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """``W ≈ sparse + low_rank_u @ low_rank_v``.

    `low_rank_u` has orthonormal columns, in decreasing order of their weight in the scaled layer, and
    `low_rank_v` carries the magnitudes. So the entries of u are at most 1, and those of a column of v at most
    about the norm of that column of W, whatever the scale of the second moments: neither leaves the range of
    a 16-bit float, and u does not amplify a rounding error of ``v @ x``.

    Attributes:
        sparse: (d_out, d_in), zeros where nothing is kept.
        low_rank_u: (d_out, rank).
        low_rank_v: (rank, d_in).
        relative_error: ``‖(W − S − UV) diag(√m)‖_F / ‖W diag(√m)‖_F``, before rounding to the weight's dtype;
            0 for a weight of zeros.
        iterations: alternations that were run.
    """

    sparse: Tensor = field(repr=False)
    low_rank_u: Tensor = field(repr=False)
    low_rank_v: Tensor = field(repr=False)
    relative_error: float
    iterations: int

    @property
    def d_out(self) -> int:
        """Output features."""
        return self.sparse.shape[0]

    @property
    def d_in(self) -> int:
        """Input features."""
        return self.sparse.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return self.low_rank_u.shape[1]

    @property
    def nnz(self) -> int:
        """Non-zeros of the sparse part; below the budget only where the residual itself has exact zeros."""
        return int(torch.count_nonzero(self.sparse))

    def to_dense(self) -> Tensor:
        """The (d_out, d_in) matrix that the two parts stand for, summed in float32, in the weight's dtype."""
        dense = torch.addmm(self.sparse.float(), self.low_rank_u.float(), self.low_rank_v.float())
        return dense.to(self.sparse.dtype)


def decompose(
    weight: Tensor,
    second_moment: Tensor,
    *,
    compression: float = 0.5,
    rank_ratio: float = 0.25,
    pattern: Pattern = "row",
    svd: Literal["fast", "exact"] = "fast",
    iterations: int | None = None,
    momentum: float | None = None,
    seed: int = 0,
    name: str | None = None,
) -> Decomposition:
    """Decompose one weight into a sparse plus a low-rank matrix (arXiv 2409.13652, section 2).

    On the scaled layer ``A = W diag(√m)`` it alternates between ``L``, the best rank-r approximation of
    ``A − S``, and ``S``, the largest magnitudes of ``A − L``. It starts from ``S = 0`` and ends on ``S``; the
    alternation with the lowest error is returned.

    ``svd="exact"`` is the published algorithm: one full SVD in each of 80 alternations, in float64.
    ``svd="fast"`` replaces the SVD by one pass of power iteration from the last subspace, and feeds it
    ``S + momentum (S − S_previous)``, in float32; it stops early once the error stalls, and falls back on the
    full SVD where the subspace would span the whole matrix.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        second_moment: (d_in,), ``Σ x_j²`` over the calibration tokens; finite, not negative. Its scale does
            not matter; all zeros stand for all ones. The least is `MOMENT_FLOOR` times the largest.
        compression: share of the parameters that is removed, in [0, 1).
        rank_ratio: share of the kept parameters that goes to the low-rank part, in [0, 1].
        pattern: ``"row"``, ``"layer"`` or ``"N:M"``.
        svd: ``"fast"`` or ``"exact"``.
        iterations: alternations at most; None means 40 for ``fast``, 80 for ``exact``. Where the
            budget leaves one part empty, one alternation with the full SVD solves the problem.
        momentum: extrapolation of the sparse part, in [0, 1); None means 0.9 for ``fast``, 0 for ``exact``.
        seed: of the random start of ``fast``. The global random state is neither read nor changed.
        name: of the layer, for error messages.

    Returns:
        The parts, contiguous, in the weight's dtype.

    Raises:
        ConfigError: a setting is out of range, the pattern and the compression contradict each other, or
            d_in is not a multiple of M.
        WeightError: the weight or the second moment has a wrong shape or dtype, NaN or infinity, or the
            second moment has a negative value.

    >>> weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    >>> result = decompose(weight, torch.ones(96), compression=0.5, rank_ratio=0.25)
    >>> result.rank, result.nnz // 64
    (4, 36)
    >>> result.to_dense().shape
    torch.Size([64, 96])
    >>> result.relative_error < 0.4
    True
    """
    settings = OatsConfig(
        compression=compression,
        rank_ratio=rank_ratio,
        pattern=pattern,
        svd=svd,
        iterations=iterations,
        momentum=momentum,
        seed=seed,
    )
    return decompose_batch([weight], [second_moment], settings, [name or "weight"])[0]


def decompose_batch(
    weights: Sequence[Tensor], second_moments: Sequence[Tensor], config: OatsConfig, names: Sequence[str]
) -> list[Decomposition]:
    """Decompose several weights of one shape at once: each as :func:`decompose` would, but for rounding.

    Small matrices gain by it, which alone do not keep the threads busy. It takes the memory of all of them.

    Args:
        weights: (d_out, d_in) each, at least one, all of one dtype.
        second_moments: of the inputs of each, (d_in,).
        config: the settings of :func:`decompose`; the others are not used.
        names: of the layers, for error messages.

    Raises:
        ConfigError, WeightError: as :func:`decompose`; the message names the layer.

    >>> weights = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    >>> both = decompose_batch(weights, torch.ones(2, 48), OatsConfig(), ["k", "v"])
    >>> alone = decompose(weights[1], torch.ones(48))
    >>> torch.allclose(both[1].to_dense(), alone.to_dense(), atol=1e-4)
    True
    """
    for weight, second_moment, name in zip(weights, second_moments, names, strict=True):
        check_weight(weight, name)
        check_second_moment(second_moment, weight.shape[1], name)
        if weight.shape != weights[0].shape or weight.dtype != weights[0].dtype:
            raise WeightError(
                f"{name}: the weight is {weight.dtype} {tuple(weight.shape)} in a batch of "
                f"{weights[0].dtype} {tuple(weights[0].shape)}; decompose it in another one"
            )
        check_inputs(weight.shape[1], config.pattern, name)
    d_out, d_in = weights[0].shape
    rank = rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
    count = kept_count(d_out, d_in, config)

    # Rounding decides which of two near-equal magnitudes stays, and the paths part from there: the published
    # algorithm is reproduced in float64 only.
    dtype = torch.float64 if config.svd == "exact" else torch.float32
    roots = [root_moment(m.detach().to(w.device)) for w, m in zip(weights, second_moments, strict=True)]
    each = [w.detach().to(dtype) * root.to(dtype) for w, root in zip(weights, roots, strict=True)]
    # Largest magnitude 1, so that no sum of squares overflows or vanishes.
    peaks = [float(one.abs().max()) or 1.0 for one in each]
    each = [one.div_(peak) for one, peak in zip(each, peaks, strict=True)]
    scaled = each[0] if len(each) == 1 else torch.stack(each)
    del each

    u, v, errors, done = _alternate(scaled, rank, count, config)
    sparse = keep_largest(
        add_product(scaled, u, v, -1, out=torch.empty_like(scaled, memory_format=torch.contiguous_format)),
        count,
        config.pattern,
    )
    parts = [_each(tensor) for tensor in (sparse, u, v)]
    return [
        Decomposition(
            sparse=(own_sparse * (peak / root)).to(weight.dtype).contiguous(),
            low_rank_u=own_u.to(weight.dtype).contiguous(),
            low_rank_v=(own_v * (peak / root)).to(weight.dtype).contiguous(),
            relative_error=error,
            iterations=steps,
        )
        for weight, root, peak, own_sparse, own_u, own_v, error, steps in zip(
            weights, roots, peaks, *parts, errors, done, strict=True
        )
    ]


def _alternate(
    scaled: Tensor, rank: int, count: int, config: OatsConfig
) -> tuple[Tensor, Tensor, list[float], list[int]]:
    """The factors with the lowest relative error, that error, and the number of alternations run.

    Of one matrix (d_out, d_in), or of each of a batch (batch, d_out, d_in): one that has stalled stays as it
    is while the others go on.
    """
    d_out, d_in = scaled.shape[-2:]
    iterations, momentum = config.resolved_iterations, config.resolved_momentum
    fast = config.svd == "fast"
    if rank == 0 or count == 0:
        iterations, fast = 1, False
    subspace = None
    if fast and rank + OVERSAMPLING < min(d_out, d_in):
        subspace = WarmSubspace((d_out, d_in), rank, seed=config.seed, device=scaled.device)

    norms = [norm or 1.0 for norm in _norms(scaled)]
    # The same memory in every alternation: a fresh matrix costs a page fault every 4 KB.
    work = torch.empty_like(scaled, memory_format=torch.contiguous_format)
    sparse, previous = torch.zeros_like(work), torch.zeros_like(work)
    difference = torch.empty_like(work, dtype=difference_dtype(scaled)) if subspace else work
    best = scaled.new_zeros(*scaled.shape[:-1], rank), scaled.new_zeros(*scaled.shape[:-2], rank, d_in)
    errors: list[list[float]] = [[] for _ in norms]
    going = [True] * len(norms)
    for step in range(iterations):
        if subspace is not None and step > 0:
            # `work` holds A − UV − S, so this is A − (S + momentum (S − S_previous)) − UV.
            work.add_(previous.sub_(sparse), alpha=momentum)
            u, v = subspace.follow(difference.copy_(work))
        else:
            torch.lerp(previous, sparse, 1 + momentum, out=work)
            torch.sub(scaled, work, out=work)
            u, v = subspace.approximate(work) if subspace else exact_low_rank(work, rank)
        add_product(scaled, u, v, -1, out=work)
        left = split_largest(work, count, config.pattern, out=previous)
        previous, sparse = sparse, previous
        better = []
        for i, norm in enumerate(left):
            if going[i]:
                errors[i].append(norm / norms[i])
            # With momentum the error is not monotone.
            better.append(going[i] and errors[i][-1] <= min(errors[i]))
            going[i] = going[i] and not (fast and _has_stalled(errors[i]))
        best = (u, v) if all(better) else _replaced(best, (u, v), better)
        if not any(going):
            break
    if subspace is not None:
        best = singular_order(*best)
    return *best, [min(own) for own in errors], [len(own) for own in errors]


def _has_stalled(errors: list[float]) -> bool:
    return len(errors) > PATIENCE and min(errors) >= (1 - STALL) * min(errors[:-PATIENCE])


def _replaced(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], which: list[bool]
) -> tuple[Tensor, Tensor]:
    """The factors of a batch, the new ones for some of its matrices."""
    if not any(which):
        return old
    chosen = torch.tensor(which, device=new[0].device)[:, None, None]
    return torch.where(chosen, new[0], old[0]), torch.where(chosen, new[1], old[1])


def _norms(matrices: Tensor) -> list[float]:
    """Frobenius norms of one matrix, or of each of a batch."""
    return [frobenius_norm(matrix) for matrix in _each(matrices)]


def _each(matrices: Tensor) -> tuple[Tensor, ...]:
    """The matrices of a batch, or the one."""
    return (matrices,) if matrices.dim() == 2 else matrices.unbind()


def difference_dtype(scaled: Tensor) -> torch.dtype:
    """In what the difference between a matrix of this shape, or a batch, and one before it is multiplied."""
    has_products = active_isa() in ("avx512_bf16", "amx_bf16") and torch.backends.mkldnn.is_available()
    supported = scaled.is_cuda or has_products
    size = scaled.shape[-2] * scaled.shape[-1]
    return torch.bfloat16 if supported and size >= BFLOAT16_FROM else torch.float32


def kept_count(d_out: int, d_in: int, config: OatsConfig) -> int:
    """What `keep_largest` takes as its count."""
    n_m = parse_n_m(config.pattern)
    if n_m is not None:
        return n_m[0]
    budget = config.compression, config.rank_ratio
    return nnz_per_layer(d_out, d_in, *budget) if config.pattern == "layer" else nnz_per_row(d_in, *budget)


def root_moment(second_moment: Tensor) -> Tensor:
    """√m in float64, the largest scaled to 1."""
    moment = second_moment.double()
    largest = moment.max()
    if largest == 0:
        return torch.ones_like(moment)
    return (moment / largest).clamp_min(MOMENT_FLOOR).sqrt()


def frobenius_norm(matrix: Tensor) -> float:
    """Of a matrix, summed by rows first."""
    return float(torch.linalg.vector_norm(row_norms(matrix)))


def check_weight(weight: Tensor, layer: str) -> None:
    """Refuse what cannot be decomposed, with a WeightError that names the layer."""
    if not isinstance(weight, Tensor):
        raise WeightError(f"{layer}: the weight must be a torch.Tensor, got {type(weight).__name__}")
    if not (weight.is_cpu or weight.is_cuda) or weight.layout != torch.strided:
        raise WeightError(
            f"{layer}: the weight must be a dense tensor on the CPU or a CUDA device, got layout "
            f"{weight.layout} on {weight.device}; load, move or densify it first"
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise WeightError(
            f"{layer}: the weight must have shape (d_out, d_in) with both at least 1, got "
            f"{tuple(weight.shape)}; reshape it or skip this layer"
        )
    if not weight.is_floating_point():
        raise WeightError(
            f"{layer}: the weight must have a floating dtype, got {weight.dtype}; "
            f"dequantise or convert it first"
        )
    check_all(torch.isfinite(weight.detach().float()), "weight", "NaN or infinite in float32", layer)


def check_second_moment(second_moment: Tensor, d_in: int, layer: str) -> None:
    """Refuse what cannot be second moments of d_in inputs, with a WeightError that names the layer."""
    if not isinstance(second_moment, Tensor):
        raise WeightError(
            f"{layer}: second_moment must be a torch.Tensor, got {type(second_moment).__name__}"
        )
    if tuple(second_moment.shape) != (d_in,):
        raise WeightError(
            f"{layer}: second_moment must have shape ({d_in},), one value for each input of the weight, got "
            f"{tuple(second_moment.shape)}; pass the sum of squares of each input over the calibration tokens"
        )
    if second_moment.is_complex() or second_moment.dtype == torch.bool or second_moment.is_meta:
        raise WeightError(
            f"{layer}: second_moment must hold real numbers, got {second_moment.dtype} on "
            f"{second_moment.device}; pass the sum of squares of each input over the calibration tokens"
        )
    values = second_moment.detach()
    check_all(torch.isfinite(values), "second_moment", "NaN or infinite", layer)
    check_all(values >= 0, "second_moment", "negative", layer)


def check_all(good: Tensor, what: str, flaw: str, layer: str) -> None:
    """Raise a WeightError that says where the first of the values that are not good is."""
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    remedy = "repair the checkpoint or skip this layer" if what == "weight" else "check the calibration data"
    raise WeightError(
        f"{layer}: {len(bad)} of the {good.numel()} values of the {what} are {flaw}, the first at "
        f"{bad[0].tolist()}; {remedy}"
    )
