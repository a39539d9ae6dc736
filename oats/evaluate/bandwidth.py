"""The read bandwidth of the machine: the bound of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# Past every cache, and long enough that starting the threads does not count.
_BYTES = 256 << 20


def read_bandwidth() -> Callable[[], float]:
    """A measurement of the read bandwidth with torch's threads: each call gives bytes a second.

    It is the time of torch's sum of 256 MB of fp32, which stay allocated as long as the function is held.

    >>> read_bandwidth()() > 1e8
    True
    """
    data = torch.ones(_BYTES // 4)

    def measure() -> float:
        start = time.perf_counter()
        data.sum()
        return _BYTES / (time.perf_counter() - start)

    measure()
    return measure
