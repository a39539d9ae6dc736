"""What an engine has done, and how fast."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """Sums over all calls of an engine.

    A part of a step that has one token of a sequence counts as decoding, a longer one as prefill. The time
    of a step with both is divided by their numbers of tokens.

    Attributes:
        steps: calls of the core.
        prompt_tokens: tokens that were computed as prefill.
        shared_tokens: tokens of prompts that an earlier text had computed.
        decoded_tokens: tokens that were computed as decoding.
        new_tokens: tokens that were chosen; a text's first one comes out of prefill.
        prefill_seconds: time of prefill.
        decode_seconds: time of decoding, without that of choosing tokens.
        cache_bytes: of the pages in use after the last step.
        most_cache_bytes: the same, at most so far.
    """

    steps: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    decoded_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    most_cache_bytes: int = 0

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompts a second; 0 before the first."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens a second, of all texts together; 0 before the first."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def add_step(self, parts: list[int], seconds: float, cache_bytes: int) -> None:
        """Count a step.

        Args:
            parts: tokens of each sequence in it.
            seconds: that it took.
            cache_bytes: in use after it.

        >>> statistics = Statistics()
        >>> statistics.add_step([1, 1, 6], 0.8, 100)
        >>> round(statistics.prefill_rate), round(statistics.decode_rate)
        (10, 10)
        """
        decoded, total = parts.count(1), sum(parts)
        self.steps += 1
        self.decoded_tokens += decoded
        self.prompt_tokens += total - decoded
        self.decode_seconds += seconds * decoded / total
        self.prefill_seconds += seconds * (total - decoded) / total
        self.cache_bytes = cache_bytes
        self.most_cache_bytes = max(self.most_cache_bytes, cache_bytes)
