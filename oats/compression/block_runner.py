"""Runs a model one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oats.compression.calibration import POSITIONAL
from oats.compression.distributed import Ranks
from oats.compression.temporary import replaced_forward
from oats.errors import CalibrationError, OatsError


class HiddenStates(Protocol):
    """What a block returned for each batch, a tensor or a tuple: in a list, or on disk."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __setitem__(self, index: int, value: Any, /) -> None: ...


class _BlockHasRun(Exception):  # noqa: N818 - not an error: it brings a block's output out of the model
    pass


class BlockRunner:
    """Runs one block of a model at a time, on what the block before it returned.

    Args:
        model: in evaluation mode.
        blocks: its blocks, in the order in which they run.
        batches: from :func:`oats.compression.calibration.as_batches`.
        hidden_states: what the block before the next one returned for each batch; None before the first.
        ranks: the processes that share the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: list[dict[str, Tensor]],
        hidden_states: HiddenStates | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self.blocks, self._batches = model, blocks, batches
        self.hidden_states: HiddenStates = [None] * len(batches) if hidden_states is None else hidden_states
        self.ranks = ranks or Ranks()
        self.batch: dict[str, Tensor] = {}
        """The batch that is running, for hooks inside a block."""

    def run(self, index: int) -> Iterator[Any]:
        """Run block `index` on each batch of this rank; yields what the block returns.

        The model itself is called, so that it makes masks and positions. Blocks before `index` are replaced
        while it runs.

        Raises:
            CalibrationError: the model does not take the batch, or does not run its blocks as a chain.
        """
        for i in self.share:
            self.batch = batch = self._batches[i]
            positional = [batch[POSITIONAL]] if POSITIONAL in batch else []
            before = self.hidden_states[i]
            ran: list[int] = []
            with ExitStack() as stack:
                for earlier in range(index):
                    replay = self._replay(earlier, index, before, ran)
                    stack.enter_context(replaced_forward(self.blocks[earlier], replay))
                run_and_leave = self._run_and_leave(index, before, ran)
                stack.enter_context(replaced_forward(self.blocks[index], run_and_leave))
                try:
                    self._model(*positional, **{name: value for name, value in batch.items() if name})
                except _BlockHasRun as has_run:
                    (output,) = has_run.args
                except OatsError:
                    raise
                except (TypeError, ValueError, RuntimeError, LookupError) as error:
                    raise CalibrationError(
                        f"calibration batch {i}: {type(self._model).__name__} could not run on it up to "
                        f"block {index}: {type(error).__name__}: {error}"
                    ) from error
                else:
                    raise CalibrationError(
                        f"block {index} did not run when the model was called on calibration batch {i}; "
                        "the list of blocks is not the one that this model runs"
                    )
            yield output

    @property
    def share(self) -> list[int]:
        """Indices of this rank's batches."""
        return self.ranks.share(range(len(self._batches)))

    def advance(self, index: int, into: HiddenStates | None = None) -> None:
        """Run block `index`; what it returns becomes the hidden states, in `into` or over those before."""
        into = self.hidden_states if into is None else into
        for i, output in zip(self.share, self.run(index), strict=True):
            into[i] = output
        self.hidden_states = into

    @staticmethod
    def _replay(earlier: int, index: int, before: Any, ran: list[int]) -> Callable[..., Any]:
        """A forward that returns the hidden states; before the last block NaN, which shows if it is used."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            ran.append(earlier)
            # A copy: the model may change it in place, and it is used twice.
            return map_tensors(before, Tensor.clone if earlier == index - 1 else _all_nan)

        return forward

    def _run_and_leave(self, index: int, before: Any, ran: list[int]) -> Callable[..., Any]:
        """A forward that runs block `index`, and then leaves the forward of the model."""
        original = self.blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if ran != list(range(index)):
                raise CalibrationError(
                    f"the model runs the blocks {ran} before block {index}; every block of the list must run "
                    "once, in the order of the list"
                )
            inputs, replayed = (*args, *kwargs.values()), before if isinstance(before, tuple) else (before,)
            # NaN may also come from a replayed state that overflowed.
            if index > 1 and _any(torch.isnan, inputs) and not _any(lambda x: ~torch.isfinite(x), replayed):
                raise CalibrationError(
                    f"block {index} receives what blocks before block {index - 1} returned, as in "
                    "x = x + block(x); what a block returns must hold all that the next one needs: move "
                    "the addition into the block"
                )
            raise _BlockHasRun(original(*args, **kwargs))

        return forward


def map_tensors(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to each tensor that a block returns: one, or nested tuples of them."""
    if isinstance(output, tuple):
        return tuple(map_tensors(entry, function) for entry in output)
    return function(output) if isinstance(output, Tensor) else output


def _all_nan(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else x


def _any(test: Callable[[Tensor], Tensor], values: Iterable[Any]) -> bool:
    return any(bool(test(x).any()) for x in values if isinstance(x, Tensor))
