"""Second moments, block by block.

The model itself is run for each block: a stand-in for the block before it returns what that block made of
the batch, and the run ends behind the block. So whatever else a block takes (masks, rotary embeddings, a
layer's own kind of attention), and whatever the model does between two blocks, comes from the model's own
code, and only one block's outputs are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oats.distributed import Ranks
from oats.errors import CalibrationError, OatsError
from oats.models.experts import SplitExperts

Calibration = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids (n, length), or batches: tensors, or keyword arguments for the model; or one such dict."""

MIN_TOKENS = 16
"""Fewer tokens than this say nothing about the inputs of a layer."""

# Sequences that run together hold about this many tokens: full-speed products, small beside a model.
TOKENS_PER_BATCH = 4096

# The key of a tensor whose keyword is not known: the model's first positional argument.
_FIRST = ""

_EXPECTED = (
    "expected token ids as a LongTensor (sequences, length), or batches: such tensors, or dicts of keyword "
    "arguments for the model, as tokenizer(text, return_tensors='pt') makes them"
)


def as_batches(
    model: nn.Module, calibration: Calibration, tokens: int = TOKENS_PER_BATCH
) -> list[dict[str, Tensor]]:
    """Calibration data as keyword arguments for the model.

    Args:
        model: what it is for.
        calibration: data whose batches are kept where it comes in batches.
        tokens: that a batch of a tensor (sequences, length) is to hold, about.

    Raises:
        CalibrationError: there is none, it is too short, or it does not fit the model.
    """
    name = getattr(model, "main_input_name", _FIRST)
    items: Iterable[Any]
    if isinstance(calibration, Mapping):
        items = [calibration]
    elif isinstance(calibration, Tensor):
        if calibration.dim() < 2:
            raise CalibrationError(
                f"calibration is {_describe(calibration)}; {_EXPECTED}. "
                "For one sequence use calibration.unsqueeze(0)"
            )
        per_batch = max(1, tokens // max(calibration.shape[1], 1)) if calibration.dim() == 2 else 32
        items = calibration.split(per_batch) if calibration.numel() else []
    else:
        try:
            items = iter(calibration)
        except TypeError:
            raise CalibrationError(f"calibration is {_describe(calibration)}; {_EXPECTED}") from None
    batches = [_as_batch(name, item, f"calibration batch {i}") for i, item in enumerate(items)]
    if not batches:
        raise CalibrationError("calibration is empty; pass at least one batch of inputs")
    _check_tokens(model, batches)
    return batches


def _as_batch(name: str, item: Any, where: str) -> dict[str, Tensor]:
    if isinstance(item, Tensor):
        one_sequence = name == "input_ids" and item.dim() == 1
        item = {name: item.unsqueeze(0) if one_sequence else item}
    if not isinstance(item, Mapping) or not item:
        what = "an empty dict" if isinstance(item, Mapping) else _describe(item)
        raise CalibrationError(f"{where} is {what}; {_EXPECTED}")
    for key, value in item.items():
        if isinstance(value, Tensor) and value.numel() == 0:
            raise CalibrationError(f"{where}: {key} is empty")
    ids = item.get("input_ids")
    if ids is not None and (
        not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool
    ):
        raise CalibrationError(f"{where}: input_ids is {_describe(ids)}; {_EXPECTED}")
    mask = token_mask(item)
    if ids is not None and mask is not None and mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: attention_mask has shape {tuple(mask.shape)}, but input_ids {tuple(ids.shape)}"
        )
    return dict(item)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"of type {type(value).__name__}"


def token_mask(batch: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens of a batch count, (batch, length) bool; None where all do."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _check_tokens(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    ids = [batch["input_ids"] for batch in batches if batch.get("input_ids") is not None]
    counts = []
    for batch in batches:
        mask = token_mask(batch)
        if mask is not None:
            counts.append(int(mask.sum()))
        elif batch.get("input_ids") is not None:
            counts.append(batch["input_ids"].numel())
    if counts and sum(counts) < MIN_TOKENS:
        raise CalibrationError(
            f"calibration has {sum(counts)} tokens, at least {MIN_TOKENS} are needed (those that "
            "attention_mask excludes do not count); the paper uses 128 x 2048"
        )
    if not ids:
        return
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    largest, smallest = max(int(i.max()) for i in ids), min(int(i.min()) for i in ids)
    if smallest < 0 or (vocabulary and largest >= vocabulary):
        raise CalibrationError(
            f"calibration tokens are from {smallest} to {largest}, but the vocabulary has "
            f"{vocabulary} entries; tokenise with the model's own tokenizer"
        )


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
        """Stand before the block whose inputs are held."""
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
        self._model(*[v for k, v in batch.items() if k == _FIRST], **{k: v for k, v in batch.items() if k})

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


def second_moments(runner: BlockRunner, index: int, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Σ over tokens of x_j² at the input of each linear layer of a block (arXiv 2409.13652, section 2.2).

    Tokens that an attention mask (batch, length) excludes do not count, in experts that they are routed to
    neither.

    Args:
        runner: stands before block `index`.
        index: the block.
        linears: its layers by name.

    Returns:
        Name → (d_in,) float32. A layer that did not run is absent.

    Raises:
        CalibrationError: there is padding, and it cannot be told from the tokens at the input of a layer.
    """
    sums = _sum_over_inputs(runner, index, linears, lambda x: x.square().sum(0).double())
    return {name: moment.float() for name, moment in sums.items()}


def hessians(runner: BlockRunner, index: int, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """``X Xᵀ`` over the tokens at the input X (d_in, tokens) of each linear layer of a block.

    Args and tokens as in :func:`second_moments`, whose result is the diagonal.

    Returns:
        Name → (d_in, d_in) float32; layers that always shared their input share the tensor. A layer that did
        not run is absent.
    """
    return _sum_over_inputs(runner, index, linears, lambda x: x.mT @ x)


def means_and_variances(
    runner: BlockRunner, index: int, linears: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Mean and variance over the tokens of each input of each linear layer of a block.

    Args and tokens as in :func:`second_moments`.

    Returns:
        Name → (2, d_in) float64. A layer that did not run is absent.
    """

    def sums(x: Tensor) -> Tensor:
        x = x.double()
        return torch.stack([x.sum(0), x.square().sum(0), x.new_full(x.shape[1:], len(x))])

    moments = {}
    for name, (first, second, count) in _sum_over_inputs(runner, index, linears, sums).items():
        mean = first / count
        moments[name] = torch.stack([mean, (second / count - mean.square()).clamp_min(0)])
    return moments


def _sum_over_inputs(
    runner: BlockRunner, index: int, linears: Mapping[str, nn.Module], statistic: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sum of a statistic of the float32 inputs (tokens, d_in) of each layer, over all ranks' batches."""
    # Of one batch: an input, its statistic, and the layers that it went to.
    seen: list[tuple[Tensor, int, Tensor, list[str]]] = []
    # Summed by the layers that shared it, so that q, k and v cost one statistic.
    sums: dict[tuple[str, ...], Tensor] = {}
    routers = {
        module: experts
        for experts in runner.block(index).modules()
        if isinstance(experts, SplitExperts)
        for module in experts.modules()
    }

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            given = args[0]
            for x, version, _statistic, names in seen:
                if x is given and version == given._version:
                    names.append(name)
                    return
            rows = _counted(given.detach(), token_mask(runner.batch), routers.get(linear), name)
            if not len(rows):
                return  # an expert that only padding was routed to
            value = statistic(rows.float())
            seen.append((given, given._version, value, [name]))

        return hook

    handles = [linear.register_forward_pre_hook(collect(name)) for name, linear in linears.items()]
    try:
        for _ in runner.run(index):
            for *_given, value, names in seen:
                key = tuple(names)
                sums[key] = sums[key].add_(value) if key in sums else value
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    totals: dict[str, Tensor] = {}
    for key, value in runner.ranks.sum(sums).items():
        for name in key:
            totals[name] = totals[name] + value if name in totals else value
    return totals


def _counted(x: Tensor, mask: Tensor | None, experts: SplitExperts | None, name: str) -> Tensor:
    """The inputs of a layer, (tokens, d_in), without those of padding."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is None or mask.all():
        return rows
    if experts is not None and experts.routed is not None:
        counts = mask.reshape(-1)[experts.routed]
        fits = len(counts) == len(rows)
    else:
        counts = mask.reshape(-1)
        # Some models flatten batch and length before a product.
        fits = x.shape[:-1] in (mask.shape, (mask.numel(),))
    if not fits:
        raise CalibrationError(
            f"{name}: which of its inputs, {tuple(x.shape)}, are padding cannot be told from an attention "
            f"mask of shape {tuple(mask.shape)}; calibrate on sequences of one length, without padding"
        )
    return rows[counts]
