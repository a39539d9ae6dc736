"""Singular triplets of one matrix: by subspace iteration, or from the Gram matrix where it is small.

Also the pieces that :mod:`oats.decomposition.lanczos` shares with these two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from oats.decomposition.subspace import OVERSAMPLING, random_columns, rayleigh_ritz


class Triplets(NamedTuple):
    """``A ≈ u diag(s) vh``, s decreasing."""

    u: Tensor
    s: Tensor
    vh: Tensor
    residuals: Tensor
    """(rank,), float64: ``‖A v_i − s_i u_i‖``."""

    def within(self, tol: float) -> bool:
        """True if every residual is at most what `tol` allows."""
        if len(self.s) == 0:
            return True
        return bool(self.residuals.max() <= largest_residual(self.s.double(), tol, self.s.dtype))


def largest_residual(s: Tensor, tol: float, dtype: torch.dtype) -> float:
    """The largest residual that `tol` allows triplets with the values s, computed in `dtype`."""
    return max(tol * float(s[-1]), 64 * torch.finfo(dtype).eps * float(s[0]))


def subspace_iteration(
    matrix: Tensor, rank: int, start: Tensor | None, width: int, passes: int, seed: int
) -> Triplets:
    """Each pass multiplies `width` columns by the matrix and its transpose (Halko et al., algorithm 4.4)."""
    basis = start_columns(matrix, start, width, seed)
    for _ in range(passes - 1):
        # Between products the columns only have to stay independent.
        basis = _well_conditioned(transposed_product(matrix, _well_conditioned(matrix @ basis)))
    u, v = rayleigh_ritz(matrix, torch.linalg.qr(matrix @ basis).Q)
    u = u[:, :rank]
    q, s = unit_columns(v[:rank].mT)
    return _sorted(matrix, u, s, q.mT)


def by_gram_matrix(matrix: Tensor, rank: int, tol: float) -> Triplets:
    """From the eigenvectors of the smaller Gram matrix; of a float64 matrix, from its full SVD."""
    m, n = matrix.shape
    if matrix.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return _sorted(matrix, u[:, :rank], s[:rank], vh[:rank])
    if m < n:
        v, s, uh, _ = by_gram_matrix(matrix.mT, rank, tol)
        return _sorted(matrix, uh.mT, s, v.mT)
    width = min(rank + OVERSAMPLING, n)
    if 4 * width <= n:
        # float32 takes half the time. One pass over the few vectors wanted repairs what it loses, unless
        # their values are far below the largest.
        vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, n - width :].mT.flip(0)
        found = subspace_iteration(matrix, rank, vectors, width, 1, 0)
        if found.within(tol):
            return found
    wide = matrix.double()
    v = torch.linalg.eigh(wide.mT @ wide).eigenvectors[:, n - rank :].flip(1)
    # Not the roots of the eigenvalues: they are wrong below 1e-8 of the largest.
    u, s, v = (part.to(matrix.dtype) for part in (*unit_columns(wide @ v), v))
    return _sorted(matrix, u, s, v.mT)


def start_columns(matrix: Tensor, start: Tensor | None, width: int, seed: int) -> Tensor:
    """(n, width): the rows of `start` as columns, filled up with random ones."""
    columns = random_columns(matrix.shape[1], width, seed).to(matrix)
    if start is not None:
        given = start[:width].mT.to(matrix)
        columns[:, : given.shape[1]] = given
        # To the length of the given ones, so that the first pass weighs them alike.
        columns[:, given.shape[1] :] /= matrix.shape[1] ** 0.5
    return columns


def transposed_product(matrix: Tensor, block: Tensor) -> Tensor:
    """``matrixᵀ block``. Written ``matrix.mT @ block``, MKL takes a third longer for a row-major matrix."""
    return (block.mT @ matrix).mT


def unit_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal columns made orthonormal, with any direction in place of a zero one; and their norms."""
    q, triangle = torch.linalg.qr(columns)
    diagonal = triangle.diagonal()
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q), diagonal.abs()


def _well_conditioned(block: Tensor) -> Tensor:
    """Nearly orthonormal columns with the same span, in half the time of Householder's QR.

    Shifted Cholesky-QR (Fukaya et al., SIAM J. Sci. Comput. 42(1), 2020).
    """
    gram = block.mT @ block
    shift = 16 * torch.finfo(block.dtype).eps * gram.diagonal().sum()
    factor, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram)).to(gram))
    if int(failed):  # a block of zeros
        return torch.linalg.qr(block).Q  # type: ignore[no-any-return]
    return torch.linalg.solve_triangular(factor, block.mT, upper=False).mT  # type: ignore[no-any-return]


def _sorted(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Triplets:
    # Rounding can swap values that are nearly equal.
    order = s.argsort(descending=True, stable=True)
    u, s, vh = u[:, order], s[order], vh[order]
    residuals = torch.linalg.vector_norm(matrix @ vh.mT - u * s, dim=0).double()
    return Triplets(u, s, vh, residuals)
