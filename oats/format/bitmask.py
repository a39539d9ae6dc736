"""A sparse matrix as one bit for each element, and the kept values (docs/format.md)."""

from __future__ import annotations

# torch first: it loads the OpenMP runtime that the core is linked to.
import torch
from torch import Tensor

from oats import _core


def mask_columns(d_in: int) -> int:
    """Bytes of one row of the mask."""
    return (d_in + 7) // 8


def encode_mask(kept: Tensor) -> Tensor:
    """The mask of `kept`, (d_out, d_in) bool: a bit for each element, least significant first.

    Returns:
        (d_out, ceil(d_in / 8)), uint8; padding bits are zero.

    >>> encode_mask(torch.tensor([[False, True, True]])).tolist()
    [[6]]
    """
    d_out, d_in = kept.shape
    bits = kept.new_zeros(d_out, mask_columns(d_in) * 8, dtype=torch.uint8)
    bits[:, :d_in] = kept
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits.view(d_out, -1, 8) * powers).sum(-1, dtype=torch.uint8)


def encode(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Split a sparse matrix into its mask and its kept values.

    Args:
        sparse: (d_out, d_in), zeros where nothing is kept.

    Returns:
        The mask, as :func:`encode_mask` makes it, and the values (dtype of `sparse`) in row-major order.

    >>> mask, values = encode(torch.tensor([[0.0, 2.0, 3.0], [4.0, 0.0, 0.0]]))
    >>> mask.tolist(), values.tolist()
    ([[6], [1]], [2.0, 3.0, 4.0])
    """
    kept = sparse != 0
    return encode_mask(kept), sparse[kept]


def decode_mask(mask: Tensor, d_in: int) -> Tensor:
    """The inverse of :func:`encode_mask`: (d_out, d_in), bool.

    >>> decode_mask(torch.tensor([[6]], dtype=torch.uint8), 3)
    tensor([[False,  True,  True]])
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = mask.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1)
    return bits.flatten(1)[:, :d_in].bool()


def decode(mask: Tensor, values: Tensor, d_in: int) -> Tensor:
    """The inverse of :func:`encode`: (d_out, d_in), dtype of `values`.

    >>> decode(torch.tensor([[6], [1]], dtype=torch.uint8), torch.tensor([2.0, 3.0, 4.0]), 3)
    tensor([[0., 2., 3.],
            [4., 0., 0.]])
    """
    kept = decode_mask(mask, d_in)
    return values.new_zeros(kept.shape).masked_scatter_(kept, values)


def mask_population(mask: Tensor, d_in: int) -> int:
    """Number of kept values of a mask (uint8, (d_out, ceil(d_in / 8))); -1 if a padding bit is set."""
    mask = mask.cpu().contiguous()
    return _core.mask_population(mask.data_ptr(), mask.shape[0], d_in)
