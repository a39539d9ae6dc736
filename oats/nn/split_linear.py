"""`SplitLinear`: a projection that was fused of several, as its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from oats.format.layer_spec import MARKER
from oats.kernels.sparse_low_rank_linear import linear_joined
from oats.nn.projections import projections_of
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear, drop_marker


class SplitLinear(nn.ModuleDict):
    """Several projections of one input, such as a fused QKV; returns their outputs one after another.

    One call of the core computes all parts, unless a hook, autograd or a compiler needs to see each of them.

    Args:
        parts: name → :class:`SparseLowRankLinear` of the same inputs, in the order of their outputs.

    >>> from oats import OatsConfig
    >>> q, k = (SparseLowRankLinear.from_linear(nn.Linear(8, n), torch.ones(8), OatsConfig()) for n in (4, 2))
    >>> SplitLinear({"q": q, "k": k})(torch.zeros(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(self, parts: Mapping[str, SparseLowRankLinear]) -> None:
        super().__init__(parts)
        layers = list(parts.values())
        self.in_features, self.out_features = layers[0].in_features, sum(p.out_features for p in layers)

    @property
    def weight(self) -> Tensor:
        """The dense weight, (d_out, d_in). Each access computes it: for inspection, not for speed."""
        return torch.cat([cast(SparseLowRankLinear, part).to_dense() for part in self.values()])

    @property
    def bias(self) -> Tensor | None:
        """The biases of the parts, (d_out,), or None; a copy."""
        biases = [part.bias for part in self.values()]
        return None if None in biases else torch.cat(cast(list[Tensor], biases))

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all parts, (…, out_features), for x, (…, in_features), of their dtype and device."""
        projections = projections_of(self._modules.values(), x)
        if projections is None:
            return torch.cat([part(x) for part in self.values()], dim=-1)
        return linear_joined(x, projections)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if all(part.packed is not None for part in self.values()):
            # Readers who expect one dense weight stop at this; they do not look for the parts' markers.
            destination[prefix + "weight"] = MARKER.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        drop_marker(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
