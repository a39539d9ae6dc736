"""`Decomposition`: the result of every method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """``W ≈ sparse + low_rank_u @ low_rank_v``.

    `low_rank_u` has orthonormal columns, in decreasing order of their weight in the scaled layer;
    `low_rank_v` carries the magnitudes. So the entries of u are at most 1, and those of a column of v at most
    about the norm of that column of W, at any scale of the second moments. Both fit a 16-bit float, and u
    does not amplify a rounding error of ``v @ x``.

    Attributes:
        sparse: (d_out, d_in), zeros where nothing is kept.
        low_rank_u: (d_out, rank).
        low_rank_v: (rank, d_in).
        relative_error: ``‖(W − S − UV) diag(√m)‖_F / ‖W diag(√m)‖_F``, before rounding to the weight's dtype;
            0 for a weight of zeros. Methods with another metric say so.
        iterations: number of alternations that were run.
    """

    sparse: Tensor = field(repr=False)
    low_rank_u: Tensor = field(repr=False)
    low_rank_v: Tensor = field(repr=False)
    relative_error: float
    iterations: int

    @classmethod
    def of_scaled(
        cls,
        sparse: Tensor,
        low_rank_u: Tensor,
        low_rank_v: Tensor,
        unscale: Tensor,
        dtype: torch.dtype,
        relative_error: float,
        iterations: int,
    ) -> Decomposition:
        """From the parts of a scaled weight, see :func:`oats.decomposition.scaling.scale_weight`."""
        parts = sparse * unscale, low_rank_u, low_rank_v * unscale
        sparse, u, v = (part.to(dtype).contiguous() for part in parts)
        return cls(sparse, u, v, relative_error, iterations)

    @classmethod
    def of_sparse(cls, sparse: Tensor, dtype: torch.dtype, relative_error: float) -> Decomposition:
        """Of rank 0, from a method that prunes."""
        sparse = sparse.to(dtype).contiguous()
        u, v = sparse.new_zeros(len(sparse), 0), sparse.new_zeros(0, sparse.shape[1])
        return cls(sparse, u, v, relative_error, iterations=1)

    @property
    def d_out(self) -> int:
        """Output features."""
        return self.sparse.shape[0]

    @property
    def d_in(self) -> int:
        """Input features."""
        return self.sparse.shape[1]

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return self.low_rank_u.shape[1]

    @property
    def nnz(self) -> int:
        """Non-zeros of the sparse part. Below the budget only if the residual has exact zeros."""
        return int(torch.count_nonzero(self.sparse))

    def to_dense(self) -> Tensor:
        """``sparse + low_rank_u @ low_rank_v``, (d_out, d_in), summed in float32, in the weight's dtype."""
        dense = torch.addmm(self.sparse.float(), self.low_rank_u.float(), self.low_rank_v.float())
        return dense.to(self.sparse.dtype)
