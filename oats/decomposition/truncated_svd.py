"""Truncated singular value decompositions: of one matrix or a batch, and of a slowly changing one.

`truncated_svd` is the general solver, documented in docs/svd.md; `WarmSubspace` and `exact_low_rank` are the
low-rank steps of the alternating decomposition.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from oats.errors import ConfigError, WeightError

OVERSAMPLING = 32
"""Columns carried beyond the rank."""

START_PASSES = 8
"""Passes over the first matrix of a `WarmSubspace`. From a random start one is not enough: the thresholding
then settles on a support that fits the error of the subspace, and later passes do not undo that."""

BLOCK = 32
"""Columns of a Krylov block. Of 16, 32, 64 and 128, 32 is the fastest or within a tenth of it (docs/svd.md):
narrower blocks give a polynomial of higher degree for the same columns, wider ones a faster product."""


class _Factors(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class TruncatedSVD(_Factors):
    """``U, S, Vh`` of `truncated_svd`, which it unpacks to, and how good they are.

    Attributes:
        U: (…, m, rank), orthonormal columns.
        S: (…, rank), decreasing, not negative.
        Vh: (…, rank, n), orthonormal rows.
        error_bound: (…), float64, upper bound of ``‖A − U diag(S) Vh‖_F`` (and so of the spectral norm). It
            exceeds that norm by at most 0.1 % plus ``16 eps ‖A‖_F``.
        residuals: (…, rank), float64, ``‖A v_i − s_i u_i‖`` for each triplet. A has a singular value within
            that distance of ``s_i`` (Weyl), and the largest residual times √rank bounds the spectral norm of
            the change of A that makes all triplets exact. No residual shows a direction that was missed.
        passes: the most passes over one matrix that were made; each multiplies one block by A and one by Aᵀ.
            0 where the dense eigensolver did it.
        converged: (…), bool, whether the residuals are within `tol`.
    """

    error_bound: Tensor
    residuals: Tensor
    passes: int
    converged: Tensor

    @classmethod
    def _of(
        cls,
        factors: tuple[Tensor, Tensor, Tensor],
        error: Tensor,
        residuals: Tensor,
        passes: int,
        met: Tensor,
    ) -> TruncatedSVD:
        result = cls(*factors)
        result.error_bound, result.residuals, result.passes, result.converged = error, residuals, passes, met
        return result


def truncated_svd(
    A: Tensor,  # noqa: N803 - the name in torch.linalg.svd
    rank: int,
    *,
    warm_start: Tensor | None = None,
    oversample: int = OVERSAMPLING,
    power_passes: int | None = None,
    tol: float = 1e-2,
    seed: int = 0,
) -> TruncatedSVD:
    """The `rank` largest singular triplets of a matrix, or of each of a batch.

    Block Golub–Kahan–Lanczos with full reorthogonalisation and thick restarts (Golub, Luk and Overton, ACM
    TOMS 7(2), 1981; Baglama and Reichel, SIAM J. Sci. Comput. 27(1), 2005), from a random start as in
    randomized block Krylov methods (Musco and Musco, NeurIPS 2015). Where this would cost more than the
    eigenvalues of the Gram matrix in float64 (small matrices, ranks that are a large share of the matrix,
    flat spectra at a tight `tol`), those are computed instead. Products are in A's dtype, small core problems
    in float64. docs/svd.md has cost, accuracy and limits.

    Args:
        A: (m, n) or (B, m, n), float32 or float64, finite; any strides. Not changed. On the CPU the matrices
            of a batch are spread over torch's threads, one thread each.
        rank: 0 to min(m, n).
        warm_start: (…, k, n), rows near the leading right singular vectors, such as ``Vh`` of a similar
            matrix. None, or rows of which some are missing: filled up with random ones.
        oversample: columns of the basis beyond the rank when it is first tested, and that a restart keeps.
        power_passes: None: as many passes as `tol` takes. A number: subspace iteration instead, with so many
            power passes on a block of ``rank + oversample`` columns, whatever accuracy that gives.
        tol: stop once every ``‖A v_i − s_i u_i‖ ≤ tol · s_rank``, or is at the rounding level,
            ``64 eps s_1``. The values are far more accurate than the vectors: their error is about the square
            of it.
        seed: of the random start. The global random state is neither read nor changed.

    Returns:
        `TruncatedSVD`: unpacks to ``U, S, Vh``, in A's dtype, detached. Beyond the rank of A, S is at the
        rounding level and the vectors complete the orthonormal sets.

    Raises:
        WeightError: A or `warm_start` is not of an accepted shape or dtype, or is not finite.
        ConfigError: `rank`, `oversample`, `power_passes` or `tol` is out of range.

    >>> a = torch.arange(1.0, 13.0).reshape(4, 3)
    >>> U, S, Vh = result = truncated_svd(a, 2)
    >>> torch.allclose(U * S @ Vh, a, atol=1e-4)
    True
    >>> bool(result.error_bound < 1e-3)
    True
    """
    _check_matrix(A)
    _check_settings(A, rank, oversample, power_passes, tol)
    matrix = A.detach()
    start = _checked_start(warm_start, matrix)
    if matrix.ndim == 2:
        return _of_one(matrix, rank, start, oversample, power_passes, tol, seed)

    def solve(i: int) -> TruncatedSVD:
        return _of_one(
            matrix[i], rank, None if start is None else start[i], oversample, power_passes, tol, seed
        )

    batch = matrix.shape[0]
    threads = torch.get_num_threads()
    if matrix.is_cpu and min(batch, threads) > 1:
        # One thread a matrix: the eigensolvers of the core do not scale, and small products hardly do.
        try:
            with ThreadPoolExecutor(
                min(batch, threads), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                results = list(pool.map(solve, range(batch)))
        finally:
            # Threads that are started later would inherit the 1.
            torch.set_num_threads(threads)
    else:
        results = [solve(i) for i in range(batch)]
    return TruncatedSVD._of(
        (
            torch.stack([r.U for r in results]),
            torch.stack([r.S for r in results]),
            torch.stack([r.Vh for r in results]),
        ),
        torch.stack([r.error_bound for r in results]),
        torch.stack([r.residuals for r in results]),
        max(r.passes for r in results),
        torch.stack([r.converged for r in results]),
    )


def _of_one(
    matrix: Tensor,
    rank: int,
    start: Tensor | None,
    oversample: int,
    power_passes: int | None,
    tol: float,
    seed: int,
) -> TruncatedSVD:
    """`truncated_svd` of one (m, n)."""
    m, n = matrix.shape
    total = _squared_norm(matrix)
    # Products of n terms must stay in range. The norm, which is needed anyway, bounds the largest magnitude.
    scale = 1.0
    if not 1e-12 * math.sqrt(m * n) < math.sqrt(float(total)) < 1e12:
        peak = _peak(matrix)
        if peak and not 1e-12 < peak < 1e12:
            matrix, scale = matrix / peak, peak
            total = _squared_norm(matrix)
    if rank == 0 or float(total) == 0:
        factors = (
            torch.eye(m, rank, dtype=matrix.dtype, device=matrix.device),
            matrix.new_zeros(rank),
            torch.eye(rank, n, dtype=matrix.dtype, device=matrix.device),
        )
        return TruncatedSVD._of(
            factors,
            _error_bound(matrix, total, *factors) * scale,
            matrix.new_zeros(rank, dtype=torch.float64),
            0,
            torch.tensor(True, device=matrix.device),
        )
    found = None
    passes = 0
    if power_passes is not None:
        passes = power_passes + 1
        found = _subspace_iteration(matrix, rank, start, min(rank + oversample, m, n), passes, seed)
    elif 6 * (rank + oversample) < min(m, n) and min(m, n) > 8 * BLOCK:
        found, passes = _lanczos(matrix, rank, start, oversample, tol, seed)
    if found is None:
        found, passes = _dense(matrix, rank, tol), 0
    u, s, vh, residuals = found
    error = _error_bound(matrix, total, u, s, vh)
    # The residuals themselves are subject to rounding.
    residuals = residuals + 16 * torch.finfo(s.dtype).eps * s[0].double()
    met = bool(residuals.max() <= _allowed(s.double(), rank, tol, matrix.dtype))
    return TruncatedSVD._of(
        (u, s * scale, vh), error * scale, residuals * scale, passes, torch.tensor(met, device=matrix.device)
    )


_Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""U, S, Vh and the residuals."""


def _subspace_iteration(
    matrix: Tensor, rank: int, start: Tensor | None, width: int, passes: int, seed: int
) -> _Found:
    """Each pass multiplies `width` columns by the matrix and its transpose (Halko et al., algorithm 4.4)."""
    basis = _start_columns(matrix, start, width, seed)
    for _ in range(passes - 1):
        # Between products the columns only have to stay independent.
        basis = _well_conditioned(_transposed_product(matrix, _well_conditioned(matrix @ basis)))
    u, v = _rayleigh_ritz(matrix, torch.linalg.qr(matrix @ basis).Q)
    u = u[:, :rank]
    q, s = _unit_columns(v[:rank].mT)
    return _sorted_with_residuals(matrix, u, s, q.mT)


def _transposed_product(matrix: Tensor, block: Tensor) -> Tensor:
    """``matrixᵀ block``. MKL takes a third longer where a row-major matrix comes first and transposed."""
    return (block.mT @ matrix).mT


def _well_conditioned(block: Tensor) -> Tensor:
    """The same span with columns that are orthonormal, or nearly so: shifted Cholesky-QR, in half the time of
    Householder's (Fukaya et al., SIAM J. Sci. Comput. 42(1), 2020)."""
    gram = block.mT @ block
    shift = 16 * torch.finfo(block.dtype).eps * gram.diagonal().sum()
    factor, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram)).to(gram))
    if int(failed):  # a block of zeros
        q: Tensor = torch.linalg.qr(block).Q
        return q
    solved: Tensor = torch.linalg.solve_triangular(factor, block.mT, upper=False)
    return solved.mT


def _rayleigh_ritz(matrix: Tensor, q: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``q q^T matrix = u v``: u orthonormal, the rows of v orthogonal and of decreasing norm.

    v is a projection and not ``diag(s) Vᵀ``: each of its columns is accurate to the scale of that column.
    """
    return singular_order(q, q.mT @ matrix, metric)


def _lanczos(
    matrix: Tensor,
    rank: int,
    start: Tensor | None,
    oversample: int,
    tol: float,
    seed: int,
) -> tuple[_Found | None, int]:
    """Block Golub–Kahan–Lanczos, and its passes; None where the dense solver would be faster.

    Orthonormal rows ``left`` (size, m) and ``right`` (size, n) grow by one block a pass, and with ``core``
    (size, size) satisfy ``left @ matrix = core @ right`` and
    ``matrix @ right.T = left.T @ core + fresh @ triangle @ E``, E being the last rows of the identity. So the
    singular triplets of the core are those of the matrix but for the last term, which gives the residuals for
    nothing.
    """
    m, n = matrix.shape
    keep = rank + oversample
    # A warm start is one block: narrower ones would throw away the part of it that the first does not hold.
    width = BLOCK if start is None else keep
    capacity = min(max(2 * rank + 128, keep + 4 * width), m, n)
    affordable = _columns_of_dense(m, n)
    left, right = matrix.new_empty(capacity, m), matrix.new_empty(capacity, n)
    core = matrix.new_zeros(capacity, capacity, dtype=torch.float64)

    size = passes = 0
    next_test = keep
    before: tuple[int, float] | None = None
    fresh, _, _ = _orthogonalise(matrix @ _start_columns(matrix, start, width, seed), left[:0])
    while True:
        grown = size + width
        left[size:grown] = fresh.mT
        new, coefficients, triangle = _orthogonalise(_transposed_product(matrix, fresh), right[:size])
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
        excess = float(residuals.max()) / _allowed(s[:rank], rank, tol, matrix.dtype)
        if excess <= 1:
            break
        columns = passes * width
        if before is not None:
            # The residuals fall at least geometrically; the floor is for a test that saw no progress yet.
            rate = max(math.log(before[1] / excess) / (columns - before[0]), 1e-3)
            if math.log(excess) / rate > affordable or columns > 2 * affordable:
                return None, passes
        if before is None or columns >= before[0] + 2 * width:
            before = columns, excess
        # A test takes some size³ slow operations: after every pass where that is little beside the pass.
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
    return (u, s[order].to(matrix.dtype), vh, residuals[order]), passes


def _columns_of_dense(m: int, n: int) -> float:
    """Columns that Lanczos gets through in the time of `_dense`; measured on two cores, square and 1 : 4."""
    short, long = min(m, n), max(m, n)
    return short * (0.3 + 0.7 * short / long * short / 1024)


def _start_columns(matrix: Tensor, start: Tensor | None, width: int, seed: int) -> Tensor:
    """(n, width), from `start` as far as it goes, then random."""
    # Drawn on the CPU: the same seed starts alike on every device.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    columns = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32, device="cpu").to(
        matrix
    )
    if start is not None:
        given = start[:width].mT.to(matrix)
        columns[:, : given.shape[1]] = given
        # As long as the given ones: the pass weighs them alike.
        columns[:, given.shape[1] :] /= matrix.shape[1] ** 0.5
    return columns


def _orthogonalise(block: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``block = rows.T @ coefficients + q @ triangle`` with orthonormal columns of q, also against `rows`.

    Gram–Schmidt against `rows` twice, then Cholesky-QR with the Gram matrix in float64; again where the
    columns are so dependent that dividing by the triangle magnifies what is left of `rows`. Columns that are
    nothing but rounding are replaced by random ones, so q is complete for a matrix of any rank.

    Args:
        block: (n, b).
        rows: (size, n), orthonormal.

    Returns:
        q: (n, b).
        coefficients: (size, b), float64.
        triangle: (b, b), float64.
    """
    width = block.shape[1]
    coefficients = block.new_zeros(rows.shape[0], width, dtype=torch.float64)
    triangle = torch.eye(width, dtype=torch.float64, device=block.device)
    # Cholesky-QR in float64 loses the square of this: nothing for float32.
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
        # How much of each column the last projection and the columns before it have left.
        left = float((factor.diagonal() / before).min())
        if int(failed) or not left > 1e-6:
            size = max(torch.finfo(q.dtype).eps * float(q.abs().max()), 1e-30)
            generator = torch.Generator(device="cpu").manual_seed(attempt)
            noise = torch.randn(q.shape, generator=generator, dtype=torch.float32, device="cpu")
            q, step = torch.linalg.qr(q + size * noise.to(q))
            triangle, left = step.double() @ triangle, 0.0
        else:
            identity = torch.eye(width, dtype=torch.float64, device=block.device)
            q = q @ torch.linalg.solve_triangular(factor.mT, identity, upper=True).to(q)
            triangle = factor.mT @ triangle
        if left > enough:
            break
    return q, coefficients, triangle


def _left_vectors(core: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of a small float64 matrix, decreasing; half the time of the SVD."""
    values, vectors = torch.linalg.eigh(core @ core.mT)
    return vectors.flip(1), values.flip(0).clamp_min(0).sqrt()


def _right_vectors(core: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The right singular vectors to given left ones, complete where values vanish, and the values."""
    return _unit_columns(core.mT @ left)


def _unit_columns(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal columns, made orthonormal and complete where they vanish, and their norms."""
    q, triangle = torch.linalg.qr(columns)
    diagonal = triangle.diagonal()
    return q * torch.where(diagonal < 0, -1.0, 1.0).to(q), diagonal.abs()


def _dense(matrix: Tensor, rank: int, tol: float) -> _Found:
    """The triplets from the eigenvectors of the smaller Gram matrix."""
    m, n = matrix.shape
    if matrix.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return _sorted_with_residuals(matrix, u[:, :rank], s[:rank], vh[:rank])
    if m < n:
        v, s, uh, _ = _dense(matrix.mT, rank, tol)
        return _sorted_with_residuals(matrix, uh.mT, s, v.mT)
    width = min(rank + OVERSAMPLING, n)
    if 4 * width <= n:
        # In float32 half the time; one pass over the few that are wanted makes up for what it loses, unless
        # they are far below the largest.
        vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[:, n - width :].mT.flip(0)
        found = _subspace_iteration(matrix, rank, vectors, width, 1, 0)
        if _within(found, rank, tol):
            return found
    wide = matrix.double()
    v = torch.linalg.eigh(wide.mT @ wide).eigenvectors[:, n - rank :].flip(1)
    # Not the square roots of the eigenvalues, which have lost what is below 1e-8 of the largest.
    u, s, v = (part.to(matrix.dtype) for part in (*_unit_columns(wide @ v), v))
    return _sorted_with_residuals(matrix, u, s, v.mT)


def _sorted_with_residuals(matrix: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> _Found:
    # Values that are equal but for rounding can have changed places.
    order = s.argsort(descending=True, stable=True)
    u, s, vh = u[:, order], s[order], vh[order]
    residuals = torch.linalg.vector_norm(matrix @ vh.mT - u * s, dim=0).double()
    return u, s, vh, residuals


def _within(found: _Found, rank: int, tol: float) -> bool:
    _, s, _, residuals = found
    return bool(residuals.max() <= _allowed(s.double(), rank, tol, s.dtype))


def _allowed(s: Tensor, rank: int, tol: float, dtype: torch.dtype) -> float:
    """The largest residual that `tol` lets pass."""
    return max(tol * float(s[rank - 1]), 64 * torch.finfo(dtype).eps * float(s[0]))


def _peak(matrix: Tensor) -> float:
    """The largest magnitude; not finite is an error."""
    low, high = (float(extreme) for extreme in torch.aminmax(matrix))
    peak = max(-low, high)
    if not math.isfinite(peak):  # aminmax passes NaN on
        bad = (~torch.isfinite(matrix)).nonzero()
        raise WeightError(
            f"A: {len(bad)} of its {matrix.numel()} values are NaN or infinite, the first at "
            f"{bad[0].tolist()}; repair or drop them first"
        )
    return peak


def _error_bound(matrix: Tensor, total: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    """Upper bound of ``‖matrix − u s vh‖_F``, float64; `total` is ``‖matrix‖_F²``."""
    eps = torch.finfo(matrix.dtype).eps
    # Pythagoras, because s vh is the projection of the matrix on u; where it would cancel, the difference.
    rest = total - s.double().square().sum()
    if float(rest) > 1e-3 * float(total):
        return (rest + 8 * eps * total).sqrt()
    rest = matrix.new_zeros((), dtype=torch.float64)
    # So few rows that their difference stays in a CPU's cache.
    count = 1024 if matrix.is_cuda else 128
    difference = torch.empty_like(matrix[:count])
    for rows, left in zip(matrix.split(count), (u * s).split(count), strict=True):
        rest += _squared_norm(torch.addmm(rows, left, vh, alpha=-1, out=difference[: len(rows)]))
    return 1.0005 * rest.sqrt() + 8 * eps * total.sqrt()


def _squared_norm(matrix: Tensor) -> Tensor:
    # By row, so that float32 sums stay short.
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms.double().square().sum()


def _check_matrix(matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise WeightError(f"A must be a torch.Tensor, got {type(matrix).__name__}")
    if matrix.ndim not in (2, 3) or 0 in matrix.shape:
        raise WeightError(
            f"A must have shape (m, n) or (B, m, n) with every size at least 1, got {tuple(matrix.shape)}"
        )
    if matrix.dtype not in (torch.float32, torch.float64) or matrix.layout != torch.strided or matrix.is_meta:
        raise WeightError(
            f"A must be a dense float32 or float64 tensor, got {matrix.dtype}, layout {matrix.layout}, on "
            f"{matrix.device}; convert it first"
        )


def _check_settings(matrix: Tensor, rank: int, oversample: int, power_passes: int | None, tol: float) -> None:
    most = min(matrix.shape[-2:])
    if not 0 <= rank <= most:
        raise ConfigError(f"rank must be from 0 to min(m, n) = {most}, got {rank}")
    if oversample < 0:
        raise ConfigError(f"oversample must be at least 0, got {oversample}")
    if power_passes is not None and power_passes < 0:
        raise ConfigError(f"power_passes must be at least 0 or None, got {power_passes}")
    if not 0 <= tol < math.inf:
        raise ConfigError(f"tol must be at least 0 and finite, got {tol}")


def _checked_start(start: Tensor | None, matrix: Tensor) -> Tensor | None:
    if start is None:
        return None
    expected = (*matrix.shape[:-2], start.shape[-2] if start.ndim > 1 else 1, matrix.shape[-1])
    if tuple(start.shape) != expected or not bool(torch.isfinite(start).all()):
        raise WeightError(
            f"warm_start must be finite and have shape {(*matrix.shape[:-2], 'k', matrix.shape[-1])}, got "
            f"{tuple(start.shape)}; pass the Vh of a similar matrix"
        )
    return start.detach().to(matrix)


def exact_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation ``u @ v`` from the full SVD (Eckart–Young).

    Args:
        matrix: (…, m, n), float32 or float64.
        rank: 0 to min(m, n).

    Returns:
        u: (…, m, rank), orthonormal columns, in decreasing order of singular value.
        v: (…, rank, n), orthogonal rows of norm equal to the singular values.

    >>> u, v = exact_low_rank(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (u @ v).abs()
    tensor([[3., 0.],
            [0., 0.]])
    """
    u = torch.linalg.svd(matrix, full_matrices=False).U[..., :rank]
    # Not diag(s) Vᵀ: the projection makes each column of v accurate to the scale of that column, and
    # columns span decades once they carry the second moments.
    return u, u.mT @ matrix


class WarmSubspace:
    """Rank-r approximations of a slowly changing matrix, by block power iteration.

    The first matrix takes several passes from a random start on `oversampling` columns more than the rank.
    From then on one pass, of as many columns as the rank, follows it: `follow` where the difference to the
    last approximation is at hand, `approximate` where only the matrix is.

    Args:
        shape: (m, n) of every matrix; rank + oversampling must be at most min(m, n).
        rank: of the approximations, at least 1.
        seed: of the random start; the global random state is neither read nor changed.
        device: where the matrices live.
        oversampling: columns carried beyond the rank by `approximate`.
        metric: G, (n, n), symmetric positive semi-definite: they are nearest in ``‖E G^½‖_F``. None is the
            identity. Left vectors are what is iterated, so that no root of G is needed.

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
        shape: tuple[int, int],
        rank: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        oversampling: int = OVERSAMPLING,
        metric: Tensor | None = None,
    ) -> None:
        # Drawn on the CPU: the same seed starts alike on every device.
        generator = torch.Generator(device="cpu").manual_seed(seed)
        start = torch.randn(
            shape[1], rank + oversampling, generator=generator, dtype=torch.float32, device="cpu"
        )
        self._rank, self._metric = rank, metric
        self._basis = start.to(device)
        self._passes = START_PASSES
        self._last: tuple[Tensor, Tensor] | None = None

    def approximate(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Near-best rank-r approximation ``u @ v`` of the next matrix.

        A power pass from the dominant right subspace of the matrix before it, then Rayleigh–Ritz (Halko,
        Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 4.4).

        Args:
            matrix: (m, n), float32; or (batch, m, n), as all matrices are then.

        Returns:
            u, v: as from `exact_low_rank`.
        """
        # Householder, not Cholesky: it keeps directions far below the largest, which later passes would not
        # find again, and completes the basis of a rank-deficient product.
        for _ in range(self._passes - 1):
            rows = torch.linalg.qr(matrix @ self._basis).Q.mT @ matrix
            self._basis = torch.linalg.qr(self._weighed(rows)).Q
        u, v = _rayleigh_ritz(matrix, torch.linalg.qr(matrix @ self._basis).Q, self._metric)
        self._basis, self._passes = self._weighed(v), 1
        self._last = u[..., : self._rank], v[..., : self._rank, :]
        return self._last

    def follow(self, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Near-best rank-r approximation of the last one plus `difference`.

        Orthogonal iteration, ``q = orth(A G Aᵀ u)``, without a metric ``q = orth(A vᵀ)``, and ``v = qᵀ A``,
        with ``A = u v + difference``. It needs no rotation because nothing is cut off. The products of the
        large part, u v, are small ones in float32. So the difference may be rounded: its rounding is relative
        to itself, and no direction is lost that is small beside the largest.

        Args:
            difference: (…, m, n), float32, or bfloat16, whose products are then computed from bfloat16 too.

        Returns:
            u: (…, m, rank), float32, orthonormal columns.
            v: (…, rank, n), float32, ``uᵀ A``. Its rows are not orthogonal: `singular_order` makes them so.

        Raises:
            RuntimeError: before the first `approximate`.
        """
        if self._last is None:
            raise RuntimeError("follow() before approximate(): there is no approximation to follow")
        u, v = self._last
        # In a metric what the difference adds to ``uᵀ A`` too; without one it gains too little for its time.
        basis = self._weighed(v if self._metric is None else v + _product(u.mT, difference))
        q = _orthonormal(add_product(_product(difference, basis), u, v @ basis))
        v = add_product(_product(q.mT, difference), q.mT @ u, v)
        self._basis, self._last = basis, (q, v)
        return self._last

    def _weighed(self, rows: Tensor) -> Tensor:
        """``G rowsᵀ``."""
        return rows.mT if self._metric is None else self._metric @ rows.mT


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of columns (…, m, r) that are nearly orthogonal already.

    Cholesky-QR, after each column got length one: half to a third of Householder's time. What it loses of the
    orthogonality grows with the square of the condition, so that Householder takes over where a column has
    lost most of its length to those before it.
    """
    scaled = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    factor, failed = torch.linalg.cholesky_ex((scaled.mT @ scaled).double())
    # Not `< 0.3`: a NaN, of a column of zeros, must not pass.
    if failed.any() or not factor.diagonal(dim1=-2, dim2=-1).min() >= 0.3:
        basis: Tensor = torch.linalg.qr(columns).Q
        return basis
    identity = torch.eye(columns.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).mT.to(columns.dtype)
    basis = scaled @ inverse
    return basis


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, of factors that are rounded to bfloat16 if one is."""
    if torch.bfloat16 in (a.dtype, b.dtype):
        return (a.bfloat16() @ b.bfloat16()).float()
    return a @ b


def add_product(base: Tensor, a: Tensor, b: Tensor, alpha: float = 1, *, out: Tensor | None = None) -> Tensor:
    """``base + alpha a @ b`` of matrices, or batches of matrices (batch, m, n); without `out` in `base`.

    >>> add_product(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2, 1), -1)
    tensor([[-1.]])
    """
    multiply = torch.addmm if base.dim() == 2 else torch.baddbmm
    return multiply(base, a, b, alpha=alpha, out=base if out is None else out)


def singular_order(u: Tensor, v: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same product ``u @ v`` with rows of v that are orthogonal and of decreasing norm.

    Args:
        u: (…, m, rank), orthonormal columns.
        v: (…, rank, n).
        metric: (n, n), in which rows are orthogonal; None is the identity.

    Returns:
        u, v: as from `exact_low_rank`.

    >>> u, v = singular_order(torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    >>> v.abs()
    tensor([[2., 0.],
            [0., 1.]])
    """
    # The Gram matrix squares the condition number, so in float64; it is small.
    wide = v.double()
    weighed = wide if metric is None else (v @ metric).double()
    rotation = torch.linalg.eigh(weighed @ wide.mT).eigenvectors.flip(-1).to(v.dtype)
    return u @ rotation, rotation.mT @ v
