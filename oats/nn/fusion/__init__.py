"""Modules of a model that compute in one call of the core what takes torch several."""

from __future__ import annotations

from torch import nn

from oats.nn.fusion.gated_mlp import merge_gated_mlps_
from oats.nn.fusion.known_forward import restore_forward_
from oats.nn.fusion.rms_norm import fuse_norms_


def fuse_(model: nn.Module) -> None:
    """Replace the forward of the modules that we know by a fused one, in place."""
    merge_gated_mlps_(model)
    fuse_norms_(model)


def unfuse_(model: nn.Module) -> None:
    """Undo :func:`fuse_`."""
    for module in model.modules():
        restore_forward_(module)
