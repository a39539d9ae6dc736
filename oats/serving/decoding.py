"""Token by token into text: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders make of the first bytes of a character


class IncrementalDecoder:
    """Turns tokens into text as they come; the pieces together are the whole text, up to a stop string.

    Args:
        tokenizer: of transformers.
        stop: texts at which the output ends; they are not part of it.

    Attributes:
        stopped: whether a stop string was found; nothing comes after it.

    >>> class Letters:
    ...     def decode(self, ids, **options):
    ...         return "".join(map(chr, ids))
    >>> decoder = IncrementalDecoder(Letters(), stop=["lo"])
    >>> [decoder.push(ord(letter)) for letter in "hello!"], decoder.stopped
    (['h', 'e', '', 'l', '', ''], True)
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        # The text of a token depends on the one before it (spaces), not on all: the window that is decoded
        # again starts at the last tokens that were shown.
        self._start = self._shown = 0
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; returns what can be shown now, "" for nothing yet."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or text.endswith(_UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._until_stop(text[len(before) :])

    def flush(self) -> str:
        """What is left at the end: text that was held back, and a character that was never finished."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._shown])
        text = self._held + self._decode(self._ids[self._start :])[len(before) :]
        self._start, self._shown, self._held = self._shown, len(self._ids), ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with.

    >>> _overlap("one tw", "two"), _overlap("one", "two")
    (2, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
