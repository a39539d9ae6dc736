"""Root mean square norm of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from oats import _core

_threads = torch.get_num_threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    """``x / sqrt(mean(x²) + eps)`` of each row, times a weight, without checks or autograd.

    Args:
        x: (…, n), contiguous, float32 or bfloat16, on the CPU.
        weight: (n,), of the same dtype.
        eps: added to the mean of the squares.
        one_plus: True: multiply by ``1 + weight``, then round to the dtype of `x` (Gemma). False: round
            first, then multiply by ``weight`` (Llama).

    Returns:
        The shape and dtype of `x`.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0, one_plus=False)
    tensor([[0.8485, 1.1314]])
    """
    y = torch.empty_like(x)
    columns = x.shape[-1]
    _core.rms_norm(
        x.data_ptr(), x.numel() // columns if columns else 0, columns, weight.data_ptr(), eps, one_plus,
        x.element_size(), y.data_ptr(), _threads(),
    )  # fmt: skip
    return y
