"""Low-rank approximations of a matrix that changes little from one step of an alternation to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oats.kernels.isa import active_isa

OVERSAMPLING = 32
"""Columns of a subspace beyond the rank."""

START_PASSES = 8
"""Passes over the first matrix. One pass from a random start is too few: the alternation then settles on a
support that fits the error of the subspace, and later passes do not repair that."""

BFLOAT16_FROM = 2**20
"""Weights with at least this many elements are multiplied in bfloat16 where that is several times faster than
float32. In smaller ones the products take little of the time."""


class WarmSubspace:
    """Rank-r approximations of a slowly changing matrix, by block power iteration.

    Call `approximate` for the first matrix: it makes several passes from a random start, on `oversampling`
    columns more than the rank. For each later matrix call `follow` if you have its difference to the last
    approximation (one pass, as many columns as the rank), else `approximate` (one pass, oversampled).

    Args:
        shape: (m, n) of every matrix; rank + oversampling must be at most min(m, n).
        rank: of the approximations, at least 1.
        seed: of the random start. The global random state is neither read nor changed.
        oversampling: extra columns of `approximate`.
        metric: G, (n, n), symmetric positive semi-definite. The approximations are nearest in ``‖E G^½‖_F``.
            None means the identity. No root of G is needed, because the left vectors are iterated.

    >>> subspace = WarmSubspace((40, 30), 2, oversampling=4)
    >>> matrix = torch.outer(torch.arange(40.0), torch.arange(30.0))
    >>> u, v = subspace.approximate(matrix)
    >>> torch.allclose(u @ v, matrix, rtol=1e-4, atol=1e-2)
    True
    >>> u, v = subspace.follow(2 * matrix - u @ v)
    >>> torch.allclose(u @ v, 2 * matrix, rtol=1e-4, atol=1e-2)
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        oversampling: int = OVERSAMPLING,
        metric: Tensor | None = None,
    ) -> None:
        self._rank, self._metric = rank, metric
        self._basis = random_columns(shape[1], rank + oversampling, seed).to(device)
        self._passes = START_PASSES
        self._last: tuple[Tensor, Tensor] | None = None

    def approximate(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Near-best rank-r approximation ``u @ v`` of the next matrix.

        One power pass from the dominant right subspace of the last matrix, then Rayleigh–Ritz (Halko,
        Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 4.4).

        Args:
            matrix: (m, n), float32; or (batch, m, n) in every call.

        Returns:
            u, v: as from `exact_low_rank`.
        """
        # Householder, not Cholesky: it keeps directions far below the largest, which later passes would not
        # find again, and it completes the basis of a rank-deficient product.
        for _ in range(self._passes - 1):
            rows = torch.linalg.qr(matrix @ self._basis).Q.mT @ matrix
            self._basis = torch.linalg.qr(self._weighed(rows)).Q
        u, v = rayleigh_ritz(matrix, torch.linalg.qr(matrix @ self._basis).Q, self._metric)
        self._basis, self._passes = self._weighed(v), 1
        self._last = u[..., : self._rank], v[..., : self._rank, :]
        return self._last

    def follow(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Near-best rank-r approximation of ``A = u v + difference``, where ``u v`` is the last one.

        Orthogonal iteration: ``q = orth(A G Aᵀ u)``, or ``q = orth(A vᵀ)`` without a metric; then
        ``v = qᵀ A``. No column is dropped, so no rotation is needed. The products with ``u v``, the large
        part of A, are small and in float32. So `difference` may be rounded: the error is relative to
        `difference` alone, and directions that are small beside the largest survive.

        Args:
            difference: (…, m, n), float32; or bfloat16, then its products are computed from bfloat16 too.

        Returns:
            u: (…, m, rank), float32, orthonormal columns.
            v: (…, rank, n), float32, ``uᵀ A``. `singular_order` makes its rows orthogonal.

        Raises:
            RuntimeError: before the first `approximate`.
        """
        if self._last is None:
            raise RuntimeError("follow() before approximate(): there is no approximation to follow")
        u, v = self._last
        # Only with a metric is what the difference adds to ``uᵀ A`` worth its time.
        basis = self._weighed(v if self._metric is None else v + _product(u.mT, difference))
        q = _orthonormal(add_product(_product(difference, basis), u, v @ basis))
        v = add_product(_product(q.mT, difference), q.mT @ u, v)
        self._basis, self._last = basis, (q, v)
        return self._last

    def _weighed(self, rows: Tensor) -> Tensor:
        """``G rowsᵀ``."""
        return rows.mT if self._metric is None else self._metric @ rows.mT


def random_columns(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) float32, on the CPU, so that a seed gives the same on every device."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


def exact_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation ``u @ v`` from the full SVD (Eckart–Young).

    Args:
        matrix: (…, m, n), float32 or float64.
        rank: 0 to min(m, n).

    Returns:
        u: (…, m, rank), orthonormal columns, in decreasing order of singular value.
        v: (…, rank, n), orthogonal rows; their norms are the singular values.

    >>> u, v = exact_low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (u @ v).abs()
    tensor([[3., 0.],
            [0., 0.]])
    """
    u = torch.linalg.svd(matrix, full_matrices=False).U[..., :rank]
    # The projection, not diag(s) Vᵀ: each column of v is then accurate at its own scale, and once columns
    # carry the second moments their scales span decades.
    return u, u.mT @ matrix


def rayleigh_ritz(matrix: Tensor, q: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``q qᵀ matrix = u v`` for orthonormal columns q: u and v as from `exact_low_rank`."""
    return singular_order(q, q.mT @ matrix, metric)


def singular_order(u: Tensor, v: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same product ``u @ v``, with orthogonal rows of v in order of decreasing norm.

    Args:
        u: (…, m, rank), orthonormal columns.
        v: (…, rank, n).
        metric: (n, n), in which the rows become orthogonal; None means the identity.

    Returns:
        u, v: as from `exact_low_rank`.

    >>> u, v = singular_order(torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    >>> v.abs()
    tensor([[2., 0.],
            [0., 1.]])
    """
    # The Gram matrix squares the condition number, so it is in float64; it is small.
    wide = v.double()
    weighed = wide if metric is None else (v @ metric).double()
    rotation = torch.linalg.eigh(weighed @ wide.mT).eigenvectors.flip(-1).to(v.dtype)
    return u @ rotation, rotation.mT @ v


def add_product(base: Tensor, a: Tensor, b: Tensor, alpha: float = 1, *, out: Tensor | None = None) -> Tensor:
    """``base + alpha a @ b`` of matrices or batches of matrices, written to `out`; by default to `base`.

    >>> add_product(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2, 1), -1)
    tensor([[-1.]])
    """
    multiply = torch.addmm if base.dim() == 2 else torch.baddbmm
    return multiply(base, a, b, alpha=alpha, out=base if out is None else out)


def difference_dtype(scaled: Tensor) -> torch.dtype:
    """The dtype in which :meth:`WarmSubspace.follow` multiplies matrices of this shape on this device."""
    has_products = active_isa() in ("avx512_bf16", "amx_bf16") and torch.backends.mkldnn.is_available()
    supported = scaled.is_cuda or has_products
    size = scaled.shape[-2] * scaled.shape[-1]
    return torch.bfloat16 if supported and size >= BFLOAT16_FROM else torch.float32


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal basis of the span of columns (…, m, r) that are nearly orthogonal already.

    Scales each column to length one, then Cholesky-QR: a third to a half of the time of Householder's QR. Its
    loss of orthogonality grows with the square of the condition number. So Householder takes over where a
    column lies mostly in the span of those before it.
    """
    scaled = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex((scaled.mT @ scaled).double())
    # `not >=` instead of `<`: a column of zeros gives NaN, which must go to Householder.
    if failed.any() or not factor.diagonal(dim1=-2, dim2=-1).min() >= 0.3:
        return torch.linalg.qr(columns).Q  # type: ignore[no-any-return]
    identity = torch.eye(columns.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    return scaled @ inverse.to(columns.dtype)  # type: ignore[no-any-return]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32; if one factor is bfloat16, the other is rounded to it."""
    if torch.bfloat16 in (a.dtype, b.dtype):
        return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b
