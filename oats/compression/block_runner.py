"""Runs a model block by block on what the block before returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oats.compression.calibration import POSITIONAL
from oats.compression.distributed import Ranks
from oats.errors import CalibrationError, OatsError


class Held(Protocol):
    """What a block returned for each batch: a list, or something that keeps it elsewhere."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __setitem__(self, index: int, value: Any, /) -> None: ...


class _Behind(Exception):  # noqa: N818 - not an error: it ends a run behind the block of interest
    pass


class BlockRunner:
    """Runs a model's blocks one at a time on what the block before returned.

    Args:
        model: in evaluation mode.
        blocks: its list of blocks, in the order in which they run.
        batches: from :func:`as_batches`.
        held: what the block before the next one returned for each batch; None before the first block.
        ranks: the processes that share the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: list[dict[str, Tensor]],
        held: Held | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._model, self._blocks, self._batches = model, blocks, batches
        self.held: Held = [None] * len(batches) if held is None else held
        """What the block before returned for each batch: a tensor, or a tuple."""
        self.ranks = ranks or Ranks()
        self.batch: dict[str, Tensor] = {}
        """The batch that is running, for hooks inside a block."""

    def run(self, index: int) -> Iterator[Any]:
        """Run block `index` on each batch that is this process's; yields what it returns.

        Raises:
            CalibrationError: the model does not take the batch, or does not run its blocks as a chain.
        """
        for i in self.share:
            self.batch = batch = self._batches[i]
            held = self.held[i]
            ran: list[int] = []
            outputs: list[Any] = []
            with ExitStack() as stack:
                for before in range(index):
                    stand_in = self._stand_in(before, index, held, ran)
                    stack.enter_context(replaced_forward(self._blocks[before], stand_in))
                ending = self._ending(index, held, ran, outputs)
                stack.enter_context(replaced_forward(self._blocks[index], ending))
                try:
                    self._call(batch)
                except _Behind:
                    pass
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
            yield outputs[0]

    def block(self, index: int) -> nn.Module:
        """Block `index`."""
        return self._blocks[index]

    @property
    def share(self) -> list[int]:
        """Indices of the batches that are this process's."""
        return self.ranks.share(range(len(self._batches)))

    def advance(self, index: int, into: Held | None = None) -> None:
        """Hold what block `index` makes of what is held.

        Args:
            index: the block.
            into: where that goes, an entry for each batch; None means in place of what is held.
        """
        into = self.held if into is None else into
        for i, output in zip(self.share, self.run(index), strict=True):
            into[i] = output
        self.held = into

    def _call(self, batch: dict[str, Tensor]) -> None:
        self._model(
            *[v for k, v in batch.items() if k == POSITIONAL], **{k: v for k, v in batch.items() if k}
        )

    @staticmethod
    def _stand_in(before: int, index: int, held: Any, ran: list[int]) -> Callable[..., Any]:
        """Returns what is held, or, further back, NaN: so that it shows where those outputs still count."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            ran.append(before)
            # A copy, since the model may go on in place, and what is held is used twice.
            return map_tensors(held, Tensor.clone if before == index - 1 else _all_nan)

        return forward

    def _ending(self, index: int, held: Any, ran: list[int], outputs: list[Any]) -> Callable[..., Any]:
        original = self._blocks[index].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if ran != list(range(index)):
                raise CalibrationError(
                    f"the model runs the blocks {ran} before block {index}; every block of the list must run "
                    "once, in the order of the list"
                )
            if index > 1 and _any(torch.isnan, (*args, *kwargs.values())):
                overflowed = _any(lambda x: ~torch.isfinite(x), held if isinstance(held, tuple) else (held,))
                if not overflowed:
                    raise CalibrationError(
                        f"block {index} receives what blocks before block {index - 1} returned, as in "
                        "x = x + block(x); what a block returns must hold all that the next one needs: move "
                        "the addition into the block"
                    )
            outputs.append(original(*args, **kwargs))
            raise _Behind

        return forward


def first_sequence(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The first sequence, or the first batch, where only the model knows how to cut it."""
    first = batches[0]
    if len(first) == 1:
        first = {name: map_tensors(value, lambda x: x[:1]) for name, value in first.items()}
    return first


def rehearse(model: nn.Module, blocks: Sequence[nn.Module], batches: list[dict[str, Tensor]]) -> None:
    """Run every block on the first sequence.

    Raises:
        CalibrationError: as :meth:`BlockRunner.run`.
    """
    runner = BlockRunner(model, blocks, [first_sequence(batches)])
    for index in range(len(blocks)):
        runner.advance(index)


def map_tensors(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """What a block returns, a tensor or nested tuples, with the function applied to each tensor."""
    if isinstance(output, tuple):
        return tuple(map_tensors(entry, function) for entry in output)
    return function(output) if isinstance(output, Tensor) else output


def _all_nan(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan) if x.is_floating_point() else x


def _any(test: Callable[[Tensor], Tensor], values: Iterable[Any]) -> bool:
    return any(bool(test(x).any()) for x in values if isinstance(x, Tensor))


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no key-value cache: a cache would hold every block's keys at once."""
    training = [module for module in model.modules() if module.training]
    configuration = getattr(model, "config", None)
    use_cache = getattr(configuration, "use_cache", None)
    model.eval()
    if use_cache is not None:
        configuration.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if use_cache is not None:
            configuration.use_cache = use_cache  # type: ignore[union-attr]
