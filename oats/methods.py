"""The methods of decomposition: what each needs to know of a layer's inputs, and what it does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from oats.calibrate import BlockRunner, hessians, second_moments
from oats.config import OatsConfig
from oats.decomposition import Decomposition, decompose
from oats.hessian import decompose_hessian

_STATISTICS = {"oats": second_moments, "oats-hessian": hessians}
_DECOMPOSE: dict[str, Callable[..., Decomposition]] = {"oats": decompose, "oats-hessian": decompose_hessian}


def input_statistics(
    runner: BlockRunner, index: int, linears: Mapping[str, nn.Module], config: OatsConfig
) -> dict[str, Tensor]:
    """What the method needs to know of the inputs of each layer of a block.

    Args:
        runner: stands before block `index`.
        index: the block.
        linears: its layers by name.
        config: whose `method` it is.

    Returns:
        Name → second moments (d_in,) or Hessian (d_in, d_in). A layer that did not run is absent.
    """
    return _STATISTICS[config.method](runner, index, linears)


def decompose_by_method(
    weight: Tensor, statistic: Tensor, config: OatsConfig, name: str | None = None
) -> Decomposition:
    """Decompose one weight (d_out, d_in) by the method of `config`.

    Args:
        weight: (d_out, d_in).
        statistic: of its inputs, as from :func:`input_statistics`.
        config: the compression's settings.
        name: of the layer, for error messages.

    Raises:
        ConfigError, WeightError: as :func:`oats.decompose` and :func:`oats.decompose_hessian`.

    >>> import torch
    >>> decompose_by_method(torch.eye(8), torch.eye(8), OatsConfig(method="oats-hessian", rank_ratio=0)).nnz
    8
    """
    return _DECOMPOSE[config.method](weight, statistic, **config.decompose_options(), name=name)
