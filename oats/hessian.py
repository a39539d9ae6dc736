"""Sparse plus low-rank in the metric of the layer's outputs: the whole Hessian instead of its diagonal.

The error that a layer makes on its calibration inputs X (d_in, tokens) is ``‖E X‖_F² = tr(E H Eᵀ)``, with
``E = W − S − U V`` and ``H = X Xᵀ``. OATS (arXiv 2409.13652) keeps the diagonal of H, the second moments;
here H is kept whole.
"""

from __future__ import annotations

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
from oats.selection import split_largest
from oats.svd import OVERSAMPLING, WarmSubspace, exact_low_rank

PENALTY = 0.1, 0.8
"""First and last ρ of the alternations, in units of the mean eigenvalue of the scaled Hessian. A larger ρ
settles the support sooner, and on a worse one."""

INVERSES = 4
"""So many ``(G + ρ I)⁻¹`` are computed, at even ratios of ρ; those between them are interpolated."""

_INDEFINITE = 1e-3
_PANEL = 256

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

    1. ``L``: the best rank-r approximation of ``W − S`` in the metric, ``SVD_r((W − S) G^½) G^−½``, which is
       ``U Uᵀ (W − S)`` with the leading eigenvectors U of ``(W − S) G (W − S)ᵀ``;
    2. the free matrix: least squares, one product with ``(G + ρ I)⁻¹``, in bfloat16 where `oats.decompose`
       takes it;
    3. ``S``: the largest magnitudes of the free matrix plus the scaled multipliers.

    At the end the support stays, and conjugate gradients refit the kept values, in turn with the low-rank
    step.

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

    fast = config.svd == "fast"
    dtype = torch.float32 if fast else torch.float64
    scaled, unscale = _scaled(weight, hessian, dtype)
    metric = _metric(hessian, damping, dtype, layer)
    iterations = config.resolved_iterations if count else 1

    product_dtype = difference_dtype(scaled) if fast else dtype
    low_rank = _LowRankStep(scaled, metric, rank, product_dtype, fast=fast and count > 0, seed=config.seed)
    sparse = torch.zeros_like(scaled)
    if count:
        sparse = _alternate(low_rank, metric, count, iterations, config, product_dtype)
        support = sparse != 0
        for _ in range(REFITS):
            low_rank(sparse)
            sparse = refit_values(low_rank.remainder, sparse, support, metric, REFIT_STEPS, product_dtype)
    u, v = low_rank(sparse)
    error = _norm(low_rank.remainder - sparse, metric) / (_norm(scaled, metric) or 1.0)
    return Decomposition(
        sparse=(sparse * unscale).to(weight.dtype).contiguous(),
        low_rank_u=u.to(weight.dtype).contiguous(),
        low_rank_v=(v * unscale).to(weight.dtype).contiguous(),
        relative_error=error,
        iterations=iterations,
    )


def nearest_low_rank(
    matrix: Tensor, hessian: Tensor, rank: int, *, damping: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The matrix of a rank that is nearest to another in the metric of :func:`decompose_hessian`.

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
    scaled, unscale = _scaled(matrix, hessian, torch.float32)
    metric = _metric(hessian, damping, torch.float32, "weight")
    low_rank = _LowRankStep(scaled, metric, rank, torch.float32, fast=True, seed=seed)
    u, v = low_rank(torch.zeros_like(scaled))
    return u, (v * unscale).float()


def _scaled(weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight for inputs of one size, and what its columns, (d_in,), are multiplied with to undo it."""
    root = root_moment(hessian.detach().diagonal())
    scaled = weight.detach().double() * root
    # Largest magnitude 1, so that no sum of squares overflows or vanishes.
    peak = float(scaled.abs().max()) or 1.0
    return (scaled / peak).to(dtype).contiguous(), peak / root


def _metric(hessian: Tensor, damping: float, dtype: torch.dtype, layer: str) -> Tensor:
    """G, the damped Hessian of inputs that are scaled to a diagonal of ones."""
    # Row by row whatever the strides were, so that products with it sum in one order.
    matrix = hessian.detach().to(
        torch.promote_types(hessian.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format
    )
    root = matrix.diagonal().sqrt()
    # An input that was never active has a row of zeros, and is left to itself.
    root = torch.where(root > 0, root, 1)
    matrix = matrix.div_(root).div_(root[:, None]).to(dtype)
    matrix.diagonal()[:] = 1
    # A mean of the eigenvalues that leans to the large ones: at most the largest.
    large = frobenius_norm(matrix) ** 2 / len(matrix)
    rounding = min(_INDEFINITE * large, PENALTY[0] / 2)
    if torch.linalg.cholesky_ex(_shifted(matrix, rounding)).info:
        raise WeightError(
            f"{layer}: the Hessian has a negative eigenvalue, more than rounding explains; pass X Xᵀ summed "
            "over the calibration tokens, in float32 or better"
        )
    # Its diagonal is one: damping with diag(H) is damping with the identity.
    matrix.div_(1 + damping).diagonal()[:] = 1
    return matrix


def _shifted(matrix: Tensor, shift: float) -> Tensor:
    """``matrix + shift I``."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted


def _norm(matrix: Tensor, metric: Tensor) -> float:
    """``‖E G^½‖_F`` of E (d_out, d_in)."""
    squares = ((matrix @ metric).mul_(matrix)).sum(1, dtype=torch.float64)
    return float(squares.sum().clamp_min(0).sqrt())


class _LowRankStep:
    """``U V``, the best rank-r approximations of ``A − S`` in a metric, for one S after another near it.

    Args:
        scaled: A, (d_out, d_in).
        metric: G.
        rank: r.
        dtype: of the products with what A − S differs by from the approximation before.
        fast: follow S with a warm-started subspace, instead of a full SVD each.
        seed: of the subspace.

    Attributes:
        remainder: ``A − U V`` of the last one.
    """

    def __init__(
        self, scaled: Tensor, metric: Tensor, rank: int, dtype: torch.dtype, *, fast: bool, seed: int
    ) -> None:
        self.scaled, self.remainder = scaled, scaled.clone()
        self._metric, self._rank = metric, rank
        self._root: Tensor | None = None
        self._subspace: WarmSubspace | None = None
        self._started = False
        self._difference = scaled.new_empty(0)
        if fast and rank > 0 and rank + OVERSAMPLING < min(scaled.shape):
            shape = scaled.shape[0], scaled.shape[1]
            self._subspace = WarmSubspace(shape, rank, seed=seed, device=scaled.device, metric=metric)
            self._difference = torch.empty_like(scaled, dtype=dtype)

    def __call__(self, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """U (d_out, rank), orthonormal columns, and V (rank, d_in), ``Uᵀ (A − S)``."""
        if self._subspace is None:
            u, v = self._exact(self.scaled - sparse)
        elif self._started:
            u, v = self._subspace.follow(torch.sub(self.remainder, sparse, out=self._difference))
        else:
            u, v = self._subspace.approximate(self.scaled - sparse)
            self._started = True
        torch.addmm(self.scaled, u, v, alpha=-1, out=self.remainder)
        return u, v

    def _exact(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self._rank == 0:
            return matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0, matrix.shape[1])
        if self._root is None:
            values, vectors = torch.linalg.eigh(self._metric.double())
            self._root = (vectors * values.clamp_min(float(values[-1]) * MOMENT_FLOOR).sqrt()).to(
                matrix.dtype
            )
        u, _ = exact_low_rank(matrix @ self._root, self._rank)
        return u, u.T @ matrix


class _Smoothing:
    """``ρ (G + ρ I)⁻¹`` of a ρ that rises."""

    def __init__(self, metric: Tensor, dtype: torch.dtype) -> None:
        self._metric, self._dtype = metric, dtype
        self._segment = -1
        self._ends = (metric, metric)
        self._between = torch.empty_like(metric, dtype=dtype)

    def __call__(self, progress: float) -> tuple[float, Tensor]:
        """ρ and the matrix, which the next call overwrites; progress, 0 to 1, does not fall."""
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
        factor = torch.linalg.cholesky(_shifted(self._metric, rho))
        # LAPACK writes it by columns; by rows it is the same, being symmetric.
        return torch.cholesky_inverse(factor).mT.mul_(rho).to(self._dtype)


def _alternate(
    low_rank: _LowRankStep,
    metric: Tensor,
    count: int,
    iterations: int,
    config: OatsConfig,
    product_dtype: torch.dtype,
) -> Tensor:
    """The sparse part of the last alternation."""
    sparse, previous, multipliers = (torch.zeros_like(low_rank.scaled) for _ in range(3))
    work = torch.empty_like(sparse)
    smoothing = _Smoothing(metric, product_dtype)
    multiply = _Product(work.shape, product_dtype, work.device)
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


def refit_values(
    target: Tensor,
    sparse: Tensor,
    support: Tensor,
    metric: Tensor,
    steps: int,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Conjugate gradients for the values on a support that bring ``S`` nearest to a target in a metric.

    Minimises ``tr((T − S) G (T − S)ᵀ)``, which is one least-squares problem for each row.

    Args:
        target: T, (d_out, d_in), float32 or float64.
        sparse: S to start from, (d_out, d_in), zero outside the support.
        support: (d_out, d_in), bool.
        metric: G, (d_in, d_in), symmetric positive definite; with a diagonal of ones it is preconditioned.
        steps: of conjugate gradients, at least 1.
        product_dtype: in which directions are multiplied with G; None means the target's. A few steps do not
            reach the accuracy of bfloat16: the residual that they start from is never rounded.

    Returns:
        S, (d_out, d_in), zero outside the support.

    >>> metric = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> refit_values(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]), metric, 1)
    tensor([[1.5000, 0.0000]])
    """
    tiny = torch.finfo(target.dtype).tiny
    rounded = metric.to(product_dtype or target.dtype)
    multiply = _Product(target.shape, rounded.dtype, target.device)
    # Of the product's dtype: a conversion on the way would take longer than the multiplication.
    mask = support.to(rounded.dtype)
    sparse = sparse.clone()
    residual = ((target - sparse) @ metric).mul_(support)
    direction, product = residual.clone(), torch.empty_like(residual)
    square = torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
    for _ in range(steps):
        product.copy_(multiply(direction, rounded).mul_(mask))
        curvature = (direction[:, None] @ product[:, :, None])[..., 0]
        # None where the metric is not definite, along this direction.
        step = torch.where(curvature > 0, square / curvature.clamp_min(tiny), 0)
        sparse.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        previous, square = square, torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
        direction.mul_(square / previous.clamp_min(tiny)).add_(residual)
    return sparse


class _Product:
    """``A @ B`` in the dtype of B, for A of one shape, in the same memory each time."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._rounded, self._product = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The product, which the next call overwrites."""
        return torch.mm(a if a.dtype == b.dtype else self._rounded.copy_(a), b, out=self._product)


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
    allowed = 1e-3 * float(hessian.diagonal().max())
    # By panels: whole, each of several temporaries would be as large as the Hessian.
    panels = zip(hessian.split(_PANEL), hessian.T.split(_PANEL), strict=True)
    if not all(torch.allclose(rows, columns, rtol=1e-3, atol=allowed) for rows, columns in panels):
        raise WeightError(
            f"{layer}: the Hessian is not symmetric; pass X Xᵀ summed over the calibration tokens"
        )
