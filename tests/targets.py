"""What computes ``S x + U (V x) + b``: an instruction set of this CPU, a CUDA device, or its emulation.

Tests of kernels take tensors on the CPU to each of them, and get tensors on the CPU back.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from oats.kernels import cuda, ops
from tests.cuda.emulation import emulated

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda.is_built()),
    reason="no CUDA device" if cuda.is_built() else "oats._cuda is not built (docs/cuda.md)",
)

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@dataclass(frozen=True)
class Target:
    """An instruction set, ``"cuda"`` or ``"cuda-emulated"``."""

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    def active(self) -> contextlib.AbstractContextManager[None]:
        return emulated(400) if self.name == "cuda-emulated" else contextlib.nullcontext()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0" if self.name == "cuda" else "cpu")

    def pack(self, layer: dict[str, Tensor]) -> Packed:
        layer = {name: tensor.to(self.device) for name, tensor in layer.items()}
        with self.active():
            packed = cuda.pack(**layer) if self.is_cuda else ops.pack(**layer, isa=self.name)
        d_out, rank = layer["low_rank_u"].shape
        sizes = cuda.Sizes(d_out, layer["low_rank_v"].shape[1], rank, layer["values"].numel())
        return Packed(self, packed, sizes, layer["values"].dtype)

    def keep_largest_in_rows(self, rows: Tensor, count: int) -> Tensor:
        if self.name != "cuda-emulated":
            return ops.keep_largest_in_rows(rows.to(self.device), count).cpu()
        out = torch.full_like(rows, torch.nan)
        with self.active():
            cuda.keep_largest_in_rows(rows, count, out)
        return out


@dataclass(frozen=True)
class Packed:
    """A packed weight and what it was packed for."""

    target: Target
    tensor: Tensor
    sizes: cuda.Sizes
    dtype: torch.dtype

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        arguments: list[Any] = [x.to(self.target.device), self.tensor, bias]
        if bias is not None:
            arguments[2] = bias.to(self.target.device)
        with self.target.active():
            if self.target.is_cuda:
                return cuda.linear(*arguments, self.sizes).cpu()
            return ops.linear(*arguments, self.sizes.d_out)

    def unpack(self) -> dict[str, Tensor]:
        with self.target.active():
            if self.target.is_cuda:
                tensors = cuda.unpack(self.tensor, self.sizes, self.dtype)
            else:
                tensors = ops.unpack(self.tensor)
        return {name: tensor.cpu() for name, tensor in tensors.items()}


CPU_TARGETS = [Target(isa) for isa in ops.available_isas()]
EMULATED = Target("cuda-emulated")
TARGETS = [*CPU_TARGETS, EMULATED, pytest.param(Target("cuda"), marks=needs_cuda)]
