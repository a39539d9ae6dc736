"""The low-rank step: rank-r approximation of a matrix, exact or carried from one step to the next."""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING = 32
"""Columns that a `WarmSubspace` carries beyond the rank."""

START_PASSES = 8
"""Power passes over the first matrix. From a random start one pass is not enough: the thresholding then
settles on a support that fits the error of the subspace, and later passes do not undo that."""


def exact_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation ``u @ v`` from the full SVD (Eckart–Young).

    Args:
        matrix: (m, n), float32 or float64.
        rank: 0 to min(m, n).

    Returns:
        u: (m, rank), orthonormal columns, in decreasing order of singular value.
        v: (rank, n), orthogonal rows of norm equal to the singular values.

    >>> u, v = exact_low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (u @ v).abs()
    tensor([[3., 0.],
            [0., 0.]])
    """
    u = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    # Not diag(s) Vᵀ: the projection makes each column of v accurate to the scale of that column, and
    # columns span decades once they carry the second moments.
    return u, u.mT @ matrix


class WarmSubspace:
    """Rank-r approximations of a slowly changing matrix, by block power iteration.

    Each matrix costs one power pass from the dominant right subspace of the matrix before it, then
    Rayleigh–Ritz (Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 4.4).

    Args:
        shape: (m, n) of every matrix; rank + oversampling must be at most min(m, n).
        rank: of the approximations, at least 1.
        seed: of the random start; the global random state is neither read nor changed.
        device: where the matrices live.
        oversampling: columns carried beyond the rank.

    >>> subspace = WarmSubspace((40, 30), 2, oversampling=4)
    >>> matrix = torch.outer(torch.arange(40.0), torch.arange(30.0))
    >>> u, v = subspace.approximate(matrix)
    >>> torch.allclose(u @ v, matrix, rtol=1e-4, atol=1e-2)
    True
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        oversampling: int = OVERSAMPLING,
    ) -> None:
        """Draw the random start."""
        # Drawn on the CPU: the same seed starts alike on every device.
        generator = torch.Generator(device="cpu").manual_seed(seed)
        start = torch.randn(
            shape[1], rank + oversampling, generator=generator, dtype=torch.float32, device="cpu"
        )
        self._rank = rank
        self._basis = start.to(device)
        self._passes = START_PASSES

    def approximate(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Near-best rank-r approximation ``u @ v`` of the next matrix.

        Args:
            matrix: (m, n), float32.

        Returns:
            u, v: as from `exact_low_rank`.
        """
        for _ in range(self._passes):
            # Householder, not Cholesky: as fast here, and it completes the basis of a rank-deficient product.
            q = torch.linalg.qr(matrix @ self._basis).Q
            projected = q.mT @ matrix
            # The Gram matrix squares the condition number, so in float64; it is small.
            wide = projected.double()
            rotation = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1).to(matrix.dtype)
            v = rotation.mT @ projected
            self._basis = v.mT
        self._passes = 1
        return q @ rotation[:, : self._rank], v[: self._rank]
