"""Texts as token ids, and calibration sequences cut from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oats.compression.calibration_text import Text
from oats.errors import CalibrationError


def bos_token_id(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of a text, or None."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def framing_tokens(tokenizer: Any) -> tuple[int | None, int | None]:
    """The tokens that the tokenizer puts before a text, BOS or CLS, and behind it, SEP; None for neither."""
    ids = tokenizer("a").input_ids or [None]
    first, last = ids[0], ids[-1]
    before = first if first in (tokenizer.bos_token_id, tokenizer.cls_token_id) else None
    return before, last if last == tokenizer.sep_token_id else None


def tokenize(tokenizer: Any, text: Text, vocabulary: int | None = None) -> Tensor:
    """Token ids of a text, without special tokens.

    Args:
        tokenizer: of the model, as ``AutoTokenizer`` loads it.
        text: its content is tokenized.
        vocabulary: number of rows of the model's embedding; None does not check ids against it.

    Returns:
        int64 (n,).

    Raises:
        CalibrationError: no token comes out, or the tokenizer is not the model's.
    """
    # verbose=False: no warning that the text is longer than the model's context. It is cut into windows.
    tokens = tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
    ids = torch.tensor(tokens, dtype=torch.int64)
    if ids.numel() == 0:
        raise CalibrationError(f"{text.name} ({text.split}) gives no token; give a text that is not empty")
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives token {int(ids.max())} but the model has {vocabulary} embeddings; "
            "use the tokenizer that belongs to the model"
        )
    return ids


def calibration_sequences(
    tokenizer: Any, text: Text, vocabulary: int | None, samples: int, length: int
) -> Tensor:
    """Cut sequences from a text, each between the tokens that the tokenizer puts around a text.

    Args, results and errors as of :func:`tokenize` and :func:`calibration_windows`.
    """
    before, after = framing_tokens(tokenizer)
    ids = tokenize(tokenizer, text, vocabulary)
    return calibration_windows(ids, samples, length, bos=before, sep=after, name=text.name)


def calibration_windows(
    ids: Tensor,
    samples: int,
    length: int,
    *,
    bos: int | None = None,
    sep: int | None = None,
    name: str = "the calibration text",
) -> Tensor:
    """Cut `samples` sequences of `length` tokens, evenly spaced and without overlap.

    Args:
        ids: (n,), as :func:`tokenize` gives it.
        samples, length: number of sequences, and their tokens with `bos` and `sep`.
        bos, sep: go in front of each sequence and behind it.
        name: of the text, for error messages.

    Returns:
        int64 (samples, length).

    Raises:
        CalibrationError: the text is too short.

    >>> import torch
    >>> calibration_windows(torch.arange(10), samples=2, length=4, bos=99)
    tensor([[99,  0,  1,  2],
            [99,  7,  8,  9]])
    """
    frame = [[] if token is None else [token] for token in (bos, sep)]
    taken = length - sum(map(len, frame))
    if samples < 1 or length < 2 or taken < 1:
        raise CalibrationError(
            f"calibration needs at least 1 sample of {max(2, length - taken + 1)} tokens, got {samples} of "
            f"{length}; raise the samples or their length"
        )
    if ids.numel() < samples * taken:
        raise CalibrationError(
            f"{name} has {ids.numel()} tokens, but {samples} samples of {length} need {samples * taken}; "
            f"give a longer text, at most {ids.numel() // taken} samples, or shorter ones"
        )
    starts = torch.linspace(0, ids.numel() - taken, samples, dtype=torch.float64).floor().long()
    windows = ids[starts[:, None] + torch.arange(taken)]
    before, after = (torch.tensor(tokens, dtype=ids.dtype).expand(samples, -1) for tokens in frame)
    return torch.cat([before, windows, after], dim=1)
