from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from oats.config import EXACT, Storage
from oats.format.bitmask import encode
from oats.format.layer_spec import LayerSpec
from oats.kernels.isa import available_isas

ISAS = available_isas()
DTYPES = [torch.float32, torch.bfloat16]


def random_layer(
    d_out: int, d_in: int, rank: int, density: float | None, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """The canonical tensors of a random layer; densities 0 and 1 are exact. Density None: no mask."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(d_out, d_in, generator=g) < (1.0 if density is None else density)
    # Never zero, also after rounding: a kept value is a bit of the mask.
    weight = torch.randn(d_out, d_in, generator=g)
    weight = torch.where(weight.abs() < 1e-3, torch.ones(()), weight)
    mask, values = encode(weight * kept)
    return {
        **({} if density is None else {"mask": mask}),
        "values": values.to(dtype),
        "low_rank_u": torch.randn(d_out, rank, generator=g).to(dtype),
        "low_rank_v": (torch.randn(rank, d_in, generator=g) / max(d_in, 1) ** 0.5).to(dtype),
    }


def spec_of(
    tensors: dict[str, Tensor], storage: Storage = EXACT, dtype: torch.dtype | None = None
) -> LayerSpec:
    storage = replace(storage, mask="mask" in tensors)
    return LayerSpec.of(tensors, tensors["low_rank_v"].shape[1], storage, dtype)


@pytest.fixture(autouse=True)
def _restore_threads():
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread():
    """Matrices and models this small lose more to the threads' barriers than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
