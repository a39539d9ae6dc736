"""Second moments, block by block.

The model itself is run for each block: the blocks before it only pass on what they are given, it gets the
held hidden states, and the run ends behind it. So whatever else a block takes (masks, rotary
embeddings, a layer's own kind of attention) comes from the model's own code, and only one block's
hidden states are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from oats.errors import CalibrationError

Calibration = Tensor | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids (n, length), or batches: tensors, or keyword arguments for the model."""

MIN_TOKENS = 16
"""Fewer tokens than this say nothing about the inputs of a layer."""

# Sequences that run together hold about this many tokens: full-speed products, small beside a model.
_TOKENS_PER_BATCH = 4096


def as_batches(model: nn.Module, calibration: Calibration) -> list[dict[str, Tensor]]:
    """Calibration data as keyword arguments for the model.

    Raises:
        CalibrationError: there is none, it is too short, or it does not fit the model.
    """
    if isinstance(calibration, (str, bytes)):
        raise CalibrationError(
            "calibration is text; pass token ids, e.g. tokenizer(text, return_tensors='pt').input_ids"
        )
    name = getattr(model, "main_input_name", "input")
    items: Iterable[Tensor | Mapping[str, Tensor]] = calibration
    if isinstance(calibration, Tensor):
        if calibration.dim() < 2:
            raise CalibrationError(
                f"calibration has shape {tuple(calibration.shape)}, expected token ids (sequences, length); "
                "for one sequence use calibration.unsqueeze(0)"
            )
        per_batch = (
            max(1, _TOKENS_PER_BATCH // max(calibration.shape[1], 1)) if calibration.dim() == 2 else 32
        )
        items = calibration.split(per_batch) if calibration.numel() else []
    batches = [dict(item) if isinstance(item, Mapping) else {name: item} for item in items]
    if not batches:
        raise CalibrationError("calibration is empty; pass at least one batch of inputs")
    for i, batch in enumerate(batches):
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.numel() == 0:
                raise CalibrationError(f"calibration batch {i}: {key} is empty")
    ids = [batch["input_ids"] for batch in batches if isinstance(batch.get("input_ids"), Tensor)]
    if ids:
        _check_tokens(model, ids)
    return batches


def _check_tokens(model: nn.Module, ids: Sequence[Tensor]) -> None:
    tokens = sum(i.numel() for i in ids)
    if tokens < MIN_TOKENS:
        raise CalibrationError(
            f"calibration has {tokens} tokens, at least {MIN_TOKENS} are needed; the paper uses 128 x 2048"
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    largest, smallest = max(int(i.max()) for i in ids), min(int(i.min()) for i in ids)
    if any(i.is_floating_point() for i in ids) or smallest < 0 or (vocabulary and largest >= vocabulary):
        raise CalibrationError(
            f"calibration tokens are {ids[0].dtype} from {smallest} to {largest}, but the vocabulary has "
            f"{vocabulary} entries; tokenise with the model's own tokenizer"
        )


class _Behind(Exception):  # noqa: N818 - not an error: it ends a run behind the block of interest
    pass


class BlockRunner:
    """Runs a model's blocks one at a time on held hidden states.

    Args:
        model: in evaluation mode.
        blocks: its list of blocks, in the order in which they run.
        batches: from :func:`as_batches`.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], batches: list[dict[str, Tensor]]
    ) -> None:
        """Hold nothing yet."""
        self._model, self._blocks, self._batches = model, blocks, batches
        self._hidden: list[Tensor] | None = None
        # Entries of the tuple that each block returns; None for a bare tensor.
        self._returns: dict[int, int | None] = {}
        self._keywords = hasattr(model, "main_input_name")
        self.batch: dict[str, Tensor] = {}
        """The batch that is running, for hooks inside a block."""

    def run(self, index: int) -> Iterator[Tensor]:
        """Run block `index` on each batch; yields its output hidden states."""
        for i, batch in enumerate(self._batches):
            self.batch = batch
            outputs: list[Tensor] = []
            held = None if self._hidden is None else self._hidden[i]
            with ExitStack() as stack:
                for before in range(index):
                    stack.enter_context(_replaced_forward(self._blocks[before], self._passing(before)))
                block = self._blocks[index]
                original = block.forward
                stack.enter_context(_replaced_forward(block, self._ending(index, original, held, outputs)))
                try:
                    self._call(batch)
                except _Behind:
                    pass
                else:
                    raise CalibrationError(
                        f"block {index} did not run when the model was called on calibration batch {i}; "
                        "the list of blocks is not the one that this model runs"
                    )
            yield outputs[0]

    def advance(self, index: int) -> None:
        """Replace the held hidden states by what block `index` makes of them."""
        hidden = self._hidden or [torch.empty(0)] * len(self._batches)
        for i, output in enumerate(self.run(index)):
            hidden[i] = output
        self._hidden = hidden

    def _call(self, batch: dict[str, Tensor]) -> None:
        if self._keywords:
            self._model(**batch)
        else:
            self._model(*batch.values())

    def _passing(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            length = self._returns[index]
            return hidden if length is None else (hidden, *[None] * (length - 1))

        return forward

    def _ending(
        self, index: int, original: Callable[..., Any], held: Tensor | None, outputs: list[Tensor]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if held is not None:
                if args:
                    args = (held, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": held}
            output = original(*args, **kwargs)
            self._returns[index] = len(output) if isinstance(output, tuple) else None
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise _Behind

        return forward


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def second_moments(runner: BlockRunner, index: int, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Σ over tokens of x_j² at the input of each linear layer of a block (arXiv 2409.13652, section 2.2).

    Tokens that an attention mask (batch, length) excludes do not count.

    Args:
        runner: stands before block `index`.
        index: the block.
        linears: its layers by name.

    Returns:
        Name → (d_in,) float32. A layer that did not run is absent.
    """
    sums: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            mask = runner.batch.get("attention_mask")
            if isinstance(mask, Tensor) and x.shape[:2] == mask.shape:
                x = x[mask.bool()]
            moment = x.reshape(-1, x.shape[-1]).float().square().sum(0).double()
            sums[name] = sums[name] + moment if name in sums else moment

        return hook

    handles = [linear.register_forward_pre_hook(collect(name)) for name, linear in linears.items()]
    try:
        for _ in runner.run(index):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment.float() for name, moment in sums.items()}
