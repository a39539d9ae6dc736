"""2:4 patterns on the sparse tensor cores of CUDA devices, through torch's semi-structured tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oats.errors import DeviceError
from oats.format.layer_spec import exact_parts, kept_elements
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear

# The libraries behind torch.sparse take only multiples of these.
_ROWS, _COLUMNS = 32, 64


class SemiStructuredLinear(nn.Module):
    """``y = S x + U (V x) + b`` with S as a semi-structured tensor, for inference in this process.

    It has no `state_dict`: save the model before :func:`use_semi_structured_`.

    Args:
        layer: on a CUDA device; :func:`fits` must be true of it.

    Raises:
        DeviceError: it is not.
    """

    def __init__(self, layer: SparseLowRankLinear) -> None:
        super().__init__()
        if not fits(layer):
            raise DeviceError(
                f"{layer} is not of the pattern 2:4 in bfloat16 with outputs a multiple of {_ROWS} and "
                f"inputs a multiple of {_COLUMNS}; leave it as it is"
            )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        exact = exact_parts(layer.canonical(), layer.storage)
        sparse, self.low_rank_u, self.low_rank_v = (part.to(layer.dtype) for part in exact)
        self.sparse = torch.sparse.to_sparse_semi_structured(sparse)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Compute ``S x + U (V x) + b`` of x, (…, in_features), bfloat16, on the layer's device."""
        rows = x.reshape(-1, self.in_features)
        y = nn.functional.linear(rows, self.sparse, self.bias)
        if len(self.low_rank_v):
            y = torch.addmm(y, rows @ self.low_rank_v.T, self.low_rank_u.T)
        return y.view(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise DeviceError(
            f"{prefix.removesuffix('.')}: a semi-structured layer cannot be saved; save the model before "
            "use_semi_structured_()"
        )


def fits(layer: SparseLowRankLinear) -> bool:
    """True if a bfloat16 layer has sizes that suit torch.sparse, and at most two values in each four inputs.

    >>> from oats import OatsConfig
    >>> linear = nn.Linear(64, 32, dtype=torch.bfloat16)
    >>> config = OatsConfig(pattern="2:4", compression=0.5)
    >>> fits(SparseLowRankLinear.from_linear(linear, torch.ones(64), config))
    True
    """
    if layer.dtype != torch.bfloat16 or layer.out_features % _ROWS or layer.in_features % _COLUMNS:
        return False
    kept = kept_elements(layer.canonical(), layer.in_features)
    return bool((kept.view(-1, 4).sum(1) <= 2).all())


def use_semi_structured_(model: nn.Module) -> int:
    """Replace the 2:4 layers of a model on one CUDA device by :class:`SemiStructuredLinear`, in place.

    Returns:
        The number of layers that were replaced.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SparseLowRankLinear) and fits(child):
                setattr(parent, name, SemiStructuredLinear(child))
                count += 1
    return count
