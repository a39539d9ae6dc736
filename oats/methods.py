"""The methods of decomposition: what each needs to know of a layer's inputs, and what it does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from oats.baselines.dsnot import prune_dsnot
from oats.baselines.magnitude import prune_magnitude
from oats.baselines.sparsegpt import prune_sparsegpt
from oats.baselines.wanda import prune_wanda
from oats.calibrate import BlockRunner, hessians, means_and_variances, second_moments
from oats.config import OatsConfig
from oats.decomposition import Decomposition, decompose
from oats.hessian import decompose_hessian

Statistics = Callable[[BlockRunner, int, Mapping[str, nn.Module]], dict[str, Tensor]]

_METHODS: dict[str, tuple[Statistics, Callable[..., Decomposition]]] = {
    "oats": (second_moments, decompose),
    "oats-hessian": (hessians, decompose_hessian),
    "magnitude": (second_moments, prune_magnitude),
    "wanda": (second_moments, prune_wanda),
    "sparsegpt": (hessians, prune_sparsegpt),
    "dsnot": (means_and_variances, prune_dsnot),
}


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
        Name → second moments (d_in,), Hessian (d_in, d_in), or means and variances (2, d_in). A layer that
        did not run is absent. Codes are fitted by Hessians, which then stand in for second moments.
    """
    return _statistics(config)(runner, index, linears)


def _statistics(config: OatsConfig) -> Statistics:
    own, _ = _METHODS[config.method]
    # Errors of codes are passed on by the Hessian.
    return hessians if own is second_moments and _has_codes(config) else own


def _has_codes(config: OatsConfig) -> bool:
    return config.storage.values != "exact"


def collects_hessians(config: OatsConfig) -> bool:
    """Whether Hessians are collected, for the method or for the codes.

    >>> collects_hessians(OatsConfig(values="int8"))
    True
    """
    return _statistics(config) is hessians


def inverts_hessians(config: OatsConfig) -> bool:
    """Whether errors are passed on by the inverse of a Hessian: of the method, or of the codes.

    >>> inverts_hessians(OatsConfig(method="oats-hessian")), inverts_hessians(OatsConfig(values="int8"))
    (False, True)
    """
    return config.method == "sparsegpt" or (_has_codes(config) and collects_hessians(config))


def second_moments_of(statistic: Tensor, config: OatsConfig) -> Tensor:
    """What the method takes, where Hessians were collected for the codes alone.

    >>> import torch
    >>> second_moments_of(torch.eye(2), OatsConfig(values="int4"))
    tensor([1., 1.])
    """
    own, _ = _METHODS[config.method]
    return statistic.diagonal() if own is second_moments and statistic.dim() == 2 else statistic


def hessian_of(statistic: Tensor, config: OatsConfig) -> Tensor | None:
    """The Hessian that codes are fitted by, None where they are rounded without."""
    return statistic if _has_codes(config) and collects_hessians(config) else None


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
        ConfigError, WeightError: as the method's function.

    >>> import torch
    >>> decompose_by_method(torch.eye(8), torch.eye(8), OatsConfig(method="oats-hessian", rank_ratio=0)).nnz
    8
    """
    _, decomposed = _METHODS[config.method]
    return decomposed(weight, second_moments_of(statistic, config), **config.decompose_options(), name=name)
