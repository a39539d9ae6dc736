"""The result of a compression, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from oats.config import OatsConfig

Progress = Callable[[int, int, str, float], None]
"""Called after each layer with: layers done, layers in all, the layer's name, its relative error."""


@dataclass(frozen=True)
class LayerReport:
    """Size, error and time of one compressed matrix."""

    name: str
    d_out: int
    d_in: int
    rank: int
    nnz: int
    relative_error: float
    seconds: float


@dataclass
class CompressionReport:
    """The result of :func:`oats.compress_`."""

    config: OatsConfig
    layers: list[LayerReport] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)
    """Weight of a transformer block that was not compressed → why."""
    matched: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Block → its loss before and after matching (:mod:`oats.compression.matching`)."""
    seconds_before: float = field(default=0.0, compare=False)
    """Seconds that earlier, interrupted runs spent on blocks reused here."""

    @property
    def parameters_before(self) -> int:
        """Elements of the dense weights of the compressed layers."""
        return sum(layer.d_out * layer.d_in for layer in self.layers)

    @property
    def parameters_after(self) -> int:
        """Non-zeros and entries of the low-rank factors of the compressed layers."""
        return sum(layer.nnz + layer.rank * (layer.d_out + layer.d_in) for layer in self.layers)
