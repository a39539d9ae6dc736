"""Least squares for the kept values of a fixed support, in the metric of a layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.decomposition.metric import RoundedProduct


def refit_values(
    target: Tensor,
    sparse: Tensor,
    support: Tensor,
    metric: Tensor,
    steps: int,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Move the values on a support towards those nearest to a target in a metric, by conjugate gradients.

    Minimises ``tr((T − S) G (T − S)ᵀ)``, one least-squares problem for each row.

    Args:
        target: T, (d_out, d_in), float32 or float64.
        sparse: S to start from, (d_out, d_in), zero outside the support.
        support: (d_out, d_in), bool.
        metric: G, (d_in, d_in), symmetric positive definite. A diagonal of ones preconditions the problem.
        steps: number of steps, at least 1.
        product_dtype: of the products of directions with G; None means the target's. bfloat16 is accurate
            enough for a few steps, because the residual that they start from is not rounded.

    Returns:
        S, (d_out, d_in), zero outside the support.

    >>> metric = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> refit_values(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[True, False]]), metric, 1)
    tensor([[1.5000, 0.0000]])
    """
    tiny = torch.finfo(target.dtype).tiny
    rounded = metric.to(product_dtype or target.dtype)
    multiply = RoundedProduct(target.shape, rounded.dtype, target.device)
    # In the product's dtype: converting would take longer than multiplying.
    mask = support.to(rounded.dtype)
    sparse = sparse.clone()
    residual = ((target - sparse) @ metric).mul_(support)
    direction, product = residual.clone(), torch.empty_like(residual)
    square = torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
    for _ in range(steps):
        product.copy_(multiply(direction, rounded).mul_(mask))
        curvature = (direction[:, None] @ product[:, :, None])[..., 0]
        # No step where rounding has made the metric indefinite in this direction.
        step = torch.where(curvature > 0, square / curvature.clamp_min(tiny), 0)
        sparse.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        previous, square = square, torch.linalg.vector_norm(residual, dim=1, keepdim=True).square()
        direction.mul_(square / previous.clamp_min(tiny)).add_(residual)
    return sparse
