"""What a layer's tensors are: their names, dtypes and shapes (docs/format.md).

========== ============== =========================== =============================================
tensor     dtype          shape                       content
========== ============== =========================== =============================================
mask       uint8          (d_out, ceil(d_in / 8))     one bit per element, least significant first;
                                                      padding bits are zero
values     bf16 or fp32   (nnz,)                      kept values, in row-major order
low_rank_u as values      (d_out, rank)
low_rank_v as values      (rank, d_in)
========== ============== =========================== =============================================

A layer that keeps every element of S has no mask. Where values or factors are integer codes, a layer has more
tensors (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from oats.config import CODE_BITS, EXACT, Storage
from oats.format.bit_stream import stream_bytes, unpack_bits
from oats.format.bitmask import decode, decode_mask, mask_columns, mask_population

FORMAT_VERSION = 1
"""Version of the format of a model without codes, which every release reads."""

CODES_VERSION = 2
"""Version of the format of a model in which a layer has codes."""

HEAD_VERSION = 3
"""Version of the format of a model whose output head has codes."""

WIDTHS_VERSION = 4
"""Version of the format of a model in which a layer has no mask, or codes of fewer bits."""

VERSIONS = (FORMAT_VERSION, CODES_VERSION, HEAD_VERSION, WIDTHS_VERSION)
"""The versions that this release reads."""

TENSORS = ("mask", "values", "low_rank_u", "low_rank_v")
"""Names of the tensors that a layer without codes has, in the order in which functions take them."""

MARKER = torch.zeros(1, dtype=torch.uint8)
"""Stored as ``weight`` of each layer. A reader who does not know the format expects a dense weight there:
this shape makes it stop instead of going on with random weights (docs/format.md)."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtypes of stored values, by the name that `OatsConfig.dtype` uses."""


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of `dtype` is stored: fp32 as fp32, everything else as bf16.

    >>> storage_dtype(torch.float16)
    torch.bfloat16
    """
    return torch.float32 if dtype in (torch.float32, torch.float64) else torch.bfloat16


@dataclass(frozen=True)
class LayerSpec:
    """The sizes of a layer and how its numbers are stored. They determine all of its tensors.

    Args:
        d_out: outputs.
        d_in: inputs.
        rank: of the low-rank part.
        nnz: number of kept values.
        dtype: of the numbers that are no codes, torch.bfloat16 or torch.float32.
        storage: which numbers are codes.

    >>> spec = LayerSpec(4, 256, 2, 100, torch.bfloat16, Storage("int8", "int8", 128))
    >>> spec.tensors()["values_scale"]
    (torch.bfloat16, (4, 2))
    """

    d_out: int
    d_in: int
    rank: int
    nnz: int
    dtype: torch.dtype
    storage: Storage = EXACT

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        d_in: int,
        storage: Storage = EXACT,
        dtype: torch.dtype | None = None,
    ) -> LayerSpec:
        """The spec of a layer with these tensors, which need not be validated yet.

        Args:
            tensors: of the layer, by name.
            d_in: inputs; the mask has up to 7 more columns.
            storage: which of the tensors are codes.
            dtype: of the numbers that are no codes; None means that of the values.

        >>> from oats.format.bitmask import encode
        >>> mask, values = encode(torch.eye(3))
        >>> factors = {"low_rank_u": torch.zeros(3, 0), "low_rank_v": torch.zeros(0, 3)}
        >>> LayerSpec.of({"mask": mask, "values": values, **factors}, 3).sizes
        (3, 3, 0, 3)
        """
        values, d_out, rank = tensors["values"], len(tensors["low_rank_u"]), len(tensors["low_rank_v"])
        if not storage.mask:
            nnz = d_out * d_in
        elif storage.has_codebook:
            # Codes share bytes: only the mask tells how many there are.
            nnz = mask_population(tensors["mask"], d_in)
        else:
            nnz = values.numel()
        return cls(d_out, d_in, rank, nnz, dtype or values.dtype, storage)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``(d_out, d_in, rank, nnz)``."""
        return self.d_out, self.d_in, self.rank, self.nnz

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name → dtype and shape of each tensor."""
        d_out, d_in, rank, nnz, storage = self.d_out, self.d_in, self.rank, self.nnz, self.storage
        bits = CODE_BITS.get(storage.values, 0)
        factor = self.dtype if storage.low_rank == "exact" else torch.int8
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if storage.mask:
            tensors["mask"] = torch.uint8, (d_out, mask_columns(d_in))
        if storage.has_codebook:
            tensors["values"] = torch.uint8, (stream_bytes(nnz, bits),)
        else:
            tensors["values"] = torch.int8 if bits else self.dtype, (nnz,)
        tensors["low_rank_u"] = factor, (d_out, rank)
        tensors["low_rank_v"] = factor, (rank, d_in)
        if storage.has_codes:
            tensors["input_exponent"] = torch.int8, (d_in,)
        if storage.values != "exact":
            tensors["values_scale"] = torch.bfloat16, (d_out, storage.scales(d_in))
        if storage.has_codebook:
            tensors["values_codebook"] = torch.int8, (2**bits,)
        if storage.low_rank != "exact":
            tensors["low_rank_u_scale"] = torch.bfloat16, (d_out, storage.scales(rank))
            tensors["low_rank_v_scale"] = torch.bfloat16, (rank, storage.scales(d_in))
        return tensors


def tensor_names(storage: Storage) -> tuple[str, ...]:
    """Names of the tensors of a layer.

    >>> tensor_names(EXACT)
    ('mask', 'values', 'low_rank_u', 'low_rank_v')
    """
    return tuple(LayerSpec(0, 0, 0, 0, torch.float32, storage).tensors())


def kept_elements(tensors: Mapping[str, Tensor], d_in: int) -> Tensor:
    """Which elements of S a layer keeps, (d_out, d_in) bool."""
    if "mask" in tensors:
        return decode_mask(tensors["mask"], d_in)
    u = tensors["low_rank_u"]
    return torch.ones(len(u), d_in, dtype=torch.bool, device=u.device)


def decode_values(tensors: Mapping[str, Tensor], values: Tensor, d_in: int) -> Tensor:
    """S (d_out, d_in) of values in row-major order, in their dtype."""
    if "mask" in tensors:
        return decode(tensors["mask"], values, d_in)
    return values.view(len(tensors["low_rank_u"]), d_in).clone()


def exact_parts(tensors: Mapping[str, Tensor], storage: Storage) -> tuple[Tensor, Tensor, Tensor]:
    """S (d_out, d_in), U (d_out, rank) and V (rank, d_in) in float32, decoded where they are codes."""
    values, u, v = tensors["values"], tensors["low_rank_u"].float(), tensors["low_rank_v"].float()
    d_in = v.shape[1]
    if storage.has_codebook:
        nnz = mask_population(tensors["mask"], d_in) if storage.mask else len(u) * d_in
        codes = unpack_bits(values, CODE_BITS[storage.values], nnz)
        values = tensors["values_codebook"][codes.int()]
    sparse = decode_values(tensors, values.float(), d_in)
    if storage.values != "exact":
        sparse *= _spread(tensors["values_scale"], d_in, storage)
    if storage.low_rank != "exact":
        u *= _spread(tensors["low_rank_u_scale"], u.shape[1], storage)
        v *= _spread(tensors["low_rank_v_scale"], d_in, storage)
    if storage.has_codes:
        powers = tensors["input_exponent"].float().exp2()
        sparse, v = sparse * powers, v * powers
    return sparse, u, v


def _spread(scale: Tensor, columns: int, storage: Storage) -> Tensor:
    """The scale of each element, (rows, columns) float32, from (rows, scales)."""
    return scale.float().repeat_interleave(storage.scale_columns, 1)[:, :columns]
