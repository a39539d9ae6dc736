"""`truncated_svd`: the largest singular triplets of a matrix, or of each matrix of a batch (docs/svd.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from oats.decomposition.lanczos import BLOCK, lanczos
from oats.decomposition.subspace import OVERSAMPLING
from oats.decomposition.triplets import Triplets, by_gram_matrix, subspace_iteration
from oats.errors import ConfigError, WeightError
from oats.kernels.keep_largest import row_norms


class _Factors(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


class TruncatedSVD(_Factors):
    """The result of `truncated_svd`. It unpacks to ``U, S, Vh``, and says how accurate they are.

    Attributes:
        U: (…, m, rank), orthonormal columns.
        S: (…, rank), decreasing, not negative.
        Vh: (…, rank, n), orthonormal rows.
        error_bound: (…), float64, upper bound of ``‖A − U diag(S) Vh‖_F`` and so of the spectral norm. It
            exceeds that Frobenius norm by at most 0.1 % plus ``16 eps ‖A‖_F``.
        residuals: (…, rank), float64, ``‖A v_i − s_i u_i‖`` for each triplet. A has a singular value within
            that distance of ``s_i`` (Weyl). A change of A whose spectral norm is at most √rank times the
            largest residual makes all triplets exact. Residuals cannot show a direction that was missed.
        passes: the largest number of passes made over one matrix. A pass multiplies one block by A and one
            by Aᵀ. 0 if the Gram matrix was used.
        converged: (…), bool, True where the residuals are within `tol`.
    """

    error_bound: Tensor
    residuals: Tensor
    passes: int
    converged: Tensor

    @classmethod
    def _of(
        cls, factors: Iterable[Tensor], bound: Tensor, residuals: Tensor, passes: int, converged: Tensor
    ) -> TruncatedSVD:
        result = cls(*factors)
        result.error_bound, result.residuals = bound, residuals
        result.passes, result.converged = passes, converged
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
    """The `rank` largest singular triplets of a matrix, or of each matrix of a batch.

    Block Golub–Kahan–Lanczos with full reorthogonalisation and thick restarts (Golub, Luk and Overton, ACM
    TOMS 7(2), 1981; Baglama and Reichel, SIAM J. Sci. Comput. 27(1), 2005). It starts at random, like
    randomized block Krylov methods (Musco and Musco, NeurIPS 2015). The eigenvalues of the Gram matrix in
    float64 are computed instead where they cost less: small matrices, ranks that are a large share of the
    matrix, flat spectra at a tight `tol`. Products are in A's dtype, small core problems in float64.
    docs/svd.md has cost, accuracy and limits.

    Args:
        A: (m, n) or (B, m, n), float32 or float64, finite, any strides. Not changed. On the CPU each matrix
            of a batch gets one of torch's threads.
        rank: 0 to min(m, n).
        warm_start: (…, k, n), rows near the leading right singular vectors, such as ``Vh`` of a similar
            matrix. Random rows fill it up. None: all are random.
        oversample: columns beyond the rank that the basis has at the first test, and that a restart keeps.
        power_passes: None: as many passes as `tol` needs. A number: subspace iteration with that number of
            power passes on ``rank + oversample`` columns, whatever accuracy that gives.
        tol: stop once every ``‖A v_i − s_i u_i‖`` is at most ``tol · s_rank``, or at the rounding level,
            ``64 eps s_1``. The values are far more accurate than the vectors: their error is about the square
            of it.
        seed: of the random start. The global random state is neither read nor changed.

    Returns:
        `TruncatedSVD`: unpacks to ``U, S, Vh``, in A's dtype, detached. Beyond the rank of A, S is at the
        rounding level, and the vectors complete the orthonormal sets.

    Raises:
        WeightError: A or `warm_start` has a wrong shape or dtype, or is not finite.
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
        own_start = None if start is None else start[i]
        return _of_one(matrix[i], rank, own_start, oversample, power_passes, tol, seed)

    batch = matrix.shape[0]
    threads = torch.get_num_threads()
    if matrix.is_cpu and min(batch, threads) > 1:
        # One thread a matrix: eigensolvers of the small core do not gain from more, small products hardly do.
        try:
            with ThreadPoolExecutor(min(batch, threads), "", torch.set_num_threads, (1,)) as pool:
                results = list(pool.map(solve, range(batch)))
        finally:
            # Threads started later would inherit the 1.
            torch.set_num_threads(threads)
    else:
        results = [solve(i) for i in range(batch)]
    return TruncatedSVD._of(
        [torch.stack(factors) for factors in zip(*results, strict=True)],
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
    m, n = matrix.shape
    total = _squared_norm(matrix)
    # Products of n terms must stay in range. The norm is needed anyway, and bounds the largest magnitude.
    scale = 1.0
    if not 1e-12 * math.sqrt(m * n) < math.sqrt(float(total)) < 1e12:
        peak = _peak(matrix)
        if peak and not 1e-12 < peak < 1e12:
            matrix, scale = matrix / peak, peak
            total = _squared_norm(matrix)
    found: Triplets | None = None
    passes = 0
    if rank == 0 or float(total) == 0:
        u, vh = (torch.eye(*shape).to(matrix) for shape in ((m, rank), (rank, n)))
        found = Triplets(u, matrix.new_zeros(rank), vh, matrix.new_zeros(rank, dtype=torch.float64))
    elif power_passes is not None:
        passes = power_passes + 1
        found = subspace_iteration(matrix, rank, start, min(rank + oversample, m, n), passes, seed)
    elif 6 * (rank + oversample) < min(m, n) and min(m, n) > 8 * BLOCK:
        found, passes = lanczos(matrix, rank, start, oversample, tol, seed)
    if found is None:
        found, passes = by_gram_matrix(matrix, rank, tol), 0
    u, s, vh, residuals = found
    error = _error_bound(matrix, total, u, s, vh)
    # The residuals are rounded, too.
    residuals = residuals + 16 * torch.finfo(s.dtype).eps * s[:1].double()
    converged = torch.tensor(Triplets(u, s, vh, residuals).within(tol), device=matrix.device)
    return TruncatedSVD._of((u, s * scale, vh), error * scale, residuals * scale, passes, converged)


def _peak(matrix: Tensor) -> float:
    """The largest magnitude; WeightError if it is not finite."""
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
    # By Pythagoras, because s vh is the projection of the matrix on u; where that cancels, by subtraction.
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
    return row_norms(matrix).square().sum()


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
