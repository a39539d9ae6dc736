"""How the numbers of a layer are stored: as they are, or as integer codes with scales (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oats.bitmask import decode, mask_columns
from oats.config import SCALE_COLUMNS
from oats.errors import ConfigError

Values = Literal["exact", "int8", "int4"]
LowRank = Literal["exact", "int8"]

VALUES: tuple[Values, ...] = ("exact", "int8", "int4")
"""Storages of the kept values, in the order of the core's numbers."""

LOW_RANK: tuple[LowRank, ...] = ("exact", "int8")
"""Storages of the low-rank factors, in the same order."""

CODEBOOK = 16
"""Entries of the codebook that int4 codes index."""


@dataclass(frozen=True)
class Storage:
    """Which of a layer's tensors hold codes.

    A code stands for itself times the scale of its row and its `scale_columns` columns; an int4 code for an
    int8 of the layer's codebook times that scale. S and V are then those for inputs that are multiplied by 2
    to the `input_exponent` of each: inputs differ in size by orders of magnitude, so do the weights for them.

    Args:
        values: of the kept values: ``"exact"`` (the layer's dtype), ``"int8"``, or ``"int4"``.
        low_rank: of U and V: ``"exact"`` or ``"int8"``.
        scale_columns: columns that share a scale, 64 or 128; 0 where all is exact.

    Raises:
        ConfigError: there is no such storage.

    >>> Storage("int8", "int8", 128).tensors(4, 256, 2, 100, torch.bfloat16)["values_scale"]
    (torch.bfloat16, (4, 2))
    """

    values: Values = "exact"
    low_rank: LowRank = "exact"
    scale_columns: int = 0

    def __post_init__(self) -> None:
        """Check."""
        for name, allowed in (("values", VALUES), ("low_rank", LOW_RANK)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} are {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.scale_columns not in (SCALE_COLUMNS if self.has_codes else (0,)):
            raise ConfigError(
                f"scale_columns is {self.scale_columns!r}, expected "
                + ("64 or 128" if self.has_codes else "0, because nothing has a scale")
            )

    @classmethod
    def of(cls, values: Values, low_rank: LowRank, scale_columns: int) -> Storage:
        """The storage of both, with scales where one of them has codes.

        Raises:
            ConfigError: there is no such storage.

        >>> Storage.of("exact", "exact", 128) == EXACT
        True
        """
        return cls(values, low_rank, 0 if values == low_rank == "exact" else scale_columns)

    @property
    def has_codes(self) -> bool:
        """Whether any tensor holds codes."""
        return self.values != "exact" or self.low_rank != "exact"

    def tensors(
        self, d_out: int, d_in: int, rank: int, nnz: int, dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name → dtype and shape of each tensor of a layer.

        Args:
            d_out: outputs.
            d_in: inputs.
            rank: of the low-rank part.
            nnz: number of kept values.
            dtype: of what is stored exactly.
        """
        values: dict[Values, tuple[torch.dtype, tuple[int, ...]]] = {
            "exact": (dtype, (nnz,)),
            "int8": (torch.int8, (nnz,)),
            "int4": (torch.uint8, ((nnz + 1) // 2,)),
        }
        factor = dtype if self.low_rank == "exact" else torch.int8
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "mask": (torch.uint8, (d_out, mask_columns(d_in))),
            "values": values[self.values],
            "low_rank_u": (factor, (d_out, rank)),
            "low_rank_v": (factor, (rank, d_in)),
        }
        if self.has_codes:
            found["input_exponent"] = torch.int8, (d_in,)
        if self.values != "exact":
            found["values_scale"] = torch.bfloat16, (d_out, self.scales(d_in))
        if self.values == "int4":
            found["values_codebook"] = torch.int8, (CODEBOOK,)
        if self.low_rank != "exact":
            found["low_rank_u_scale"] = torch.bfloat16, (d_out, self.scales(rank))
            found["low_rank_v_scale"] = torch.bfloat16, (rank, self.scales(d_in))
        return found

    def scales(self, columns: int) -> int:
        """Number of scales in a row of so many columns."""
        return -(-columns // self.scale_columns)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of a layer beyond its rank and non-zeros; nothing where all is exact."""
        if not self.has_codes:
            return {}
        return {"values": self.values, "low_rank": self.low_rank, "scale_columns": self.scale_columns}

    @classmethod
    def from_dict(cls, sizes: Mapping[str, Any]) -> Storage:
        """The inverse of :meth:`to_dict`; other keys are not looked at."""
        given = {name: sizes[name] for name in ("values", "low_rank", "scale_columns") if name in sizes}
        return cls(**given)

    def exact_parts(self, tensors: Mapping[str, Tensor], d_in: int) -> tuple[Tensor, Tensor, Tensor]:
        """S, U and V for which the tensors stand, in float32.

        Args:
            tensors: those of :meth:`tensors`.
            d_in: inputs.
        """
        values, u, v = tensors["values"], tensors["low_rank_u"].float(), tensors["low_rank_v"].float()
        if self.values == "int4":
            values = tensors["values_codebook"][unpack_nibbles(values).long()]
        sparse = decode(tensors["mask"], values.float(), d_in)
        if self.values != "exact":
            sparse *= self.spread(tensors["values_scale"], d_in)
        if self.low_rank != "exact":
            u *= self.spread(tensors["low_rank_u_scale"], u.shape[1])
            v *= self.spread(tensors["low_rank_v_scale"], v.shape[1])
        if self.has_codes:
            powers = tensors["input_exponent"].float().exp2()
            sparse, v = sparse * powers, v * powers
        return sparse, u, v

    def spread(self, scale: Tensor, columns: int) -> Tensor:
        """The scale of each element, (rows, columns) float32, from (rows, scales)."""
        return scale.float().repeat_interleave(self.scale_columns, 1)[:, :columns]


EXACT = Storage()
"""All in the layer's dtype."""


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the lower half; an odd last one alone.

    Args:
        codes: (n,) uint8, below 16.

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
