"""OATS: transformers as sparse plus low-rank weights, compressed without retraining, fast on CPUs.

Names are resolved on first use (PEP 562): ``import oats`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oats._autoload import register

if TYPE_CHECKING:
    from oats._version import __version__ as __version__
    from oats.checkpoint.model_card import write_model_card as write_model_card
    from oats.compression.compress import compress_ as compress_
    from oats.compression.quantize import quantize_ as quantize_
    from oats.config import OatsConfig as OatsConfig
    from oats.decomposition.alternating import decompose as decompose
    from oats.decomposition.hessian import decompose_hessian as decompose_hessian
    from oats.decomposition.result import Decomposition as Decomposition
    from oats.decomposition.truncated_svd import TruncatedSVD as TruncatedSVD
    from oats.decomposition.truncated_svd import truncated_svd as truncated_svd
    from oats.engine.engine import Engine as Engine
    from oats.errors import CalibrationError as CalibrationError
    from oats.errors import CheckpointError as CheckpointError
    from oats.errors import ConfigError as ConfigError
    from oats.errors import DeviceError as DeviceError
    from oats.errors import DistributedError as DistributedError
    from oats.errors import FormatError as FormatError
    from oats.errors import OatsError as OatsError
    from oats.errors import OutputExistsError as OutputExistsError
    from oats.errors import UnsupportedModelError as UnsupportedModelError
    from oats.errors import WeightError as WeightError
    from oats.kernels.activations import set_activations as set_activations
    from oats.nn.sparse_low_rank_linear import SparseLowRankLinear as SparseLowRankLinear

# Where torch's entry points are off (TORCH_DEVICE_BACKEND_AUTOLOAD=0), whoever imports oats gets its format.
register()

_MODULES = {
    "oats._version": ("__version__",),
    "oats.checkpoint.model_card": ("write_model_card",),
    "oats.compression.compress": ("compress_",),
    "oats.compression.quantize": ("quantize_",),
    "oats.config": ("OatsConfig",),
    "oats.decomposition.alternating": ("decompose",),
    "oats.decomposition.hessian": ("decompose_hessian",),
    "oats.decomposition.result": ("Decomposition",),
    "oats.decomposition.truncated_svd": ("TruncatedSVD", "truncated_svd"),
    "oats.engine.engine": ("Engine",),
    "oats.errors": (
        *("OatsError", "CalibrationError", "CheckpointError", "ConfigError", "DeviceError"),
        *("DistributedError", "FormatError", "OutputExistsError", "UnsupportedModelError", "WeightError"),
    ),
    "oats.kernels.activations": ("set_activations",),
    "oats.nn.sparse_low_rank_linear": ("SparseLowRankLinear",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oats' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
