"""What a compressed model computes in one call of the core instead of several of torch."""

from __future__ import annotations

from torch import nn

from oats.nn.fusion.gated_mlp import merge_gated_mlps_
from oats.nn.fusion.known_forward import restore_forward_
from oats.nn.fusion.rms_norm import fuse_norms_


def fuse_(model: nn.Module) -> None:
    """Give the known modules of a compressed model their faster forms, in place."""
    merge_gated_mlps_(model)
    fuse_norms_(model)


def unfuse_(model: nn.Module) -> None:
    """Undo :func:`fuse_`."""
    for module in model.modules():
        restore_forward_(module)
