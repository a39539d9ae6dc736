"""Checks of weights and statistics. Every error names the layer and says what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from oats.config import Pattern
from oats.decomposition.budget import check_pattern_divides
from oats.errors import WeightError

_PANEL = 256
"""Rows of a Hessian that are compared with its columns at once."""


def check_weight(weight: Tensor, pattern: Pattern, layer: str) -> None:
    """Raise a WeightError or a ConfigError unless the weight can be decomposed under the pattern."""
    if not isinstance(weight, Tensor):
        raise WeightError(f"{layer}: the weight must be a torch.Tensor, got {type(weight).__name__}")
    if not (weight.is_cpu or weight.is_cuda) or weight.layout != torch.strided:
        raise WeightError(
            f"{layer}: the weight must be a dense tensor on the CPU or a CUDA device, got layout "
            f"{weight.layout} on {weight.device}; load, move or densify it first"
        )
    if weight.ndim != 2 or 0 in weight.shape:
        raise WeightError(
            f"{layer}: the weight must have shape (d_out, d_in) with both at least 1, got "
            f"{tuple(weight.shape)}; reshape it or skip this layer"
        )
    if not weight.is_floating_point():
        raise WeightError(
            f"{layer}: the weight must have a floating dtype, got {weight.dtype}; "
            f"dequantise or convert it first"
        )
    check_all(torch.isfinite(weight.detach().float()), "weight", "NaN or infinite in float32", layer)
    check_pattern_divides(weight.shape[1], pattern, layer)


def check_second_moment(second_moment: Tensor, d_in: int, layer: str) -> None:
    """Raise a WeightError unless these can be the second moments of d_in inputs."""
    if not isinstance(second_moment, Tensor):
        raise WeightError(
            f"{layer}: second_moment must be a torch.Tensor, got {type(second_moment).__name__}"
        )
    if tuple(second_moment.shape) != (d_in,):
        raise WeightError(
            f"{layer}: second_moment must have shape ({d_in},), one value for each input of the weight, got "
            f"{tuple(second_moment.shape)}; pass the sum of squares of each input over the calibration tokens"
        )
    if second_moment.is_complex() or second_moment.dtype == torch.bool or second_moment.is_meta:
        raise WeightError(
            f"{layer}: second_moment must hold real numbers, got {second_moment.dtype} on "
            f"{second_moment.device}; pass the sum of squares of each input over the calibration tokens"
        )
    values = second_moment.detach()
    check_all(torch.isfinite(values), "second_moment", "NaN or infinite", layer)
    check_all(values >= 0, "second_moment", "negative", layer)


def check_hessian(hessian: Tensor, d_in: int, layer: str) -> None:
    """Raise a WeightError unless this can be the Hessian of d_in inputs."""
    if not isinstance(hessian, Tensor):
        raise WeightError(f"{layer}: the Hessian must be a torch.Tensor, got {type(hessian).__name__}")
    if tuple(hessian.shape) != (d_in, d_in) or not hessian.is_floating_point() or not hessian.is_cpu:
        raise WeightError(
            f"{layer}: the Hessian must be a real ({d_in}, {d_in}) matrix on the CPU, one row for each input "
            f"of the weight, got {tuple(hessian.shape)}, {hessian.dtype} on {hessian.device}; pass X Xᵀ "
            "summed over the calibration tokens"
        )
    check_all(torch.isfinite(hessian), "Hessian", "NaN or infinite", layer)
    check_all(hessian.diagonal() >= 0, "Hessian's diagonal", "negative", layer)
    allowed = 1e-3 * float(hessian.diagonal().max())
    # By panels, so that no temporary is as large as the Hessian.
    panels = zip(hessian.split(_PANEL), hessian.T.split(_PANEL), strict=True)
    if not all(torch.allclose(rows, columns, rtol=1e-3, atol=allowed) for rows, columns in panels):
        raise WeightError(
            f"{layer}: the Hessian is not symmetric; pass X Xᵀ summed over the calibration tokens"
        )


def check_all(good: Tensor, what: str, flaw: str, layer: str) -> None:
    """Raise a WeightError that counts the values that are not good, and says where the first is."""
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    remedy = "repair the checkpoint or skip this layer" if what == "weight" else "check the calibration data"
    raise WeightError(
        f"{layer}: {len(bad)} of the {good.numel()} values of the {what} are {flaw}, the first at "
        f"{bad[0].tolist()}; {remedy}"
    )
