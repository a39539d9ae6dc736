"""The methods of decomposition: what each needs to know of a layer's inputs, and what it does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from oats.config import OatsConfig
from oats.decomposition.alternating import Decomposition, decompose
from oats.decomposition.baselines.dsnot import prune_dsnot
from oats.decomposition.baselines.magnitude import prune_magnitude
from oats.decomposition.baselines.sparsegpt import prune_sparsegpt
from oats.decomposition.baselines.wanda import prune_wanda
from oats.decomposition.hessian import decompose_hessian

Statistic = Literal["second_moments", "hessians", "means_and_variances"]
"""What a method needs to know of a layer's inputs (:mod:`oats.compression.statistics` collects it)."""

_METHODS: dict[str, tuple[Statistic, Callable[..., Decomposition]]] = {
    "oats": ("second_moments", decompose),
    "oats-hessian": ("hessians", decompose_hessian),
    "magnitude": ("second_moments", prune_magnitude),
    "wanda": ("second_moments", prune_wanda),
    "sparsegpt": ("hessians", prune_sparsegpt),
    "dsnot": ("means_and_variances", prune_dsnot),
}


def statistic_for(config: OatsConfig) -> Statistic:
    """The statistic that a run collects: its method's, or Hessians where codes need them too.

    >>> statistic_for(OatsConfig()), statistic_for(OatsConfig(values="int8"))
    ('second_moments', 'hessians')
    """
    own, _ = _METHODS[config.method]
    # Hessians have the second moments on their diagonal.
    return "hessians" if own == "second_moments" and _has_codes(config) else own


def _has_codes(config: OatsConfig) -> bool:
    return config.storage.values != "exact"


def collects_hessians(config: OatsConfig) -> bool:
    """Whether Hessians are collected, for the method or for the codes.

    >>> collects_hessians(OatsConfig(values="int8"))
    True
    """
    return statistic_for(config) == "hessians"


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
    return statistic.diagonal() if own == "second_moments" and statistic.dim() == 2 else statistic


def hessian_of(statistic: Tensor, config: OatsConfig) -> Tensor | None:
    """The Hessian that codes are fitted by, None where they are rounded without."""
    return statistic if _has_codes(config) and collects_hessians(config) else None


def decompose_by_method(
    weight: Tensor, statistic: Tensor, config: OatsConfig, name: str | None = None
) -> Decomposition:
    """Decompose one weight (d_out, d_in) by the method of `config`.

    Args:
        weight: (d_out, d_in).
        statistic: of its inputs, as from :func:`oats.compression.statistics.input_statistics`.
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
