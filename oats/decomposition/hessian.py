"""Sparse plus low-rank in the metric of the layer's outputs: the whole Hessian instead of its diagonal.

A layer's error on its calibration inputs X (d_in, tokens) is ``‖E X‖_F² = tr(E H Eᵀ)``, with
``E = W − S − U V`` and ``H = X Xᵀ``. OATS (arXiv 2409.13652) uses the diagonal of H, the second moments;
`decompose_hessian` uses all of H.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from oats.config import OatsConfig, Pattern
from oats.decomposition.budget import rank_and_count
from oats.decomposition.checks import check_hessian, check_weight
from oats.decomposition.metric import (
    LowRankStep,
    RoundedProduct,
    damped_metric,
    metric_norm,
    scale_by_diagonal,
    shifted,
)
from oats.decomposition.result import Decomposition
from oats.decomposition.selection import split_largest
from oats.decomposition.subspace import difference_dtype
from oats.errors import ConfigError

PENALTY = 0.1, 0.8
"""First and last ρ of the alternations, in units of the mean eigenvalue of the scaled Hessian. A larger ρ
settles on a support sooner, and on a worse one."""

INVERSES = 4
"""Number of ``(G + ρ I)⁻¹`` that are computed, at even ratios of ρ. Those between are interpolated."""

REFITS = 2
"""Rounds of refit and low-rank step on the final support."""

REFIT_STEPS = 6
"""Steps of conjugate gradients in one refit."""


@torch.no_grad()
def decompose_hessian(
    weight: Tensor,
    hessian: Tensor,
    *,
    compression: float = 0.5,
    rank_ratio: float = 0.25,
    pattern: Pattern = "row",
    svd: Literal["fast", "exact"] = "fast",
    iterations: int | None = None,
    momentum: float | None = None,
    damping: float = 0.1,
    seed: int = 0,
    name: str | None = None,
) -> Decomposition:
    """Decompose one weight into a sparse plus a low-rank matrix, in the metric of a whole Hessian.

    Minimises ``‖(W − S − U V) G^½‖_F`` under the same budget as :func:`oats.decompose`, where
    ``G = (H + damping · diag(H)) / (1 + damping)``. With damping 0 this is the error of the layer's output on
    the calibration data. With a large damping it is the published metric, which uses each input's size only.

    Inputs are scaled to ``diag(G) = 1``. Then the alternating direction method of multipliers splits S into a
    free matrix and a sparse one that must agree (Boyd et al., Foundations and Trends in Machine Learning
    3(1), 2011; for pruning alone: ALPS, arXiv 2406.07831). Each alternation computes

    1. ``L``: the best rank-r approximation of ``W − S`` in the metric, ``SVD_r((W − S) G^½) G^−½``. It equals
       ``U Uᵀ (W − S)``, where U are the leading eigenvectors of ``(W − S) G (W − S)ᵀ``;
    2. the free matrix: least squares, one product with ``(G + ρ I)⁻¹``, in bfloat16 where `oats.decompose`
       uses it;
    3. ``S``: the largest magnitudes of the free matrix plus the scaled multipliers.

    Then the support is fixed. Conjugate gradients refit the kept values, in turn with the low-rank step.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        hessian: (d_in, d_in), ``X Xᵀ`` summed over the calibration tokens; finite, symmetric, positive
            semi-definite up to rounding. Its scale does not matter; all zeros mean the identity.
        compression: as for :func:`oats.decompose`, like the arguments that are not listed here.
        svd: ``"fast"``, warm-started subspaces in float32; or ``"exact"``, full SVDs in float64.
        iterations: number of alternations, which do not stop early; None as there.
        damping: at least 0. Calibration data is a sample, and a little damping fits other inputs better.

    Returns:
        The parts, contiguous, in the weight's dtype. Here relative_error is
        ``‖(W − S − U V) G^½‖_F / ‖W G^½‖_F``, before rounding to that dtype.

    Raises:
        ConfigError: a setting is out of range, the pattern keeps more than the compression allows, or d_in is
            not a multiple of M.
        WeightError: the weight or the Hessian has a wrong shape or dtype, NaN or infinity, or the Hessian
            has a negative diagonal or eigenvalue or is not symmetric.

    >>> from oats import decompose
    >>> generator = torch.Generator().manual_seed(0)
    >>> weight, inputs = (torch.randn(64, n, generator=generator) for n in (64, 400))
    >>> inputs = torch.randn(64, 8, generator=generator) @ torch.randn(8, 400, generator=generator) + inputs
    >>> result = decompose_hessian(weight, inputs @ inputs.T)
    >>> result.rank, result.nnz // 64
    (4, 24)
    >>> plain = decompose(weight, inputs.square().sum(1))
    >>> lost = [((weight - each.to_dense()) @ inputs).norm() for each in (plain, result)]
    >>> bool(lost[1] < lost[0] / 2)
    True
    """
    config = OatsConfig(
        "oats-hessian", compression, rank_ratio, pattern, svd, iterations, momentum, seed=seed
    )
    layer = name or "weight"
    if not (isinstance(damping, (int, float)) and 0 <= damping < float("inf")):
        raise ConfigError(f"damping must be a finite number of at least 0, got {damping!r}")
    check_weight(weight, config.pattern, layer)
    check_hessian(hessian, weight.shape[1], layer)
    rank, count = rank_and_count(weight.shape, config)

    fast = config.svd == "fast"
    dtype = torch.float32 if fast else torch.float64
    scaled, unscale = scale_by_diagonal(weight, hessian, dtype)
    metric = damped_metric(hessian, damping, dtype, layer)
    iterations = config.resolved_iterations if count else 1

    product_dtype = difference_dtype(scaled) if fast else dtype
    low_rank = LowRankStep(scaled, metric, rank, product_dtype, fast=fast and count > 0, seed=config.seed)
    sparse = torch.zeros_like(scaled)
    if count:
        sparse = _alternate(low_rank, metric, count, config, product_dtype)
        support = sparse != 0
        for _ in range(REFITS):
            low_rank(sparse)
            sparse = refit_values(low_rank.remainder, sparse, support, metric, REFIT_STEPS, product_dtype)
    u, v = low_rank(sparse)
    error = metric_norm(low_rank.remainder - sparse, metric) / (metric_norm(scaled, metric) or 1.0)
    return Decomposition.of_scaled(sparse, u, v, unscale, weight.dtype, error, iterations)


def refit_values(
    target: Tensor,
    sparse: Tensor,
    support: Tensor,
    metric: Tensor,
    steps: int,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Move the values on a support towards those nearest to a target in a metric, by conjugate gradients.

    Minimises ``tr((T − S) G (T − S)ᵀ)``, one least-squares problem for each row.

    Args:
        target: T, (d_out, d_in), float32 or float64.
        sparse: S to start from, (d_out, d_in), zero outside the support.
        support: (d_out, d_in), bool.
        metric: G, (d_in, d_in), symmetric positive definite. A diagonal of ones preconditions the problem.
        steps: at least 1.
        product_dtype: of the products of directions with G; None means the target's. bfloat16 is accurate
            enough for a few steps, because the residual that they start from is not rounded.

    Returns:
        S, (d_out, d_in), zero outside the support.

    >>> metric = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> refit_values(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]), metric, 1)
    tensor([[1.5000, 0.0000]])
    """
    tiny = torch.finfo(target.dtype).tiny
    rounded = metric.to(product_dtype or target.dtype)
    multiply = RoundedProduct(target.shape, rounded.dtype, target.device)
    # In the product's dtype: converting would take longer than multiplying.
    mask = support.to(rounded.dtype)
    sparse = sparse.clone()
    residual = ((target - sparse) @ metric).mul_(support)
    direction, product = residual.clone(), torch.empty_like(residual)
    square = torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
    for _ in range(steps):
        product.copy_(multiply(direction, rounded).mul_(mask))
        curvature = (direction[:, None] @ product[:, :, None])[..., 0]
        # No step where rounding has made the metric indefinite in this direction.
        step = torch.where(curvature > 0, square / curvature.clamp_min(tiny), 0)
        sparse.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        previous, square = square, torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
        direction.mul_(square / previous.clamp_min(tiny)).add_(residual)
    return sparse


class _Smoothing:
    """``ρ (G + ρ I)⁻¹`` for a ρ that rises."""

    def __init__(self, metric: Tensor, dtype: torch.dtype) -> None:
        self._metric, self._dtype = metric, dtype
        self._segment = -1
        self._ends = (metric, metric)
        self._between = torch.empty_like(metric, dtype=dtype)

    def __call__(self, progress: float) -> tuple[float, Tensor]:
        """ρ and the matrix, which the next call overwrites. Progress goes from 0 to 1 and never falls."""
        first, last = PENALTY
        position = progress * (INVERSES - 1)
        segment = min(int(position), INVERSES - 2)
        if segment != self._segment:
            self._ends = (self._at(segment) if segment == 0 else self._ends[1], self._at(segment + 1))
            self._segment = segment
        torch.lerp(*self._ends, position - segment, out=self._between)
        return first * (last / first) ** progress, self._between

    def _at(self, end: int) -> Tensor:
        first, last = PENALTY
        rho = first * (last / first) ** (end / (INVERSES - 1))
        factor = torch.linalg.cholesky(shifted(self._metric, rho))
        # LAPACK stores it by columns. It is symmetric, so the transposed view is the same matrix by rows.
        return torch.cholesky_inverse(factor).mT.mul_(rho).to(self._dtype)


def _alternate(
    low_rank: LowRankStep, metric: Tensor, count: int, config: OatsConfig, product_dtype: torch.dtype
) -> Tensor:
    """The sparse part of the last alternation."""
    iterations = config.resolved_iterations
    sparse, previous, multipliers = (torch.zeros_like(low_rank.scaled) for _ in range(3))
    work = torch.empty_like(sparse)
    smoothing = _Smoothing(metric, product_dtype)
    multiply = RoundedProduct(work.shape, product_dtype, work.device)
    rho = PENALTY[0]
    for i in range(iterations):
        last_rho, (rho, smooth) = rho, smoothing(i / max(iterations - 1, 1))
        multipliers.mul_(last_rho / rho)
        low_rank(torch.lerp(previous, sparse, 1 + config.resolved_momentum, out=work))
        # With R = A − U V and the multipliers M in units of ρ, the free matrix is
        # R − (R − S + M) ρ (G + ρ I)⁻¹. S takes the largest of it plus M; `work` holds R − S + M first.
        torch.add(low_rank.remainder, multipliers.sub_(sparse), out=work)
        previous.copy_(multiply(work, smooth))
        work.add_(sparse).sub_(previous)
        split_largest(work, count, config.pattern, out=previous)
        previous, sparse = sparse, previous
        multipliers, work = work, multipliers
    return sparse
