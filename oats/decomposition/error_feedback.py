"""Change a weight's columns from left to right; the columns that follow make up for each error.

SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323) share this loop. With the upper Cholesky factor U of
the inverse Hessian, the error of column j, over ``U_jj``, times ``U_j,·``, is subtracted from the columns to
its right. This is the update of the Optimal Brain Surgeon with the columns before j fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oats.errors import WeightError

DAMPING = 0.01
"""Added to the diagonal of the Hessian, as a share of its mean."""


def inverse_factor(hessian: Tensor, layer: str) -> Tensor:
    """Upper U with ``Uᵀ U = (H + damping)⁻¹``, (d_in, d_in) float64, of ``H = X Xᵀ``.

    Raises:
        WeightError: the Hessian is not positive semi-definite.

    >>> inverse_factor(torch.diag(torch.tensor([0.25, 0.25])), "weight").diag().round(decimals=2).tolist()
    [1.99, 1.99]
    """
    damped = hessian.detach().double().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    # The mean of the others: a constant would dominate the damping of a small Hessian.
    diagonal[dead] = diagonal[~dead].mean() if (~dead).any() else 1.0
    diagonal += DAMPING * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise WeightError(
            f"{layer}: the Hessian is not positive semi-definite ({error}); pass X Xᵀ summed over the "
            "calibration tokens, in float32 or better"
        ) from error
    return factor


def settle_columns(
    matrix: Tensor, factor: Tensor, settle: Callable[[int, Tensor], Tensor], width: int = 128
) -> None:
    """Replace the columns of a matrix in place, from left to right.

    Args:
        matrix: (d_out, d_in), float32.
        factor: from :func:`inverse_factor`, float32.
        settle: takes j, and columns j to the end of their block after the updates so far; returns the final
            column j, (d_out,).
        width: columns in a block. One product per block updates all columns behind it.

    >>> matrix = torch.tensor([[1.0, 1.0]])
    >>> hessian = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> settle_columns(matrix, inverse_factor(hessian, "weight").float(), lambda j, block: block[:, 0] * j)
    >>> matrix.round(decimals=1)  # both inputs are equal, so the second weight takes over the first
    tensor([[0., 2.]])
    """
    for start in range(0, matrix.shape[1], width):
        stop = min(start + width, matrix.shape[1])
        # Transposed, so that each column is contiguous.
        block, rest = matrix[:, start:stop].T.contiguous(), matrix[:, stop:]
        own = factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            settled = settle(start + j, block[j:].T)
            torch.sub(block[j], settled, out=errors[j]).div_(own[j, j])
            block[j] = settled
            block[j + 1 :].addr_(own[j, j + 1 :], errors[j], alpha=-1)
        matrix[:, start:stop] = block.T
        rest.addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
