"""Integer codes for one matrix: int8, or 2 to 4 bits with a codebook.

A code stands for itself (int8) or for its level in the codebook, times a scale that `scale_columns`
neighbours in a row share. The codebook has the same levels of each sign, and no zero: few kept values are
near it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from oats.decomposition.error_feedback import inverse_factor, settle_columns

LARGEST_CODE = 127

# Elements whose scales are fitted at once: about 30 MB of float32 for each of a few copies.
_CHUNK = 1 << 23

# The levels are fitted in this number of rounds, on about this number of rows.
_ROUNDS = 8
_SAMPLE_ROWS = 256

# The scales that are tried: these shares of the one that maps the largest magnitude to the largest level.
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)


def round_to_int8(matrix: Tensor, scale_columns: int) -> tuple[Tensor, Tensor]:
    """The nearest int8 codes of a float32 matrix. The largest magnitude under each scale becomes 127.

    Returns:
        codes: (rows, columns) int8.
        scale: (rows, ceil(columns / scale_columns)) bfloat16.
    """
    rows, columns = matrix.shape
    padded = nn.functional.pad(matrix, (0, -columns % scale_columns))
    largest = padded.view(rows, padded.shape[1] // scale_columns, scale_columns).abs().amax(-1)
    scale = (largest / LARGEST_CODE).bfloat16()
    each = scale.float().repeat_interleave(scale_columns, 1)[:, :columns]
    codes = _nearest_int8((matrix / each).nan_to_num_(0))
    return codes.to(torch.int8), scale


def sparse_to_int8(
    sparse: Tensor, kept: Tensor, scale_columns: int, hessian: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """int8 codes of a sparse matrix, and their scale, as :func:`round_to_int8` returns them.

    Args:
        sparse: (d_out, d_in), float32, zero where nothing is kept.
        kept: (d_out, d_in), bool.
        scale_columns: neighbours in a row that share a scale.
        hessian: (d_in, d_in); the values that follow a code in its row make up for its error. None: each
            value is rounded alone, and `target` is not used.
        target: (d_out, d_in), what the codes approximate: `sparse`, or what it approximates itself.
    """
    codes, scale = round_to_int8(sparse, scale_columns)
    if hessian is not None:
        codes = _round_with_feedback(target, kept, scale, scale_columns, hessian, _nearest_int8)
    return codes.to(torch.int8), scale


def sparse_to_codebook(
    sparse: Tensor, kept: Tensor, bits: int, scale_columns: int, hessian: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a sparse matrix that index a codebook; scales and levels minimise ``Σ H_jj (s_ij − ŝ_ij)²``.

    Args as of :func:`sparse_to_int8`, and the `bits` of a code; without a Hessian, H is the identity.

    Returns:
        codes: (d_out, d_in) uint8, below 2^bits.
        scale: (d_out, scales) bfloat16.
        codebook: (2^bits,) int8, increasing: the level of each code.
    """
    rows, columns = sparse.shape
    padding = (0, -columns % scale_columns)
    importance = torch.ones(columns) if hessian is None else hessian.diagonal().float()
    importance = nn.functional.pad(importance, padding).view(-1, scale_columns)
    magnitudes = nn.functional.pad(sparse.abs(), padding).view(rows, len(importance), scale_columns)
    count = 1 << bits - 1
    levels = _fit_levels(magnitudes[:: max(1, rows // _SAMPLE_ROWS)], importance, count)
    # As int8: the largest becomes 127.
    levels = (levels * (LARGEST_CODE / levels[-1])).round()
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(magnitudes.shape[:2], dtype=torch.bfloat16)
    step = max(1, _CHUNK // max(columns, 1))
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        scale[part], chosen = _fit_scales(magnitudes[part], importance, levels)
        codes[part] = chosen.view(len(chosen), -1)[:, :columns]
    if hessian is not None:

        def nearest(shares: Tensor) -> Tensor:
            return levels[_nearest_level(shares.abs(), levels).int()].copysign_(shares)

        sparse = _round_with_feedback(target, kept, scale, scale_columns, hessian, nearest)
        codes = _nearest_level(sparse.abs(), levels)
    # The lower half of the codebook holds the negative levels.
    codes = torch.where(sparse < 0, count - 1 - codes, count + codes)
    return codes, scale, torch.cat([-levels.flip(0), levels]).to(torch.int8)


def _round_with_feedback(
    target: Tensor,
    kept: Tensor,
    scale: Tensor,
    scale_columns: int,
    hessian: Tensor,
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """The values nearest to a target, in units of their scales, rounded from left to right.

    The kept values to the right make up for the error of each, and for what the target has outside `kept`.
    """
    factor = inverse_factor(hessian, "its inputs").float()
    # Transposed, because settle_columns() works on columns.
    units = scale.float().T.contiguous()
    there, shares = kept.T.contiguous(), torch.empty(target.T.shape)

    def settle(j: int, block: Tensor) -> Tensor:
        unit = units[j // scale_columns]
        shares[j] = torch.where(there[j] & (unit > 0), nearest(block[:, 0] / unit), 0)
        return shares[j] * unit

    settle_columns(target.clone(), factor, settle)
    return shares.T.contiguous()


def _nearest_int8(shares: Tensor) -> Tensor:
    return shares.round().clamp_(-LARGEST_CODE, LARGEST_CODE)


def _nearest_level(shares: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, uint8."""
    return torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)


def _fit_levels(magnitudes: Tensor, importance: Tensor, count: int) -> Tensor:
    """`count` increasing levels, the largest 1, for magnitudes in units of their scales.

    Lloyd's algorithm, in turn with the scales.

    Args:
        magnitudes: (rows, scales, scale_columns), zero where nothing is kept.
        importance: (scales, scale_columns), the weight of each squared error.
    """
    levels = torch.linspace(1 / count, 1, count)
    there = magnitudes > 0
    if not bool(there.any()):
        return levels
    for _ in range(_ROUNDS):
        scale, chosen = _fit_scales(magnitudes, importance, levels)
        each = scale.float().unsqueeze(-1)
        # A level moves to the mean of its shares, each weighted like its squared error.
        weight = (importance * each.square())[there]
        shares, index = (magnitudes / each)[there], chosen[there].long()
        total = torch.zeros(count).index_add_(0, index, weight)
        moved = torch.zeros(count).index_add_(0, index, weight * shares) / total
        levels = torch.where(total > 0, moved, levels).sort().values
        levels = levels / levels[-1]
    return levels


def _fit_scales(magnitudes: Tensor, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row and group, bfloat16, and the index of each magnitude's level, uint8."""
    largest = magnitudes.amax(-1)
    there = magnitudes > 0
    best_error = torch.full(largest.shape, torch.inf)
    best = torch.zeros_like(largest)

    def try_scale(scale: Tensor) -> None:
        scale = scale.bfloat16().float()
        chosen = levels[_nearest_level(magnitudes / scale.unsqueeze(-1), levels).int()]
        error = ((chosen * scale.unsqueeze(-1) - magnitudes).square() * importance * there).sum(-1)
        better = error < best_error
        best_error[better], best[better] = error[better], scale[better]

    for share in _SHARES:
        try_scale(largest * (share / levels[-1]))
    # The least-squares scale for the levels that the best of these chose.
    chosen = levels[_nearest_level(magnitudes / best.unsqueeze(-1), levels).int()] * there
    products, squares = (importance * chosen * magnitudes).sum(-1), (importance * chosen.square()).sum(-1)
    try_scale(torch.where(squares > 0, products / squares, best))
    return best.bfloat16(), _nearest_level(magnitudes / best.unsqueeze(-1), levels)
