"""Sparse plus low-rank in the metric of the layer's outputs: the whole Hessian instead of its diagonal.

The error that a layer makes on its calibration inputs X (d_in, tokens) is ``‖E X‖_F² = tr(E H Eᵀ)``, with
``E = W − S − U V`` and ``H = X Xᵀ``. OATS (arXiv 2409.13652) keeps the diagonal of H, the second moments;
here H is kept whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from oats.budget import check_inputs, rank_for
from oats.config import OatsConfig, Pattern
from oats.decomposition import (
    MOMENT_FLOOR,
    Decomposition,
    check_all,
    check_weight,
    difference_dtype,
    frobenius_norm,
    kept_count,
    root_moment,
)
from oats.errors import ConfigError, WeightError
from oats.selection import keep_largest
from oats.svd import OVERSAMPLING, WarmSubspace, exact_low_rank

PENALTY = 0.1, 0.8
"""First and last ρ of the alternations, in units of the mean eigenvalue of the scaled Hessian. A larger ρ
settles the support sooner, and on a worse one."""

_INDEFINITE = 1e-3

REFITS = 2
"""Rounds of refit and low-rank step on the final support."""

REFIT_STEPS = 6
"""Steps of conjugate gradients in one round."""


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
    ``G = (H + damping · diag(H)) / (1 + damping)``: damping 0 is the layer's output on the calibration data,
    a large one the published metric, which knows each input's size alone.

    Inputs are scaled to ``diag(G) = 1``. Then the alternating direction method of multipliers splits S into a
    free matrix and a sparse one that must agree (Boyd et al., Foundations and Trends in Machine Learning
    3(1), 2011; for pruning alone: ALPS, arXiv 2406.07831). Each alternation takes

    1. ``L``: the best rank-r approximation of ``W − S`` in the metric, ``SVD_r((W − S) G^½) G^−½``;
    2. the free matrix: least squares, a solve with ``G + ρ I``;
    3. ``S``: the largest magnitudes of the free matrix plus the scaled multipliers.

    All steps but the third run in the eigenbasis of G, where each solve is a division. At the end the support
    stays, and conjugate gradients refit the kept values, in turn with the low-rank step.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        hessian: (d_in, d_in), ``X Xᵀ`` summed over the calibration tokens; finite, symmetric, positive
            semi-definite up to rounding. Its scale does not matter; all zeros stand for the identity.
        compression: share of the parameters that is removed, in [0, 1).
        rank_ratio: share of the kept parameters that goes to the low-rank part, in [0, 1].
        pattern: ``"row"``, ``"layer"`` or ``"N:M"``.
        svd: ``"fast"``: warm-started subspaces, in float32; ``"exact"``: full SVDs, in float64.
        iterations: alternations; None means 40 for ``fast``, 80 for ``exact``.
        momentum: extrapolation of the sparse part before the low-rank step, in [0, 1); None means 0.9 for
            ``fast``, 0 for ``exact``.
        damping: at least 0. Calibration data is a sample: a little damping fits the inputs to come better.
        seed: of the random start of ``fast``. The global random state is neither read nor changed.
        name: of the layer, for error messages.

    Returns:
        The parts, contiguous, in the weight's dtype. Their relative_error is
        ``‖(W − S − U V) G^½‖_F / ‖W G^½‖_F``, before rounding to that dtype.

    Raises:
        ConfigError: a setting is out of range, the pattern and the compression contradict each other, or
            d_in is not a multiple of M.
        WeightError: the weight or the Hessian has a wrong shape or dtype, NaN or infinity, or the Hessian
            has a negative diagonal or is not symmetric.

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
        compression=compression,
        rank_ratio=rank_ratio,
        pattern=pattern,
        svd=svd,
        iterations=iterations,
        momentum=momentum,
        seed=seed,
    )
    layer = name or "weight"
    if not (isinstance(damping, (int, float)) and 0 <= damping < float("inf")):
        raise ConfigError(f"damping must be a finite number of at least 0, got {damping!r}")
    check_weight(weight, layer)
    check_hessian(hessian, weight.shape[1], layer)
    d_out, d_in = weight.shape
    check_inputs(d_in, config.pattern, layer)
    rank = rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
    count = kept_count(d_out, d_in, config)

    dtype = torch.float64 if config.svd == "exact" else torch.float32
    root = root_moment(hessian.detach().diagonal())
    scaled = weight.detach().double() * root
    # Largest magnitude 1, so that no sum of squares overflows or vanishes.
    peak = float(scaled.abs().max()) or 1.0
    scaled = (scaled / peak).to(dtype)
    metric = _Metric.of(hessian, damping, dtype, layer)
    iterations = config.resolved_iterations if count else 1

    low_rank = _LowRankStep(metric, d_out, rank, fast=config.svd == "fast" and count > 0, seed=config.seed)
    if count:
        support = _support(scaled, metric, low_rank, count, iterations, config)
        sparse, u, v = _refit(scaled, support, metric, low_rank)
    else:
        sparse = torch.zeros_like(scaled)
        u, v = low_rank(scaled @ metric.vectors)
    residual = metric.weigh((scaled - sparse) @ metric.vectors - u @ v)
    norm = frobenius_norm(metric.weigh(scaled @ metric.vectors)) or 1.0
    unscale = peak / root
    return Decomposition(
        sparse=(sparse * unscale).to(weight.dtype).contiguous(),
        low_rank_u=u.to(weight.dtype).contiguous(),
        low_rank_v=((v @ metric.vectors.T) * unscale).to(weight.dtype).contiguous(),
        relative_error=frobenius_norm(residual) / norm,
        iterations=iterations,
    )


def nearest_low_rank(
    matrix: Tensor, hessian: Tensor, rank: int, *, damping: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The matrix of a rank that is nearest to another in the metric of :func:`decompose_hessian`.

    With ``G = C Cᵀ`` it is ``SVD_r(M C) C⁻¹``: a Cholesky factor costs a fraction of the eigenvectors.

    Args:
        matrix: M, (d_out, d_in), float32.
        hessian: (d_in, d_in), as there, already checked.
        rank: at least 1, at most min(d_out, d_in).
        damping: as there, above 0.
        seed: of the random start.

    Returns:
        U (d_out, rank) and V (rank, d_in), float32.

    >>> u, v = nearest_low_rank(torch.eye(3), torch.diag(torch.tensor([1.0, 9.0, 4.0])), 1)
    >>> torch.allclose(u @ v, torch.diag(torch.tensor([0.0, 1.0, 0.0])), atol=1e-5)
    True
    """
    root = root_moment(hessian.diagonal())
    metric = _with_unit_diagonal(hessian)
    metric.diagonal()[:] += damping
    factor = torch.linalg.cholesky(metric).float()
    scaled = matrix.double() * root
    peak = float(scaled.abs().max()) or 1.0
    weighed = (scaled / peak).float() @ factor
    if rank + OVERSAMPLING < min(matrix.shape):
        u, v = WarmSubspace((len(matrix), len(hessian)), rank, seed=seed).approximate(weighed)
    else:
        u, v = exact_low_rank(weighed, rank)
    v = torch.linalg.solve_triangular(factor, v, upper=False, left=False)
    return u, (v.double() * (peak / root)).float()


def _with_unit_diagonal(hessian: Tensor) -> Tensor:
    """That of inputs that are scaled to a diagonal of ones, in float64."""
    matrix = hessian.detach().double()
    root = matrix.diagonal().sqrt()
    # An input that was never active has a row of zeros, and is left to itself.
    root = torch.where(root > 0, root, 1)
    matrix = matrix / root / root[:, None]
    matrix.diagonal()[:] = 1
    return matrix


@dataclass(frozen=True)
class _Metric:
    """The damped Hessian of inputs that are scaled to a diagonal of ones, and its eigenbasis."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor

    @staticmethod
    def of(hessian: Tensor, damping: float, dtype: torch.dtype, layer: str) -> _Metric:
        matrix = _with_unit_diagonal(hessian)
        # Its diagonal is one: damping with diag(H) is damping with the identity.
        values, vectors = torch.linalg.eigh(matrix)
        if values[0] < -_INDEFINITE * values[-1]:
            raise WeightError(
                f"{layer}: the Hessian has a negative eigenvalue, {float(values[0] / values[-1]):.2g} of the "
                "largest; pass X Xᵀ summed over the calibration tokens, in float32 or better"
            )
        values = (values.clamp_min(0) + damping) / (1 + damping)
        values = values.clamp_min(float(values[-1]) * MOMENT_FLOOR)
        matrix.diagonal()[:] += damping
        return _Metric((matrix / (1 + damping)).to(dtype), values.to(dtype), vectors.to(dtype))

    def weigh(self, rotated: Tensor) -> Tensor:
        """``E G^½`` up to a rotation, of ``E`` (…, d_in) in the eigenbasis."""
        return rotated * self.values.sqrt()


class _LowRankStep:
    """Best rank-r approximation in the metric, of matrices in its eigenbasis: ``SVD_r(E Λ^½) Λ^−½``."""

    def __init__(self, metric: _Metric, d_out: int, rank: int, *, fast: bool, seed: int) -> None:
        self._root = metric.values.sqrt()
        self._rank = rank
        d_in = len(self._root)
        self._approximate: Callable[[Tensor], tuple[Tensor, Tensor]]
        if fast and rank > 0 and rank + OVERSAMPLING < min(d_out, d_in):
            self._approximate = WarmSubspace((d_out, d_in), rank, seed=seed).approximate
        else:
            self._approximate = partial(exact_low_rank, rank=rank)

    def __call__(self, rotated: Tensor) -> tuple[Tensor, Tensor]:
        if self._rank == 0:
            return rotated.new_zeros(len(rotated), 0), rotated.new_zeros(0, rotated.shape[1])
        u, v = self._approximate(rotated * self._root)
        return u, v / self._root


def _support(
    scaled: Tensor, metric: _Metric, low_rank: _LowRankStep, count: int, iterations: int, config: OatsConfig
) -> Tensor:
    """Which entries are kept, by the alternating direction method of multipliers; their values beside it."""
    target = scaled @ metric.vectors
    dtype = difference_dtype(scaled) if config.svd == "fast" else scaled.dtype
    from_eigenbasis = _FollowedProduct(metric.vectors.T, dtype)
    to_eigenbasis = _FollowedProduct(metric.vectors, dtype)
    # All but `sparse` are in the eigenbasis.
    previous = thresholded = torch.zeros_like(target)
    multipliers = torch.zeros_like(target)
    first, last = PENALTY
    for i in range(iterations):
        rho = first * (last / first) ** (i / max(iterations - 1, 1))
        u, v = low_rank(target - torch.lerp(previous, thresholded, 1 + config.resolved_momentum))
        left = torch.addmm(target, u, v, alpha=-1)
        # In place: at this size, fresh memory costs more than the arithmetic.
        free = left.mul_(metric.values).add_(thresholded, alpha=rho).sub_(multipliers)
        free.div_(metric.values + rho)
        wanted = torch.add(free, multipliers, alpha=1 / rho)
        sparse = keep_largest(from_eigenbasis(wanted), count, config.pattern)
        previous, thresholded = thresholded, to_eigenbasis(sparse)
        multipliers.add_(free.sub_(thresholded), alpha=rho)
    return sparse


class _FollowedProduct:
    """Products ``A @ factor`` of one A after another that is near the one before.

    Where `dtype` is not the factor's, only the change is multiplied in it: rounding is relative to that.
    """

    def __init__(self, factor: Tensor, dtype: torch.dtype) -> None:
        self._factor, self._rounded = factor, factor.to(dtype)
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, matrix: Tensor) -> Tensor:
        if self._rounded is self._factor:
            return matrix @ self._factor
        if self._last is None:
            product = matrix @ self._factor
        else:
            before, product = self._last
            product = product + (matrix - before).to(self._rounded.dtype) @ self._rounded
        self._last = matrix, product
        return product


def _refit(
    scaled: Tensor, sparse: Tensor, metric: _Metric, low_rank: _LowRankStep
) -> tuple[Tensor, Tensor, Tensor]:
    """Values on the support of `sparse`, in turn with the low-rank part, whose v is in the eigenbasis."""
    support = sparse != 0
    target = scaled @ metric.vectors
    u, v = low_rank(target - sparse @ metric.vectors)
    for _ in range(REFITS):
        left = scaled - u @ (v @ metric.vectors.T)
        sparse = refit_values(left, sparse, support, metric.matrix, REFIT_STEPS)
        u, v = low_rank(target - sparse @ metric.vectors)
    return sparse, u, v


def refit_values(target: Tensor, sparse: Tensor, support: Tensor, metric: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for the values on a support that bring ``S`` nearest to a target in a metric.

    Minimises ``tr((T − S) G (T − S)ᵀ)``, which is one least-squares problem for each row.

    Args:
        target: T, (d_out, d_in), float32 or float64.
        sparse: S to start from, (d_out, d_in), zero outside the support.
        support: (d_out, d_in), bool.
        metric: G, (d_in, d_in), symmetric positive definite; with a diagonal of ones it is preconditioned.
        steps: of conjugate gradients, at least 1.

    Returns:
        S, (d_out, d_in), zero outside the support.

    >>> metric = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> refit_values(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]), metric, 1)
    tensor([[1.5000, 0.0000]])
    """
    tiny = torch.finfo(target.dtype).tiny
    residual = ((target - sparse) @ metric) * support
    direction = residual
    square = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        product = (direction @ metric) * support
        step = square / (direction * product).sum(1, keepdim=True).clamp_min(tiny)
        sparse = sparse + step * direction
        residual = residual - step * product
        previous, square = square, residual.square().sum(1, keepdim=True)
        direction = residual + (square / previous.clamp_min(tiny)) * direction
    return sparse


def check_hessian(hessian: Tensor, d_in: int, layer: str) -> None:
    """Refuse what cannot be the Hessian of d_in inputs, with a WeightError that names the layer."""
    if not isinstance(hessian, Tensor):
        raise WeightError(f"{layer}: the Hessian must be a torch.Tensor, got {type(hessian).__name__}")
    if tuple(hessian.shape) != (d_in, d_in) or not hessian.is_floating_point() or not hessian.is_cpu:
        raise WeightError(
            f"{layer}: the Hessian must be a real ({d_in}, {d_in}) matrix on the CPU, one row for each input "
            f"of the weight, got {tuple(hessian.shape)}, {hessian.dtype} on {hessian.device}; pass X Xᵀ "
            "summed over the calibration tokens"
        )
    check_all(torch.isfinite(hessian), "Hessian", "NaN or infinite", layer)
    check_all(hessian.diagonal() >= 0, "Hessian's diagonal", "negative", layer)
    if not torch.allclose(hessian, hessian.T, rtol=1e-3, atol=1e-3 * float(hessian.diagonal().max())):
        raise WeightError(
            f"{layer}: the Hessian is not symmetric; pass X Xᵀ summed over the calibration tokens"
        )
