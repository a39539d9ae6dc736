"""Low-rank approximation in the metric G of a layer's inputs: ``‖E G^½‖_F`` instead of ``‖E‖_F``."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.decomposition.scaling import MOMENT_FLOOR, frobenius_norm, root_moment, scale_weight
from oats.decomposition.subspace import OVERSAMPLING, WarmSubspace, exact_low_rank
from oats.errors import WeightError

_ROUNDING = 1e-3
"""How far below zero rounding may bring an eigenvalue, as a share of the largest."""

_MOST_ROUNDING = 0.05
"""The same in absolute terms. At half of the first ρ of `decompose_hessian`, ``G + ρ I`` stays definite."""


def damped_metric(hessian: Tensor, damping: float, dtype: torch.dtype, layer: str) -> Tensor:
    """``G = (H + damping · diag(H)) / (1 + damping)`` of inputs scaled to a diagonal of ones.

    Args:
        hessian: H, (d_in, d_in), already checked.
        damping: at least 0.
        dtype: of the result.
        layer: for the error message.

    Raises:
        WeightError: H has a negative eigenvalue that rounding does not explain.
    """
    # Row by row whatever the strides were, so that products with it sum in one order.
    matrix = hessian.detach().to(
        torch.promote_types(hessian.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format
    )
    root = matrix.diagonal().sqrt()
    # The row of an input that was never active is zero. Divided by 1, it stays uncorrelated with the others.
    root = torch.where(root > 0, root, 1)
    matrix = matrix.div_(root).div_(root[:, None]).to(dtype)
    matrix.diagonal()[:] = 1
    # A mean of the eigenvalues that leans to the large ones; at most the largest.
    large = frobenius_norm(matrix) ** 2 / len(matrix)
    rounding = min(_ROUNDING * large, _MOST_ROUNDING)
    if torch.linalg.cholesky_ex(shifted(matrix, rounding)).info:
        raise WeightError(
            f"{layer}: the Hessian has a negative eigenvalue, more than rounding explains; pass X Xᵀ summed "
            "over the calibration tokens, in float32 or better"
        )
    # The diagonal is one, so damping with diag(H) is damping with the identity.
    matrix.div_(1 + damping).diagonal()[:] = 1
    return matrix


def shifted(matrix: Tensor, shift: float) -> Tensor:
    """``matrix + shift I``."""
    result = matrix.clone()
    result.diagonal().add_(shift)
    return result


def metric_norm(matrix: Tensor, metric: Tensor) -> float:
    """``‖E G^½‖_F`` of E (d_out, d_in)."""
    squares = ((matrix @ metric).mul_(matrix)).sum(1, dtype=torch.float64)
    return float(squares.sum().clamp_min(0).sqrt())


def scale_by_diagonal(weight: Tensor, hessian: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`oats.decomposition.scaling.scale_weight` by the diagonal of a Hessian, contiguous."""
    scaled, unscale = scale_weight(weight, root_moment(hessian.diagonal()), torch.float64)
    return scaled.to(dtype).contiguous(), unscale


def nearest_low_rank(
    matrix: Tensor, hessian: Tensor, rank: int, *, damping: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The matrix of a given rank nearest to `matrix` in the metric of :func:`oats.decompose_hessian`.

    Args:
        matrix: (d_out, d_in), float32.
        hessian: (d_in, d_in), already checked; this, `damping` and `seed` as there.
        rank: at least 1, at most min(d_out, d_in).

    Returns:
        U (d_out, rank) and V (rank, d_in), float32.

    >>> u, v = nearest_low_rank(torch.eye(3), torch.diag(torch.tensor([1.0, 9.0, 4.0])), 1)
    >>> torch.allclose(u @ v, torch.diag(torch.tensor([0.0, 1.0, 0.0])), atol=1e-5)
    True
    """
    scaled, unscale = scale_by_diagonal(matrix, hessian, torch.float32)
    metric = damped_metric(hessian, damping, torch.float32, "weight")
    low_rank = LowRankStep(scaled, metric, rank, torch.float32, fast=True, seed=seed)
    u, v = low_rank(torch.zeros_like(scaled))
    return u, (v * unscale).float()


class LowRankStep:
    """``U V``, the best rank-r approximation of ``A − S`` in a metric G, for a sequence of similar S.

    Args:
        scaled: A, (d_out, d_in).
        dtype: of the products with the change of ``A − S`` since the last approximation.
        fast: follow S with a warm-started subspace; otherwise one full SVD for each S.

    Attributes:
        remainder: ``A − U V`` for the last S.
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
            self._subspace = WarmSubspace(scaled.shape, rank, seed=seed, device=scaled.device, metric=metric)
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
            root = vectors * values.clamp_min(float(values[-1]) * MOMENT_FLOOR).sqrt()
            self._root = root.to(matrix.dtype)
        u, _ = exact_low_rank(matrix @ self._root, self._rank)
        return u, u.T @ matrix


class RoundedProduct:
    """``A @ B`` in the dtype of B, for A of one shape; every call writes to the same memory."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._rounded, self._product = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Overwritten by the next call."""
        return torch.mm(a if a.dtype == b.dtype else self._rounded.copy_(a), b, out=self._product)
