"""What computes ``S x + U (V x) + b``: an instruction set of this CPU, a CUDA device, or its emulation.

Tests of kernels take tensors on the CPU to each of these backends, and get tensors on the CPU back.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from oats.format.layer_spec import LayerSpec
from oats.kernels import keep_largest, packing, sparse_low_rank_linear
from oats.kernels.cuda import availability
from oats.kernels.cuda import keep_largest as cuda_keep_largest
from oats.kernels.cuda import packing as cuda_packing
from oats.kernels.cuda import sparse_low_rank_linear as cuda_product
from oats.kernels.isa import available_isas
from tests.conftest import spec_of
from tests.cuda.emulation import emulated

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and availability.is_built()),
    reason="no CUDA device" if availability.is_built() else "oats._cuda is not built (docs/cuda.md)",
)

DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@dataclass(frozen=True)
class Backend:
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
        layer, spec = {name: tensor.to(self.device) for name, tensor in layer.items()}, spec_of(layer)
        with self.active():
            if self.is_cuda:
                return Packed(self, cuda_packing.pack(layer, spec), spec)
            return Packed(self, packing.pack(layer, spec, isa=self.name), spec)

    def keep_largest_in_rows(self, rows: Tensor, count: int) -> Tensor:
        if self.name != "cuda-emulated":
            return keep_largest.keep_largest_in_rows(rows.to(self.device), count).cpu()
        out = torch.full_like(rows, torch.nan)
        with self.active():
            cuda_keep_largest.keep_largest_in_rows(rows, count, out)
        return out


@dataclass(frozen=True)
class Packed:
    """A packed weight, and what it was packed for."""

    backend: Backend
    tensor: Tensor
    spec: LayerSpec

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x.to(self.backend.device)
        bias = None if bias is None else bias.to(self.backend.device)
        linear = cuda_product.linear if self.backend.is_cuda else sparse_low_rank_linear.linear
        with self.backend.active():
            return linear(x, self.tensor, bias, self.spec).cpu()

    def unpack(self) -> dict[str, Tensor]:
        unpack = cuda_packing.unpack if self.backend.is_cuda else packing.unpack
        with self.backend.active():
            return {name: tensor.cpu() for name, tensor in unpack(self.tensor, self.spec).items()}


CPU_BACKENDS = [Backend(isa) for isa in available_isas()]
EMULATED = Backend("cuda-emulated")
BACKENDS = [*CPU_BACKENDS, EMULATED, pytest.param(Backend("cuda"), marks=needs_cuda)]
