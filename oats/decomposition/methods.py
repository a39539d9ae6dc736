"""The methods by name: the statistic of a layer's inputs that each needs, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from oats.config import OatsConfig
from oats.decomposition.alternating import decompose
from oats.decomposition.baselines.by_score import prune_magnitude, prune_wanda
from oats.decomposition.baselines.dsnot import prune_dsnot
from oats.decomposition.baselines.sparsegpt import prune_sparsegpt
from oats.decomposition.hessian import decompose_hessian
from oats.decomposition.result import Decomposition

Statistic = Literal["second_moments", "hessians", "means_and_variances"]
"""Statistics of a layer's inputs by name. :mod:`oats.compression.statistics` maps each to its collector."""

_METHODS: dict[str, tuple[Statistic, Callable[..., Decomposition]]] = {
    "oats": ("second_moments", decompose),
    "oats-hessian": ("hessians", decompose_hessian),
    "magnitude": ("second_moments", prune_magnitude),
    "wanda": ("second_moments", prune_wanda),
    "sparsegpt": ("hessians", prune_sparsegpt),
    "dsnot": ("means_and_variances", prune_dsnot),
}


def statistic_for(config: OatsConfig) -> Statistic:
    """The statistic to collect: the one of the method, or Hessians if int8 or int4 codes are fitted by them.

    >>> statistic_for(OatsConfig()), statistic_for(OatsConfig(values="int8"))
    ('second_moments', 'hessians')
    """
    own, _ = _METHODS[config.method]
    # Second moments are the diagonal of a Hessian, so Hessians serve both. Means and variances are not in it.
    return "hessians" if own == "second_moments" and config.storage.values != "exact" else own


def uses_hessian_for_codes(config: OatsConfig) -> bool:
    """True if kept values become codes that are fitted by the Hessian.

    >>> uses_hessian_for_codes(OatsConfig(values="int8")), uses_hessian_for_codes(OatsConfig())
    (True, False)
    """
    return config.storage.values != "exact" and statistic_for(config) == "hessians"


def codes_hessian(statistic: Tensor, config: OatsConfig) -> Tensor | None:
    """The collected statistic if it is the Hessian by which codes are fitted, else None."""
    return statistic if uses_hessian_for_codes(config) else None


def method_input(statistic: Tensor, config: OatsConfig) -> Tensor:
    """The statistic that the method takes: the diagonal of a Hessian that was collected for codes alone.

    >>> import torch
    >>> method_input(torch.eye(2), OatsConfig(values="int4"))
    tensor([1., 1.])
    """
    own, _ = _METHODS[config.method]
    return statistic.diagonal() if own == "second_moments" and statistic.dim() == 2 else statistic


def decompose_by_method(
    weight: Tensor, statistic: Tensor, config: OatsConfig, name: str | None = None
) -> Decomposition:
    """Decompose one weight, (d_out, d_in), by the method of `config`.

    `statistic` is of its inputs, as collected for :func:`statistic_for`; `name` is for error messages.

    Raises:
        ConfigError, WeightError: as the method's function.

    >>> import torch
    >>> decompose_by_method(torch.eye(8), torch.eye(8), OatsConfig(method="oats-hessian", rank_ratio=0)).nnz
    8
    """
    _, function = _METHODS[config.method]
    return function(weight, method_input(statistic, config), **config.decompose_options(), name=name)
