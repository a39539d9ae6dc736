"""How far two floating-point computations of one result may lie apart: a bound from norms and dtypes.

A sum of n products is off by at most n u Σ|aᵢ bᵢ|, in whatever order it is taken, with u = eps / 2
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1); two such sums are at most twice
that apart. Rounding errors cancel, so that norms of the results can stand for those of the magnitudes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_equal_sums(
    actual: Tensor, expected: Tensor, terms: int, dtype: torch.dtype | None = None, condition: float = 1.0
) -> None:
    """``‖actual − expected‖_F ≤ condition · terms · eps · ‖expected‖_F``.

    Args:
        actual: one result.
        expected: the other, of the same shape.
        terms: of the longest sum; of sums that go into each other, of all of them together.
        dtype: that was computed in, of which eps is; None means actual's.
        condition: how much the problem itself enlarges the rounding of its input.
    """
    assert actual.shape == expected.shape
    allowed = condition * terms * torch.finfo(dtype or actual.dtype).eps
    apart = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    size = float(torch.linalg.vector_norm(expected.detach().double()))
    assert apart <= allowed * size, (
        f"{float(apart) / (size or 1):.3g} of the norm apart, allowed {allowed:.3g}"
    )


def terms_of(model: nn.Module) -> int:
    """Terms of the sums of all linear layers of a model, dense or compressed, together."""
    return sum(m.in_features + getattr(m, "rank", 0) for m in model.modules() if hasattr(m, "in_features"))


def condition_of_truncation(matrix: Tensor, rank: int) -> float:
    """How much the best approximation of a rank enlarges a change of the matrix (Wedin's theorem)."""
    values = torch.linalg.svdvals(matrix.double())
    if not 0 < rank < len(values):
        return 1.0
    return float(1 + 2 * values[rank - 1] / (values[rank - 1] - values[rank]))
