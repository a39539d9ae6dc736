"""The memory of a compression: predicted, and as the operating system counts it."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from oats.compression.targets import Target
from oats.config import OatsConfig
from oats.decomposition.methods import statistic_for, uses_hessian_for_codes
from oats.errors import ConfigError, OatsError

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

# Memory of a decomposition, measured as the growth of the peak (tests/compression/test_memory.py checks that
# it is enough): a fixed part for libraries, and bytes per element of the matrix and of a Hessian.
_FIXED = 192_000_000
_MATRIX_BYTES = {"fast": 28, "exact": 80}
_OATS_HESSIAN_BYTES = {"fast": (48, 20), "exact": (100, 64)}
_SPARSEGPT_BYTES = 72
# While the inverse of a Hessian is factored in float64: bytes per element of the Hessian, and of the matrix.
_HESSIAN_BYTES, _WAITING_MATRIX_BYTES = 48, 12

# At once inside a block: copies of the widest activation, in the model's dtype; and of a layer's input, in
# float32, for its statistic.
_ACTIVATIONS, _STATISTIC = 6, 3


def parse_size(text: str) -> int:
    """Parse a number of bytes with its unit.

    Raises:
        ConfigError: the text is no size.

    >>> parse_size("6GB"), parse_size("512 MiB"), parse_size("1.5g")
    (6000000000, 536870912, 1500000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0
    if size < 1:
        raise ConfigError(f"a size is a number and a unit, such as 6GB or 512MiB, got {text!r}")
    return int(size)


def peak_bytes() -> int:
    """Largest resident memory of this process so far, by the operating system's count; 0 if it is unknown."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Resident memory of this process now, by the same count."""
    return _status("VmRSS")


def _status(name: str) -> int:
    if not sys.platform.startswith("linux"):
        return 0
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def return_freed() -> None:
    """Return the free pages that the allocator keeps to the system."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def block_bytes(
    block: nn.Module, targets: Mapping[str, Target], config: OatsConfig, dtype: torch.dtype, tokens: int
) -> dict[str, int]:
    """Predict the bytes that compressing one block adds to the process, by purpose.

    Args:
        block: its weights may be on the meta device.
        targets: its layers to compress.
        config: settings of the run.
        dtype: of weights and activations.
        tokens: in a calibration batch.
    """
    shapes = [tuple(weight.shape) for target in targets.values() for weight, _ in target.matrices().values()]
    dense = sum(parameter.numel() for parameter in block.parameters()) * dtype.itemsize
    # Values, factors, and one bit per element.
    compressed = dense * (1 - config.compression) + dense / dtype.itemsize / 8
    widest = max(max(shape) for shape in shapes)
    running = tokens * widest * (_ACTIVATIONS * dtype.itemsize + _STATISTIC * 4)
    # Twice: packed for the kernels, and as stored.
    need = {"dense weights": dense, "compressed weights": round(2 * compressed)}
    decomposing = max(decomposition_bytes(d_out, d_in, config) for d_out, d_in in shapes)
    if statistic_for(config) == "hessians":
        # Layers that share an input share its Hessian. Twice: the sums, and those of one batch.
        need["Hessians"] = 2 * 4 * sum(d_in**2 for d_in in {d_in for _, d_in in shapes})
    if config.block_matching:
        # Five float32 copies: values, supports, gradients, and Adam's two moments.
        running += 5 * 4 * sum(d_out * d_in for d_out, d_in in shapes)
    # These two come one after the other.
    need["running the block or decomposing a matrix"] = max(decomposing, running)
    return need


def decomposition_bytes(d_out: int, d_in: int, config: OatsConfig) -> int:
    """Predict the bytes that the decomposition of one matrix takes."""
    matrix, hessian = d_out * d_in, d_in**2
    if config.method == "oats-hessian":
        of_matrix, of_hessian = _OATS_HESSIAN_BYTES[config.svd]
        own = of_matrix * matrix + of_hessian * hessian
    else:
        own = (_SPARSEGPT_BYTES if config.method == "sparsegpt" else _MATRIX_BYTES[config.svd]) * matrix
    if config.method == "sparsegpt" or uses_hessian_for_codes(config):
        own = max(own, _WAITING_MATRIX_BYTES * matrix + _HESSIAN_BYTES * hessian)
    return _FIXED + own


@dataclass
class Limit:
    """A limit to the memory of this process, in bytes; None means that there is none."""

    limit: int | None = None

    def allows(self, need: Mapping[str, int]) -> bool:
        """True if the sum of `need`, purpose → bytes, is within the limit."""
        return self.limit is None or sum(need.values()) <= self.limit

    def check_need(self, need: Mapping[str, int]) -> None:
        """Refuse a run that is predicted to pass the limit (see :meth:`allows`), with a `ConfigError`."""
        if self.limit is not None and not self.allows(need):
            parts = ", ".join(f"{size / 1e9:.2f} GB for {purpose}" for purpose, size in need.items() if size)
            raise ConfigError(
                f"this compression needs about {sum(need.values()) / 1e9:.2f} GB, more than the memory limit "
                f"of {self.limit / 1e9:.2f} GB: {parts}. Raise it, or shorten the calibration sequences"
            )

    def check(self) -> None:
        """Stop a run that has passed the limit, with an `OatsError`."""
        if self.limit is not None and peak_bytes() > self.limit:
            raise OatsError(
                f"the memory limit of {self.limit / 1e9:.2f} GB was passed, by the operating system's count "
                f"{peak_bytes() / 1e9:.2f} GB were resident; finished blocks are kept; run the "
                "command again with a higher --memory-limit"
            )


def largest_need(needs: Iterable[dict[str, int]]) -> dict[str, int]:
    """The one with the largest sum.

    >>> largest_need([{"a": 1}, {"a": 2}])
    {'a': 2}
    """
    return max(needs, key=lambda need: sum(need.values()))
