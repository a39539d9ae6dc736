"""Ranks: several processes that compress one model together, on torch.distributed.

Each runs the model on its share of the calibration batches and decomposes its share of a block's matrices.
They exchange sums over tokens and finished layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from oats.errors import DistributedError

T = TypeVar("T")

TIMEOUT = timedelta(hours=24)
"""How long the others wait while one rank works on a matrix. If a process ends, its connections close and the
others notice at once."""


class Ranks:
    """The processes of one run, in torch's default process group: this one's rank and their number.

    By default there is only this one. Methods that wait for others raise a `DistributedError` if one is gone.

    >>> Ranks().share(range(5))
    [0, 1, 2, 3, 4]
    >>> Ranks(1, 2).share(range(5))
    [1, 3]
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item."""
        return list(items[self.rank :: self.size])

    def owners(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Name → the rank that does it: the costliest goes first, to the rank with the least work so far.

        >>> Ranks(0, 2).owners({"a": 1, "b": 3, "c": 2})
        {'b': 0, 'c': 1, 'a': 1}
        """
        load = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = load.index(min(load))
            load[owners[name]] += costs[name]
        return owners

    def sum(self, sums: dict[T, Tensor]) -> dict[T, Tensor]:
        """The sums over all ranks, by key; a rank without a key adds zeros."""
        if self.size == 1:
            return sums
        own = {key: (tuple(value.shape), value.dtype) for key, value in sums.items()}
        described: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(described, own))
        everywhere = {key: shape_and_dtype for one in described for key, shape_and_dtype in one.items()}
        totals = {}
        for key in sorted(everywhere, key=str):
            shape, dtype = everywhere[key]
            totals[key] = sums[key] if key in sums else torch.zeros(shape, dtype=dtype)
            self._call(partial(dist.all_reduce, totals[key]))
        return totals

    def broadcast(self, value: T | None, source: int = 0) -> T:
        """The value of rank `source`, sent by pickle."""
        if self.size == 1:
            return cast(T, value)
        values = [value]
        self._call(lambda: dist.broadcast_object_list(values, src=source))
        return cast(T, values[0])

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self._call(dist.barrier)

    def _call(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"rank {self.rank} of {self.size}: another rank has ended, so this one ends too; its own "
                "message says why. Run the same command again, with any number of ranks, to go on from the "
                f"last finished block ({str(error).splitlines()[0]})"
            ) from error


@contextmanager
def joined() -> Iterator[Ranks]:
    """A context that gives the launched processes, in a process group (gloo); or only this one.

    Raises:
        DistributedError: the processes cannot reach each other.
    """
    # torchrun, and launchers that set the same variables, start several processes.
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    try:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the processes of this run cannot reach each other: {str(error).splitlines()[0]}; start "
            "them with torchrun, and check --rdzv-endpoint and the firewall"
        ) from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
