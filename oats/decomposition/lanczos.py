"""Block Golub–Kahan–Lanczos with thick restarts, for the leading singular triplets of one matrix.

Golub, Luk and Overton, ACM TOMS 7(2), 1981; Baglama and Reichel, SIAM J. Sci. Comput. 27(1), 2005.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oats.decomposition import triplets
from oats.decomposition.subspace import random_columns
from oats.decomposition.triplets import Triplets, unit_columns

BLOCK = 32
"""Columns of a Krylov block. Of 16, 32, 64 and 128, 32 is the fastest or within a tenth of it (docs/svd.md):
for the same columns, narrower blocks give a polynomial of higher degree, wider ones a faster product."""


def lanczos(
    matrix: Tensor, rank: int, start: Tensor | None, oversample: int, tol: float, seed: int
) -> tuple[Triplets | None, int]:
    """The `rank` leading triplets, and the number of passes; None if the Gram matrix would be faster.

    Orthonormal rows ``left`` (size, m) and ``right`` (size, n) grow by one block a pass. With ``core``
    (size, size) they satisfy ``left @ matrix = core @ right`` and
    ``matrix @ right.T = left.T @ core + fresh @ triangle @ E``, where E is the last rows of the identity. So
    the singular triplets of the core are those of the matrix up to the last term, which gives the residuals
    at no cost.

    The arguments are those of :func:`oats.truncated_svd`; the rank is at least 1, and the matrix large enough
    for one block beside the columns that a restart keeps.
    """
    m, n = matrix.shape
    keep = rank + oversample
    # A warm start is one block: a narrower one would drop the rows that do not fit into it.
    width = BLOCK if start is None else keep
    capacity = min(max(2 * rank + 128, keep + 4 * width), m, n)
    affordable = _affordable_columns(m, n)
    left, right = matrix.new_empty(capacity, m), matrix.new_empty(capacity, n)
    core = matrix.new_zeros(capacity, capacity, dtype=torch.float64)

    size = passes = 0
    next_test = keep
    before: tuple[int, float] | None = None
    fresh, _, _ = _orthogonalise(matrix @ triplets.start_columns(matrix, start, width, seed), left[:0])
    while True:
        grown = size + width
        left[size:grown] = fresh.mT
        new, coefficients, triangle = _orthogonalise(triplets.transposed_product(matrix, fresh), right[:size])
        right[size:grown] = new.mT
        core[size:grown, :size], core[size:grown, size:grown] = coefficients.mT, triangle.mT
        size, passes = grown, passes + 1
        fresh, _, triangle = _orthogonalise(matrix @ new, left[:size])

        if size < next_test and size + width <= capacity:
            continue
        inner = core[:size, :size]
        p, s = _left_vectors(inner)
        q = (inner.mT @ p[:, :rank]) / s[:rank].clamp_min(1e-8 * float(s[0]))
        residuals = torch.linalg.vector_norm(triangle @ q[-width:], dim=0)
        excess = float(residuals.max()) / triplets.largest_residual(s[:rank], tol, matrix.dtype)
        if excess <= 1:
            break
        columns = passes * width
        if before is not None:
            # The residuals fall at least geometrically. The least rate stands for no progress so far.
            rate = max(math.log(before[1] / excess) / (columns - before[0]), 1e-3)
            if math.log(excess) / rate > affordable or columns > 2 * affordable:
                return None, passes
        if before is None or columns >= before[0] + 2 * width:
            before = columns, excess
        # A test takes about size³ slow operations: test after every pass where that is cheap beside the pass.
        next_test = size + (width if 7 * size**3 < m * n else max(2 * width, size // 4))
        if size + width > capacity:
            kept = min(keep, capacity - width)
            q, s = _right_vectors(inner, p[:, :kept])
            left[:kept] = p[:, :kept].mT.to(left) @ left[:size]
            right[:kept] = q.mT.to(right) @ right[:size]
            core.zero_()
            core[:kept, :kept] = s.diag()
            size, next_test = kept, capacity

    p = p[:, :rank]
    q, s = _right_vectors(inner, p)
    order = s.argsort(descending=True, stable=True)
    u = left[:size].mT @ p[:, order].to(left)
    vh = q[:, order].mT.to(right) @ right[:size]
    return Triplets(u, s[order].to(matrix.dtype), vh, residuals[order]), passes


def _affordable_columns(m: int, n: int) -> float:
    """Columns that Lanczos processes in the time of the Gram matrix (on two cores, square and 1 : 4)."""
    short, long = min(m, n), max(m, n)
    return short * (0.3 + 0.7 * short / long * short / 1024)


def _orthogonalise(block: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``block = rows.T @ coefficients + q @ triangle``; q has orthonormal columns, orthogonal to `rows`.

    Gram–Schmidt against `rows` twice, then Cholesky-QR with the Gram matrix in float64. Both are repeated
    where the columns are so dependent that dividing by the triangle magnifies what remains along `rows`.
    Random columns replace those that are only rounding, so q is complete for a matrix of any rank. Of a block
    (n, b) and orthonormal rows (size, n), q is (n, b), and in float64 the coefficients (size, b) and the
    triangle (b, b).
    """
    width = block.shape[1]
    coefficients = block.new_zeros(rows.shape[0], width, dtype=torch.float64)
    triangle = torch.eye(width, dtype=torch.float64, device=block.device)
    # Cholesky-QR in float64 loses the square of this, which float32 does not see.
    enough = 0.1 if block.dtype == torch.float32 else 0.9
    q = block
    for attempt in range(4):
        for _ in range(2 if attempt == 0 else 1):
            before = torch.linalg.vector_norm(q, dim=0, dtype=torch.float64)
            part = rows @ q
            q = torch.addmm(q, rows.mT, part, alpha=-1)
            coefficients += part.double() @ triangle
        wide = q.double()
        factor, failed = torch.linalg.cholesky_ex(wide.mT @ wide)
        # The share of each column that the last projection and the columns before it have left.
        left = float((factor.diagonal() / before).min())
        if int(failed) or not left > 1e-6:
            size = max(torch.finfo(q.dtype).eps * float(q.abs().max()), 1e-30)
            q, step = torch.linalg.qr(q + size * random_columns(len(q), width, attempt).to(q))
            triangle, left = step.double() @ triangle, 0.0
        else:
            identity = torch.eye(width, dtype=torch.float64, device=block.device)
            q = q @ torch.linalg.solve_triangular(factor.mT, identity, upper=True).to(q)
            triangle = factor.mT @ triangle
        if left > enough:
            break
    return q, coefficients, triangle


def _left_vectors(core: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and decreasing values of a small float64 matrix, in half the time of an SVD."""
    values, vectors = torch.linalg.eigh(core @ core.mT)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def _right_vectors(core: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The right singular vectors that belong to the left ones, complete where values vanish; the values."""
    return unit_columns(core.mT @ left)
