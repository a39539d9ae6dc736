"""The median of repeated measurements, with the 10th and the 90th percentile.

Contenders take turns in one run, so that a machine that slows down slows all of them alike.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of repeated measurements, in the unit of the measurements."""

    median: float
    p10: float
    p90: float

    @property
    def is_wide(self) -> bool:
        """True if the values scatter so much that the machine was probably busy with something else."""
        return self.p90 > 1.5 * self.median

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of some measurements.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, p10=1.2, p90=2.8)
        """
        q = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
        return cls(statistics.median(values), round(float(q[0]), 12), round(float(q[1]), 12))
