"""`Engine`: a decoder model that continues many texts at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oats import _core
from oats.engine.cache import PagedCache, PagePool, Tokens
from oats.engine.native import NativeDecoder
from oats.errors import ConfigError, UnsupportedModelError
from oats.models.architecture import context_limit
from oats.models.decoders import describe_decoder

CHUNK = 512
"""Tokens of a prompt that one step computes at most."""

CHECKED_TOKENS = 48
"""Of the text on which the engine and transformers are compared."""

Choose = Callable[[Tensor], int]
"""Logits (vocabulary,) of the last token → the next token."""


@dataclass
class Statistics:
    """What an engine has done."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    seconds: float = 0.0


def most_likely(logits: Tensor) -> int:
    """The token with the largest logit; of equal ones the first."""
    return int(logits.argmax())


@dataclass(eq=False)
class _Text:
    prompt: list[int]
    tokens: Tokens
    choose: Choose
    output: list[int] = field(default_factory=list)

    @property
    def pending(self) -> list[int]:
        """Tokens that are not in the cache yet."""
        done, length = self.tokens.length, len(self.prompt)
        return self.prompt[done:] + self.output if done < length else self.output[done - length :]


class Engine:
    """Runs a decoder-only model of transformers in one call of the core a step.

    It reads the model's weights where they are, compressed or dense. When it is made, it runs a short text
    and compares the logits with those of the model's own ``forward``. If it does not know the architecture,
    or the logits differ, `reason` says why, and the other methods raise.

    Args:
        model: a causal language model on the CPU, in evaluation mode, float32 or bfloat16.

    Attributes:
        reason: why the model does not run natively; None where it does.
        difference: of the logits from transformers', relative, in the Frobenius norm; None if they were not
            compared.
        statistics: of all calls.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reason: str | None = None
        self.difference: float | None = None
        self.statistics = Statistics()
        self.context = context_limit(model)
        self._lock = threading.Lock()
        try:
            decoder = describe_decoder(model)
            self._native = NativeDecoder(decoder)
        except UnsupportedModelError as error:
            self.reason = str(error)
            return
        self._rows = int(decoder.embedding.num_embeddings)  # type: ignore[arg-type]
        if decoder.unlimited:
            self.context = None
        self._computed_again_at = decoder.computed_again_at
        keys = zip(self._native.layers_of, self._native.caches, strict=True)
        dtype = self._native.dtype
        self._cache = PagedCache(
            [PagePool(n, kv_heads, dim, window, dtype) for n, (window, kv_heads, dim) in keys]
        )
        self._compare(len(decoder.layers))

    @torch.no_grad()
    def _compare(self, layers: int) -> None:
        # Rounding errors of the layers add up like a random walk; 8 is four times what was seen.
        allowed = 8 * torch.finfo(self._native.dtype).eps * (2 * layers) ** 0.5
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self._native.vocabulary, (1, CHECKED_TOKENS), generator=generator)
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        tokens = self._cache.new(CHECKED_TOKENS)
        half = CHECKED_TOKENS // 2
        got = [
            self._run([(tokens, part.tolist())], all_logits=True) for part in (ids[0, :half], ids[0, half:])
        ]
        self._cache.release(tokens)
        self.difference = float((torch.cat(got).float() - expected).norm() / expected.norm())
        if not self.difference <= allowed:
            apart = f"{self.difference:.2g}, more than {allowed:.2g}"
            self.reason = f"the engine's logits differ from transformers' by {apart}"

    def new(self) -> Tokens:
        """A sequence without tokens; :meth:`release` it in the end."""
        self._check_native()
        return self._cache.new()

    def fork(self, tokens: Tokens) -> Tokens:
        """A sequence that goes on from the same tokens and shares their memory."""
        return self._cache.fork(tokens)

    def release(self, tokens: Tokens) -> None:
        """Give the memory of a sequence back."""
        self._cache.release(tokens)

    def prefill(self, tokens: Tokens, ids: Sequence[int]) -> Tensor:
        """Append tokens to a sequence.

        Returns:
            (vocabulary,): logits of what comes after the last one.

        Raises:
            ConfigError: there is no token, or more than the model's context takes.
        """
        if not ids:
            raise ConfigError("there is no token to append")
        tokens.until = tokens.length + len(ids)
        logits = torch.empty(0)
        for first in range(0, len(ids), CHUNK):
            logits = self.step([(tokens, ids[first : first + CHUNK])])
        return logits[0]

    def step(self, work: Sequence[tuple[Tokens, Sequence[int]]]) -> Tensor:
        """Append tokens to several sequences at once.

        Args:
            work: sequences, each with its next tokens, at least one.

        Returns:
            (len(work), vocabulary): logits of what comes after the last token of each.

        Raises:
            ConfigError: a sequence has no new token, is there twice, or would become longer than the model's
                context; or a token is not in the vocabulary.
        """
        self._check_native()
        if not all(ids for _, ids in work) or len({id(tokens) for tokens, _ in work}) < len(work):
            raise ConfigError("a step takes each sequence once, with at least one token")
        for tokens, ids in work:
            self._check_ids(ids)
            self._check_length(tokens.length + len(ids))
        return self._run(work)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if min(ids) < 0 or max(ids) >= self._rows:
            raise ConfigError(
                f"tokens are {min(ids)} to {max(ids)}, but the model has {self._rows} embeddings; "
                "tokenise with the model's own tokenizer"
            )

    def _check_length(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise ConfigError(
                f"a text of {length} tokens is longer than the model's context of {self.context}"
            )

    def _run(self, work: Sequence[tuple[Tokens, Sequence[int]]], all_logits: bool = False) -> Tensor:
        started = time.perf_counter()
        with self._lock:
            ids: list[int] = []
            sequences, rows = [], []
            for tokens, new in work:
                self._cache.prepare(tokens, len(new))
                ropes = self._native.ropes_at(max(tokens.until, tokens.length + len(new)))
                sequences.append(
                    _core.DecoderSequence(len(ids), len(new), tokens.length, tokens.tables, ropes)
                )
                ids += new
                rows.append(len(ids) - 1)
            logits = self._native.step(
                ids, sequences, self._cache.pages, range(len(ids)) if all_logits else rows
            )
            for tokens, new in work:
                tokens.length += len(new)
        self.statistics.steps += 1
        self.statistics.seconds += time.perf_counter() - started
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        ends: Collection[int] = (),
        choose: Sequence[Choose] | Choose = most_likely,
        max_batch: int = 16,
    ) -> list[list[int]]:
        """Continue several texts. A step computes the next token of those that run, and a piece of a prompt.

        Args:
            prompts: token ids of each, at least one.
            max_new_tokens: of each.
            ends: tokens that end a text; the last one of an output may be one.
            choose: what picks tokens, one for all or one each.
            max_batch: texts that run at once.

        Returns:
            The new tokens of each.

        Raises:
            ConfigError: a prompt is empty, has a token that is not in the vocabulary, or does not fit into
                the model's context with the new tokens; or a number is below 1.
        """
        self._check_native()
        if max_new_tokens < 1 or max_batch < 1:
            raise ConfigError(
                f"max_new_tokens and max_batch must be at least 1, got {max_new_tokens}, {max_batch}"
            )
        for prompt in prompts:
            if not prompt:
                raise ConfigError("a prompt is empty; give some text to continue")
            self._check_ids(prompt)
            self._check_length(len(prompt) + max_new_tokens)
        chooses = [choose] * len(prompts) if callable(choose) else list(choose)
        texts = [_Text(list(p), self._cache.new(len(p)), c) for p, c in zip(prompts, chooses, strict=True)]
        waiting = deque(texts)
        running: list[_Text] = []
        try:
            while waiting or running:
                while waiting and len(running) < max_batch:
                    running.append(waiting.popleft())
                work, done = self._work_of(running)
                logits = self._run(work)
                for text, row in zip(done, logits, strict=True):
                    if text is None:
                        continue
                    text.output.append(text.choose(row))
                    if text.output[-1] in ends or len(text.output) == max_new_tokens:
                        running.remove(text)
                        self._cache.release(text.tokens)
                    elif text.tokens.length == self._computed_again_at:
                        self._cache.release(text.tokens)
                        text.tokens.until = len(text.pending)
        finally:
            for text in (*running, *waiting):
                self._cache.release(text.tokens)
        self.statistics.prompt_tokens += sum(map(len, prompts))
        self.statistics.new_tokens += sum(len(text.output) for text in texts)
        return [text.output for text in texts]

    @staticmethod
    def _work_of(running: Sequence[_Text]) -> tuple[list[tuple[Tokens, list[int]]], list[_Text | None]]:
        """What the next step computes, and which text gets a token from each part of it."""
        room = CHUNK
        work: list[tuple[Tokens, list[int]]] = []
        done: list[_Text | None] = []
        for text in sorted(running, key=lambda text: len(text.pending)):
            pending = text.pending
            taken = pending[:room] if room or len(pending) == 1 else []
            if not taken:
                continue
            room = max(0, room - len(taken))
            work.append((text.tokens, taken))
            done.append(text if len(taken) == len(pending) else None)
        return work, done

    def _check_native(self) -> None:
        if self.reason is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run in the engine: {self.reason}"
            )
