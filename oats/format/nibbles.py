"""Two 4-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_nibbles(codes: Tensor) -> Tensor:
    """Put two codes in a byte, the first in the lower half; zero fills the half after an odd last one.

    Codes are (n,) uint8, below 16.

    >>> pack_nibbles(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist()
    [33, 3]
    """
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    return codes[0::2] | codes[1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`, with the zero that fills an odd last byte.

    >>> unpack_nibbles(torch.tensor([33, 3], dtype=torch.uint8)).tolist()
    [1, 2, 3, 0]
    """
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
