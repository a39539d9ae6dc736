"""Calibration data as batches: dicts of keyword arguments for a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oats.errors import CalibrationError

Calibration = Tensor | Mapping[str, Tensor] | Iterable[Tensor | Mapping[str, Tensor]]
"""Token ids (n, length), or batches: tensors, or keyword arguments for the model; or one such dict."""

MIN_TOKENS = 16
"""Fewer tokens than this are refused: they say nothing about the inputs of a layer."""

# About so many tokens run together: enough for products at full speed, and little memory beside a model.
TOKENS_PER_BATCH = 4096

# The key of a tensor whose keyword is unknown: it is the model's first positional argument.
POSITIONAL = ""

_EXPECTED = (
    "expected token ids as a LongTensor (sequences, length), or batches: such tensors, or dicts of keyword "
    "arguments for the model, as tokenizer(text, return_tensors='pt') makes them"
)


def as_batches(
    model: nn.Module, calibration: Calibration, tokens: int = TOKENS_PER_BATCH
) -> list[dict[str, Tensor]]:
    """Make batches of calibration data for a model.

    Args:
        model: says what its main input is called, and how large its vocabulary is.
        calibration: a tensor, which is cut, or batches, which are kept.
        tokens: about how many a batch of a tensor (sequences, length) holds.

    Raises:
        CalibrationError: the data is empty, too short, or does not fit the model.
    """
    name = getattr(model, "main_input_name", POSITIONAL)
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
    """Which tokens of a batch count, (batch, length) bool; None if all do."""
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _check_tokens(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    ids = [batch["input_ids"] for batch in batches if batch.get("input_ids") is not None]
    counts = []
    for batch in batches:
        mask, tokens = token_mask(batch), batch.get("input_ids")
        if mask is not None:
            counts.append(int(mask.sum()))
        elif tokens is not None:
            counts.append(tokens.numel())
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
