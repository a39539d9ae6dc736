"""Whether the CUDA kernels are there, and what to do without them.

The compiled module ``oats._cuda`` is optional: it is built where nvcc is found.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from oats.errors import ConfigError, DeviceError

try:
    from oats import _cuda
except ImportError:
    _cuda = None  # type: ignore[assignment]

compiled: Any = _cuda
"""The compiled module, or None."""

_REMEDY = "set OATS_CUDA_FALLBACK=dense to compute with the unpacked weight, or move the model with .cpu()"


def is_built() -> bool:
    """True if this installation has the CUDA kernels."""
    return compiled is not None


def check_cuda_kernels(name: str, device: torch.device, *, codes: bool = False) -> None:
    """Raise a DeviceError if a matrix is on a CUDA device, and no kernels for it were built.

    Or if there are none for codes, and numbers of it are stored so. `name` is for the message.
    """
    if device.type != "cuda":
        return
    if not is_built():
        raise DeviceError(
            f"{name} is on a CUDA device, and this installation of oats has no kernels for it; build oats "
            f"where nvcc is found (OATS_CUDA=1 pip install ., docs/cuda.md), {_REMEDY}"
        )
    if codes:
        raise DeviceError(
            f"{name} is on a CUDA device, where int8 and int4 codes have no kernels yet; store it exactly, "
            f"{_REMEDY}"
        )


def computes_unpacked(device: torch.device, *, codes: bool) -> bool:
    """True if a layer on `device` has no kernels there, and multiplies by its unpacked weight instead.

    Raises:
        ConfigError: as :func:`dense_fallback_wanted`.
    """
    return device.type == "cuda" and (codes or not is_built()) and dense_fallback_wanted()


def dense_fallback_wanted() -> bool:
    """True if ``OATS_CUDA_FALLBACK=dense`` asks to multiply by the unpacked weight where kernels are missing.

    Raises:
        ConfigError: it is set to something else.
    """
    wanted = os.environ.get("OATS_CUDA_FALLBACK", "")
    if wanted not in ("", "dense"):
        raise ConfigError(f"OATS_CUDA_FALLBACK is {wanted!r}, expected 'dense' or nothing")
    return wanted == "dense"
