"""The text that models are calibrated and evaluated on, as token ids."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from oats.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Text:
    """A text, and what a reader of a result must know about where it is from.

    Attributes:
        content: the text itself.
        name: what it is, e.g. a path.
        split: the part of it that `content` is.
    """

    content: str
    name: str
    split: str

    @property
    def sha256(self) -> str:
        """Start of the SHA-256 of the content: equal for equal text."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:12]

    def settings(self) -> dict[str, Any]:
        """What identifies the text, as plain JSON values."""
        return {
            "text": self.name,
            "split": self.split,
            "characters": len(self.content),
            "sha256": self.sha256,
        }

    def identity(self) -> dict[str, Any]:
        """The same as it is kept beside a model: without the path on this machine."""
        return {"text": Path(self.name).name, "split": self.split, "sha256": self.sha256}


def builtin_text(half: Literal["first", "second"]) -> Text:
    """Half of ``pydoc_data.topics``: English prose about Python, in every CPython.

    The first half is for calibration and the second for evaluation. The text differs between versions of
    Python, so the name holds the version.

    >>> builtin_text("second").split
    'second half'
    """
    from pydoc_data.topics import topics

    content = "\n\n".join(topics.values())
    middle = len(content) // 2
    return Text(
        content=content[:middle] if half == "first" else content[middle:],
        name=f"pydoc_data.topics (Python {platform.python_version()})",
        split=f"{half} half",
    )


def read_text(path: str | Path) -> Text:
    """Read a UTF-8 text file.

    Raises:
        CalibrationError: the file cannot be read, is not UTF-8, or holds nothing but white space.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    except OSError as error:
        raise CalibrationError(f"cannot read the text file {path}: {error.strerror}") from error
    if not content.strip():
        raise CalibrationError(f"the text file {path} is empty; give one with text in it")
    return Text(content, str(path), "whole file")


def bos_token_id(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts in front of a text, or None where it puts none."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None


def framing_tokens(tokenizer: Any) -> tuple[int | None, int | None]:
    """What the tokenizer puts around a text: BOS or CLS before it, SEP behind it; None where it puts none."""
    ids = tokenizer("a").input_ids or [None]
    first, last = ids[0], ids[-1]
    before = (
        first if first is not None and first in (tokenizer.bos_token_id, tokenizer.cls_token_id) else None
    )
    after = last if last is not None and last == tokenizer.sep_token_id else None
    return before, after


def tokenize(tokenizer: Any, text: Text, vocabulary: int | None = None) -> Tensor:
    """Token ids of a text, without special tokens.

    Args:
        tokenizer: of the model, as ``AutoTokenizer`` loads it.
        text: what to tokenize.
        vocabulary: number of rows of the model's embedding; ids past it are an error.

    Returns:
        int64 (n,).

    Raises:
        CalibrationError: no token comes out, or the tokenizer is not the model's.
    """
    import torch

    # verbose=False: a text longer than the model's context is what the windows are for.
    ids = torch.tensor(
        tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64
    )
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
    """Sequences of a text as a model sees them when it is used, framed as its tokenizer frames a text.

    Args:
        tokenizer: of the model.
        text: to calibrate on.
        vocabulary: embeddings of the model, as for :func:`tokenize`.
        samples: number of sequences.
        length: tokens a sequence, those of the frame included.

    Returns:
        int64 (samples, length).

    Raises:
        CalibrationError: the text is too short.
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
        samples: number of sequences.
        length: tokens a sequence, `bos` and `sep` included.
        bos: put in front of every sequence, as the model sees it when it is used.
        sep: put behind every sequence.
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
    import torch

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
