"""Codes of 2 to 4 bits as a stream of bits, the lowest bit of each code and of each byte first."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Join codes to a stream; zeros fill the last byte.

    Args:
        codes: (n,) uint8, below 2^bits.
        bits: of a code, at most 8.

    Returns:
        (ceil(n * bits / 8),) uint8.

    >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    # Eight codes fill `bits` bytes.
    eights = torch.nn.functional.pad(codes, (0, -codes.numel() % 8)).view(-1, 8)
    words = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= eights[:, i].long() << i * bits
    packed = torch.stack([words >> 8 * byte & 255 for byte in range(bits)], dim=-1)
    return packed.to(torch.uint8).flatten()[: stream_bytes(codes.numel(), bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: `count` codes, uint8.

    >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    groups = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= groups[:, byte].long() << 8 * byte
    codes = torch.empty(len(words), 8, dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[:, i] = words >> i * bits & (1 << bits) - 1
    return codes.flatten()[:count]


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)
