"""The alternating decomposition of one matrix into sparse plus low-rank (OATS, arXiv 2409.13652)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from oats.config import OatsConfig, Pattern
from oats.decomposition.budget import rank_and_count
from oats.decomposition.checks import check_second_moment, check_weight
from oats.decomposition.result import Decomposition
from oats.decomposition.scaling import frobenius_norm, root_moment, scale_weight
from oats.decomposition.selection import keep_largest, split_largest
from oats.decomposition.subspace import (
    OVERSAMPLING,
    WarmSubspace,
    add_product,
    difference_dtype,
    exact_low_rank,
    singular_order,
)
from oats.errors import WeightError

PATIENCE = 8
STALL = 1e-5
"""The fast path stops if the best error fell by less than this share in `PATIENCE` alternations."""


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
    ``A − S``, and ``S``, the largest magnitudes of ``A − L``. It starts with ``S = 0``, and returns the
    alternation with the lowest error.

    ``svd="exact"`` is the published algorithm: one full SVD in each of 80 alternations, in float64.
    ``svd="fast"`` replaces the SVD by one pass of power iteration from the last subspace, on
    ``S + momentum (S − S_previous)``, in float32. It stops early once the error stalls. It uses the full SVD
    where the subspace would span the whole matrix.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        second_moment: (d_in,), ``Σ x_j²`` over the calibration tokens; finite, not negative. Its scale does
            not matter; all zeros mean all ones. Values below 1e-12 times the largest are raised to that.
        compression: share of the parameters that is removed, in [0, 1).
        rank_ratio: share of the kept parameters that goes to the low-rank part, in [0, 1].
        pattern: ``"row"``, ``"layer"`` or ``"N:M"``.
        svd: ``"fast"`` or ``"exact"``.
        iterations: most alternations; None means 40 for ``fast``, 80 for ``exact``. If the budget leaves one
            part empty, a single alternation with the full SVD solves the problem.
        momentum: extrapolation of the sparse part, in [0, 1); None means 0.9 for ``fast``, 0 for ``exact``.
        seed: of the random start of ``fast``. The global random state is neither read nor changed.
        name: the layer's name, for error messages.

    Returns:
        The parts, contiguous, in the weight's dtype.

    Raises:
        ConfigError: a setting is out of range, the pattern keeps more than the compression allows, or d_in is
            not a multiple of M.
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
    settings = OatsConfig("oats", compression, rank_ratio, pattern, svd, iterations, momentum, seed=seed)
    return decompose_batch([weight], [second_moment], settings, [name or "weight"])[0]


def decompose_batch(
    weights: Sequence[Tensor], second_moments: Sequence[Tensor], config: OatsConfig, names: Sequence[str]
) -> list[Decomposition]:
    """Decompose several weights of one shape at once. The results equal :func:`decompose` up to rounding.

    Small matrices, which do not keep all threads busy one by one, take less time so, and more memory.

    Args:
        weights: one or more, (d_out, d_in) each, all of one dtype.
        second_moments: (d_in,) each.
        config: only the settings of :func:`decompose` are used.
        names: the layers' names, for error messages.

    Raises:
        ConfigError, WeightError: as :func:`decompose`; the message names the layer.

    >>> weights = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(0))
    >>> both = decompose_batch(weights, torch.ones(2, 48), OatsConfig(), ["k", "v"])
    >>> alone = decompose(weights[1], torch.ones(48))
    >>> abs(both[1].relative_error / alone.relative_error - 1) < 0.02
    True
    """
    for weight, second_moment, name in zip(weights, second_moments, names, strict=True):
        check_weight(weight, config.pattern, name)
        check_second_moment(second_moment, weight.shape[1], name)
        if weight.shape != weights[0].shape or weight.dtype != weights[0].dtype:
            raise WeightError(
                f"{name}: the weight is {weight.dtype} {tuple(weight.shape)} in a batch of "
                f"{weights[0].dtype} {tuple(weights[0].shape)}; decompose it in another one"
            )
    rank, count = rank_and_count(weights[0].shape, config)

    # Rounding decides which of two near-equal magnitudes is kept, and the alternations part from there. Only
    # float64 reproduces the published algorithm.
    dtype = torch.float64 if config.svd == "exact" else torch.float32
    each, unscale = [], []
    for weight, second_moment in zip(weights, second_moments, strict=True):
        one, undo = scale_weight(weight, root_moment(second_moment.to(weight.device)), dtype)
        each.append(one)
        unscale.append(undo)
    scaled = each[0] if len(each) == 1 else torch.stack(each)
    del each, one

    u, v, errors, done = _alternate(scaled, rank, count, config)
    rest = add_product(scaled, u, v, -1, out=torch.empty_like(scaled, memory_format=torch.contiguous_format))
    sparse = keep_largest(rest, count, config.pattern)
    parts = zip(_each(sparse), _each(u), _each(v), unscale, strict=True)
    return [
        Decomposition.of_scaled(*own, weights[0].dtype, error, iterations)
        for own, error, iterations in zip(parts, errors, done, strict=True)
    ]


def _alternate(
    scaled: Tensor, rank: int, count: int, config: OatsConfig
) -> tuple[Tensor, Tensor, list[float], list[int]]:
    """The factors with the lowest relative error, that error, and the number of alternations run.

    Of one matrix (d_out, d_in), or of each matrix of a batch (batch, d_out, d_in). A matrix that has stalled
    keeps its factors while the others go on.
    """
    d_out, d_in = scaled.shape[-2:]
    iterations, momentum = config.resolved_iterations, config.resolved_momentum
    fast = config.svd == "fast"
    if rank == 0 or count == 0:
        iterations, fast = 1, False
    subspace = None
    if fast and rank + OVERSAMPLING < min(d_out, d_in):
        subspace = WarmSubspace(scaled.shape[-2:], rank, seed=config.seed, device=scaled.device)

    norms = [frobenius_norm(matrix) or 1.0 for matrix in _each(scaled)]
    # Memory is reused in every alternation, because a fresh matrix costs a page fault every 4 KB.
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
            # With momentum the error can rise.
            better.append(going[i] and errors[i][-1] <= min(errors[i]))
            going[i] = going[i] and not (fast and _has_stalled(errors[i]))
        if any(better):
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
    """The new factors for some matrices of a batch, the old ones for the others."""
    chosen = torch.tensor(which, device=new[0].device)[:, None, None]
    return torch.where(chosen, new[0], old[0]), torch.where(chosen, new[1], old[1])


def _each(matrices: Tensor) -> tuple[Tensor, ...]:
    """The matrices of a batch; one matrix is a batch of one."""
    return (matrices,) if matrices.dim() == 2 else matrices.unbind()
