"""The most likely token."""

from __future__ import annotations

import torch
from torch import Tensor

from oats import _core


def most_likely(logits: Tensor) -> int:
    """The token with the largest of the logits (vocabulary,), fp32 or bf16; of equal ones the first.

    torch's argmax takes about as long as a layer of a small model: it has no vectors for bf16.

    >>> most_likely(torch.tensor([0.5, 2.0, 2.0, -1.0]))
    1
    """
    if not logits.is_contiguous() or logits.dtype not in (torch.float32, torch.bfloat16):
        return int(logits.argmax())
    return _core.most_likely(logits.data_ptr(), len(logits), logits.dtype.itemsize)
