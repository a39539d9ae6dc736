"""Random layers to measure, and the float64 reference that their results are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from oats.config import OatsConfig, parse_n_m
from oats.decomposition.budget import check_pattern_divides, nnz_per_layer, nnz_per_row, rank_for
from oats.format.bitmask import encode
from oats.format.layer_spec import DTYPES

Form = Literal["oats", "unstructured", "dense"]
"""The form of a weight: sparse plus low-rank ("oats"), sparse alone at the same compression, or dense."""

# Most rows of a batch that are compared with float64, evenly spaced: 2048 rows would take minutes.
_CHECKED_ROWS = 64


@dataclass(frozen=True)
class RandomWeight:
    """``S + U V`` with normal values at random places, with as many as a compression leaves.

    Attributes:
        sparse: (d_out, d_in), zeros where nothing is kept.
        low_rank_u: (d_out, r); r is 0 for the forms without a low-rank part.
        low_rank_v: (r, d_in).
    """

    form: Form
    sparse: Tensor
    low_rank_u: Tensor
    low_rank_v: Tensor

    @classmethod
    def make(cls, form: Form, d_out: int, d_in: int, config: OatsConfig, seed: int = 0) -> RandomWeight:
        """A weight of one form, in the dtype of `config`.

        ``unstructured`` has the compression of `config` and rank 0, ``dense`` no zeros at all.

        Raises:
            ConfigError: the settings cannot be met for this shape.

        >>> weight = RandomWeight.make("oats", 64, 64, OatsConfig(compression=0.5, dtype="fp32"))
        >>> weight.rank, weight.nnz
        (4, 1536)
        """
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[config.dtype or "bf16"]
        rank = rank_for(d_out, d_in, config.compression, config.rank_ratio, config.pattern)
        if form != "oats":
            rank = 0
        sparse = torch.randn(d_out, d_in, generator=generator)
        if form != "dense":
            ratio = config.rank_ratio if form == "oats" else 0.0
            sparse *= _random_support(d_out, d_in, config.compression, ratio, config.pattern, generator)
        low_rank_u = torch.randn(d_out, rank, generator=generator)
        low_rank_v = torch.randn(rank, d_in, generator=generator) / max(rank, 1) ** 0.5
        return cls(form, sparse.to(dtype), low_rank_u.to(dtype), low_rank_v.to(dtype))

    @property
    def rank(self) -> int:
        """Rank of the low-rank part."""
        return self.low_rank_u.shape[1]

    @cached_property
    def nnz(self) -> int:
        """Non-zeros of the sparse part."""
        return int(self.sparse.count_nonzero())

    def canonical(self) -> dict[str, Tensor]:
        """The tensors of :mod:`oats.format.layer_spec`."""
        mask, values = encode(self.sparse)
        return {"mask": mask, "values": values, "low_rank_u": self.low_rank_u, "low_rank_v": self.low_rank_v}


@dataclass(frozen=True)
class Reference:
    """The product of a weight with some rows of a batch, in float64.

    Attributes:
        rows: (n,), numbers of the rows of the batch.
        output: (n, d_out).
        scale: (n, d_out), √(Σ w² x²): the standard deviation of each output if the signs of its terms were
            random. Rounding errors are in proportion to it, even if the terms cancel.
    """

    rows: Tensor
    output: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: RandomWeight, x: Tensor) -> Reference:
        """The reference for `x` (batch, d_in), on at most 64 rows."""
        rows = torch.linspace(0, len(x) - 1, min(len(x), _CHECKED_ROWS)).round().long()
        wide = x[rows].double()
        sparse, u, v = weight.sparse.double(), weight.low_rank_u.double(), weight.low_rank_v.double()
        output = wide @ sparse.T + (wide @ v.T) @ u.T
        squares = wide.square_()
        variance = squares @ sparse.square_().T + (squares @ v.square_().T) @ u.square_().T
        return cls(rows, output, variance.sqrt())

    def error(self, y: Tensor) -> float:
        """Largest error of `y` (batch, d_out), in units of `scale`; infinite where `y` is not finite.

        >>> weight = RandomWeight.make("dense", 8, 8, OatsConfig(dtype="fp32"))
        >>> x = torch.ones(3, 8)
        >>> Reference.of(weight, x).error(x @ weight.sparse.T) < 1e-6
        True
        """
        error = (y[self.rows].double() - self.output).abs() / self.scale.clamp_min(1e-30)
        return float(error.nan_to_num(nan=float("inf")).max())


def _random_support(
    d_out: int, d_in: int, compression: float, rank_ratio: float, pattern: str, generator: torch.Generator
) -> Tensor:
    """True where an element is kept, (d_out, d_in) bool."""
    check_pattern_divides(d_in, pattern, "the layer")
    n_m = parse_n_m(pattern)
    if n_m is not None:
        (k, m), rows = n_m, d_out
        keys = torch.rand(rows, d_in // m, m, generator=generator)
    elif pattern == "layer":
        k = nnz_per_layer(d_out, d_in, compression, rank_ratio)
        keys = torch.rand(1, d_out * d_in, generator=generator)
    else:
        k = nnz_per_row(d_in, compression, rank_ratio)
        keys = torch.rand(d_out, d_in, generator=generator)
    chosen = keys.topk(k, dim=-1, sorted=False).indices
    return torch.zeros(keys.shape, dtype=torch.bool).scatter_(-1, chosen, True).view(d_out, d_in)


def random_input(weight: RandomWeight, batch: int, seed: int = 1) -> Tensor:
    """(batch, d_in), normal, in the dtype of the weight."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, weight.sparse.shape[1], generator=generator).to(weight.sparse.dtype)
