"""DSnoT, dynamic sparse no training: swap weights so that each output keeps its mean (arXiv 2310.08915)."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern, parse_n_m
from oats.decomposition.baselines.pruning import checked_count, keep, largest
from oats.decomposition.checks import check_all, check_second_moment
from oats.decomposition.result import Decomposition
from oats.decomposition.scaling import root_moment
from oats.errors import WeightError

CYCLES = 50
"""The most swaps in a row (the paper's T)."""

THRESHOLD = 0.1 / 2048
"""A row is done once its mean error is at most this: the paper's 0.1 for the sum over 2048 tokens."""


@torch.no_grad()
def prune_dsnot(
    weight: Tensor,
    moments: Tensor,
    *,
    compression: float = 0.5,
    pattern: Pattern = "row",
    name: str | None = None,
) -> Decomposition:
    """Start from Wanda's mask, and swap weights to restore the mean of each output (arXiv 2310.08915).

    With ``c_ij = W_ij E[x_j]``, output i has lost ``e_i``, the sum of ``c_ij`` over its pruned weights, on
    average over the tokens. One cycle of a row

    1. grows the pruned weight of largest ``|c_ij| / Var[x_j]`` among those with ``e_i c_ij > 0``;
    2. prunes the kept weight of least ``|W_ij| ‖x_j‖₂`` among those with ``e_i c_ij < 0``. Under N:M, it is
       among those in the group of the first, with either sign.

    A weight moves at most once. A row is done when ``|e_i|`` is at most the threshold, when the swap would
    change the sign of ``e_i``, when no swap is left, or after 50 cycles. In the authors' code the sign ends a
    row always under N:M, and only by an option elsewhere. docs/quality.md has what the option gains.

    Args:
        weight: (d_out, d_in), any floating dtype, finite.
        moments: (2, d_in): the mean and the variance of each input over the calibration tokens.
        compression: this, `pattern` and `name` are those of `prune_wanda`.

    Returns:
        A decomposition of rank 0. Kept weights are unchanged. Its relative_error is in Wanda's metric, in
        which Wanda's mask is the best.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose`.

    >>> weight = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    >>> moments = torch.tensor([[1.0, -0.25, 1.0, 1.0], [1.0, 4.0, 1.0, 1.0]])
    >>> prune_dsnot(weight, moments).sparse  # Wanda would keep 5 and 4, and lose 3 + 2 on average
    tensor([[5., 0., 3., 0.]])
    """
    layer = name or "weight"
    count = checked_count(weight, compression, pattern, layer)
    mean, variance = _check_moments(moments, weight.shape[1], layer)
    root = root_moment(variance + mean.square()).float()
    scores = weight.detach().float().abs() * root
    mask = largest(scores, count, pattern)  # Wanda's
    contributions = weight.detach().float() * mean.float()
    n_m = parse_n_m(pattern)
    _swap(mask, contributions, variance.float(), scores, n_m[1] if n_m else None)
    return keep(weight, mask, root)


def _swap(mask: Tensor, contributions: Tensor, variance: Tensor, scores: Tensor, group: int | None) -> None:
    """Run the cycles of all rows at once, and change the mask in place."""
    rows = torch.arange(len(mask))
    infinity = float("inf")
    error = (contributions * ~mask).sum(1)
    sign = error.sign()
    # How much growing a weight brings its row nearer to the mean. Pruning it does the opposite.
    aligned = contributions * sign[:, None]
    # Of the weights that may still grow, and of those that may still be pruned; infinite for the others.
    gain = (aligned / variance.clamp_min(torch.finfo(torch.float32).tiny)).masked_fill_(mask, -infinity)
    loss = scores.masked_fill(~mask, infinity)
    if group is None:
        loss.masked_fill_(aligned >= 0, infinity)
    active = error.abs() > THRESHOLD
    for _ in range(CYCLES):
        if not active.any():
            break
        best, grown = gain.max(1)
        if group is None:
            least, pruned = loss.min(1)
        else:
            first = grown // group * group
            least, offset = loss.gather(1, first[:, None] + torch.arange(group)).min(1)
            pruned = first + offset
        after = error - contributions[rows, grown] + contributions[rows, pruned]
        active &= (best > 0) & (least < infinity) & (after.sign() == sign) & (error.abs() > THRESHOLD)
        moved = rows[active]
        grown, pruned = grown[active], pruned[active]
        mask[moved, grown], mask[moved, pruned] = True, False
        gain[moved, grown], loss[moved, pruned] = -infinity, infinity
        error[moved] = after[active]


def _check_moments(moments: Tensor, d_in: int, layer: str) -> tuple[Tensor, Tensor]:
    if not isinstance(moments, Tensor) or tuple(moments.shape) != (2, d_in):
        what = tuple(moments.shape) if isinstance(moments, Tensor) else type(moments).__name__
        raise WeightError(
            f"{layer}: moments must have shape (2, {d_in}), mean and variance of each input, got {what}"
        )
    mean, variance = moments.detach().double()
    check_all(torch.isfinite(mean), "mean of the inputs", "NaN or infinite", layer)
    check_second_moment(variance, d_in, layer)
    return mean, variance
