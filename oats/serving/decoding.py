"""Tokens into text, one by one: whole characters only, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the decoded text of an incomplete character


class IncrementalDecoder:
    """Turns tokens into text as they arrive. The pieces together are the whole text, up to a stop string.

    Args:
        tokenizer: of transformers.
        stop: texts that end the output; they are not part of it.

    Attributes:
        stopped: True once a stop string was found; no text follows.

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
        # The text of a token depends on the tokens just before it (spaces), not on all of them. So only the
        # tokens shown last are decoded again, together with the new ones.
        self._start = self._shown = 0
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; returns the text that can be shown now, which may be empty."""
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
        """The rest at the end: text that was held back, and the bytes of an unfinished character."""
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
    """Length of the longest suffix of `text` that is a prefix of `stop`.

    >>> _overlap("one tw", "two"), _overlap("one", "two")
    (2, 0)
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
