"""The format on disk: a matrix S + U V as four tensors (docs/format.md).

========== ============== =========================== =============================================
tensor     dtype          shape                       content
========== ============== =========================== =============================================
mask       uint8          (d_out, ceil(d_in / 8))     one bit an element, least significant first;
                                                      padding bits are zero
values     bf16 or fp32   (nnz,)                      kept values, in the row-major order of the mask
low_rank_u as values      (d_out, rank)
low_rank_v as values      (rank, d_in)
========== ============== =========================== =============================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from oats import ops
from oats.bitmask import mask_columns
from oats.errors import FormatError

FORMAT_VERSION = 1
"""Version of the format that this release writes."""

TENSORS = ("mask", "values", "low_rank_u", "low_rank_v")
"""Names of the tensors of one layer, in the order in which functions take them."""

MARKER = torch.zeros(1, dtype=torch.uint8)
"""Stored as ``weight`` of each layer: a reader who does not know the format, and expects a dense weight
there, stops at its shape instead of going on without one (docs/format.md)."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtypes of stored values, by the name that `OatsConfig.dtype` uses."""


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of `dtype` is stored: fp32 as fp32, everything else as bf16.

    >>> storage_dtype(torch.float16)
    torch.bfloat16
    """
    return torch.float32 if dtype in (torch.float32, torch.float64) else torch.bfloat16


def validate(
    name: str,
    d_out: int,
    d_in: int,
    *,
    mask: Tensor,
    values: Tensor,
    low_rank_u: Tensor,
    low_rank_v: Tensor,
    bias: Tensor | None = None,
) -> None:
    """Check that the tensors of one layer agree with each other and with its shape.

    Raises:
        FormatError: they do not; the message names the layer, the tensor, and what was expected.
    """
    if values.dtype not in DTYPES.values():
        raise FormatError(
            f"{name}: values are {_short(values.dtype)}; this release stores bfloat16 or float32. "
            "Convert them, or compress the model again"
        )
    rank = low_rank_v.shape[0] if low_rank_v.dim() == 2 else -1
    expected = {
        "mask": (mask, torch.uint8, (d_out, mask_columns(d_in))),
        "values": (values, values.dtype, (values.numel(),)),
        "low_rank_u": (low_rank_u, values.dtype, (d_out, max(rank, 0))),
        "low_rank_v": (low_rank_v, values.dtype, (max(rank, 0), d_in)),
    }
    for tensor_name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise FormatError(
                f"{name}: {tensor_name} is {_short(tensor.dtype)} {tuple(tensor.shape)}, expected "
                f"{_short(dtype)} {shape} for a {d_out} x {d_in} layer; the checkpoint does not match its "
                "config, download or compress it again"
            )
    if bias is not None and (tuple(bias.shape) != (d_out,) or not bias.is_floating_point()):
        raise FormatError(
            f"{name}: bias is {_short(bias.dtype)} {tuple(bias.shape)}, expected floating-point ({d_out},)"
        )
    population = ops.mask_population(mask, d_in)
    if population < 0:
        raise FormatError(
            f"{name}: mask has a bit set past its last input (d_in = {d_in}); the file is damaged, "
            "download or compress it again"
        )
    if population != values.numel():
        raise FormatError(
            f"{name}: mask keeps {population} values but {values.numel()} are stored; the file is damaged, "
            "download or compress it again"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
