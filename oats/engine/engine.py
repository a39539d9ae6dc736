"""`Engine`: a decoder model that continues many texts at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from oats import _core
from oats.engine.batch import CHUNK, Batch, Text
from oats.engine.cache import PagedCache, PagePool, Tokens
from oats.engine.most_likely import most_likely
from oats.engine.native import NativeDecoder
from oats.engine.prefixes import Prefixes
from oats.engine.statistics import Statistics
from oats.errors import ConfigError, UnsupportedModelError
from oats.models.architecture import context_limit
from oats.models.decoders import describe_decoder

CHECKED_TOKENS = 48
"""Of the text on which the engine and transformers are compared."""

Choose = Callable[[Tensor], int]
"""Logits (vocabulary,) of the last token → the next token."""


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

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> engine = Engine(AutoModelForCausalLM.from_config(config).eval())
    >>> engine.reason is None
    True
    >>> texts = engine.generate([[3, 4, 5], [6]], max_new_tokens=4)
    >>> [len(text) for text in texts], engine.statistics.new_tokens
    ([4, 4], 8)
    """

    def __init__(self, model: Any) -> None:
        self._name = type(model).__name__
        self.reason: str | None = None
        self.difference: float | None = None
        self.statistics = Statistics()
        self.context = context_limit(model)
        self._lock = threading.RLock()
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
        self._prefixes = Prefixes(self._cache, longest=decoder.border)
        self._compare(model, len(decoder.layers))
        self.statistics = Statistics()

    @torch.no_grad()
    def _compare(self, model: Any, layers: int) -> None:
        # Rounding errors of the layers add up like a random walk; 8 is four times what was seen.
        allowed = 8 * torch.finfo(self._native.dtype).eps * (2 * layers) ** 0.5
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self._native.vocabulary, (1, CHECKED_TOKENS), generator=generator)
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        tokens = self._cache.new(CHECKED_TOKENS)
        half = CHECKED_TOKENS // 2
        got = [self._run([(tokens, part.tolist())], range(half)) for part in (ids[0, :half], ids[0, half:])]
        self._cache.release(tokens)
        self.difference = float((torch.cat(got).float() - expected).norm() / expected.norm())
        if not self.difference <= allowed:
            apart = f"{self.difference:.2g}, more than {allowed:.2g}"
            self.reason = f"the engine's logits differ from transformers' by {apart}"

    def new(self) -> Tokens:
        """A sequence without tokens; :meth:`release` it in the end."""
        self.check_native()
        return self._cache.new()

    def fork(self, tokens: Tokens) -> Tokens:
        """A sequence that goes on from the same tokens and shares their memory."""
        with self._lock:
            return self._cache.fork(tokens)

    def release(self, tokens: Tokens) -> None:
        """Give the memory of a sequence back."""
        with self._lock:
            self._cache.release(tokens)

    def forget(self) -> None:
        """Give the memory of finished texts back; it is kept for texts that begin alike."""
        self.check_native()
        with self._lock:
            self._prefixes.clear()

    def prefill(self, tokens: Tokens, ids: Sequence[int]) -> Tensor:
        """Append tokens to a sequence.

        Returns:
            (vocabulary,): logits of what comes after the last one.

        Raises:
            ConfigError: there is no token, or more than the model's context takes.
        """
        if not ids:
            raise ConfigError("there is no token to append")
        return self._pieces(tokens, ids, 1)[0]

    def logits(self, ids: Sequence[int], keep: int | None = None) -> Tensor:
        """Logits of a text, as the model's ``forward`` gives them.

        Args:
            ids: its tokens, at least one.
            keep: how many of the last rows are wanted; None for all.

        Returns:
            (keep, vocabulary), the model's dtype.

        Raises:
            ConfigError: there is no token, or more than the model's context takes; or `keep` is not in
                [1, tokens].
        """
        keep = len(ids) if keep is None else keep
        if not 1 <= keep <= len(ids):
            raise ConfigError(f"logits of {keep} tokens were asked for, of a text of {len(ids)}")
        tokens = self.new()
        try:
            return self._pieces(tokens, ids, keep)
        finally:
            self.release(tokens)

    def _pieces(self, tokens: Tokens, ids: Sequence[int], keep: int) -> Tensor:
        """Append tokens in pieces that a step takes; logits of the last `keep`."""
        self._check_work([(tokens, ids)])
        tokens.until = tokens.length + len(ids)
        logits = torch.empty(keep, self._native.vocabulary, dtype=self._native.dtype)
        skipped = len(ids) - keep
        for first in range(0, len(ids), CHUNK):
            piece = ids[first : first + CHUNK]
            wanted = range(max(0, skipped - first), len(piece))
            rows = self._run([(tokens, piece)], wanted)
            if wanted:
                start = first + wanted.start - skipped
                logits[start : start + len(rows)] = rows
        return logits

    def append(self, work: Sequence[tuple[Tokens, Sequence[int]]], keep: Sequence[int]) -> Tensor:
        """Append any number of tokens to several sequences, in as many steps as it takes.

        Args:
            work: sequences, each once, with its next tokens; none is allowed.
            keep: of how many of its last new tokens logits are wanted.

        Returns:
            (sum of `keep`, vocabulary): logits, one sequence after another, in the model's dtype.

        Raises:
            ConfigError: a token is not in the vocabulary, or a sequence would become longer than the model's
                context.
        """
        parts = [(tokens, ids, count) for (tokens, ids), count in zip(work, keep, strict=True) if ids]
        if not parts:
            return torch.empty(0, self._native.vocabulary, dtype=self._native.dtype)
        some = [(tokens, ids) for tokens, ids, _ in parts]
        self._check_work(some)
        if sum(len(ids) for _, ids in some) > CHUNK:
            return torch.cat([self._pieces(*part) for part in parts])
        ends = accumulate(len(ids) for _, ids in some)
        rows = [row for end, (*_, count) in zip(ends, parts, strict=True) for row in range(end - count, end)]
        return self._run(some, rows)

    def truncate(self, tokens: Tokens, length: int) -> None:
        """Forget the tokens from `length` on.

        If a window gave up what the next token would see, all tokens are forgotten: `tokens.length` says how
        many are left.
        """
        with self._lock:
            kept = length if self._cache.can_truncate(tokens, length) else 0
            self._cache.truncate(tokens, kept)

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
        self._check_work(work)
        return self._last_logits(work, [True] * len(work))

    def _check_work(self, work: Sequence[tuple[Tokens, Sequence[int]]]) -> None:
        self.check_native()
        if not work or not all(ids for _, ids in work) or len({id(tokens) for tokens, _ in work}) < len(work):
            raise ConfigError("a step takes each sequence once, with at least one token")
        for tokens, ids in work:
            self._check_ids(ids)
            self._check_length(tokens.length + len(ids))

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

    def _last_logits(self, work: Sequence[tuple[Tokens, Sequence[int]]], wanted: Sequence[bool]) -> Tensor:
        """Logits behind the last token of those sequences where they are wanted."""
        ends = accumulate(len(ids) for _, ids in work)
        return self._run(work, [end - 1 for end, want in zip(ends, wanted, strict=True) if want])

    def _run(self, work: Sequence[tuple[Tokens, Sequence[int]]], logits_rows: Sequence[int]) -> Tensor:
        """Append tokens; logits of some rows, where all new tokens are rows, one sequence after another."""
        started = time.perf_counter()
        with self._lock:
            ids: list[int] = []
            sequences = []
            for tokens, new in work:
                self._cache.prepare(tokens, len(new))
                ropes = self._native.ropes_at(max(tokens.until, tokens.length + len(new)))
                sequences.append(
                    _core.DecoderSequence(len(ids), len(new), tokens.length, tokens.tables, ropes)
                )
                ids += new
            logits = self._native.step(ids, sequences, self._cache.pages, logits_rows)
            for tokens, new in work:
                tokens.length += len(new)
            seconds = time.perf_counter() - started
            self.statistics.add_step([len(new) for _, new in work], seconds, self._cache.nbytes)
        return logits

    def batch(self) -> Batch:
        """Texts that are continued together, without any yet."""
        self.check_native()
        return Batch(self._last_logits, self._prefixes, self.statistics, self._lock, self._computed_again_at)

    def check_text(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Check that a text can be continued.

        Raises:
            ConfigError: the prompt is empty, has a token that is not in the vocabulary, or does not fit into
                the model's context with the new tokens.
        """
        if not prompt:
            raise ConfigError("a prompt is empty; give some text to continue")
        self._check_ids(prompt)
        self._check_length(len(prompt) + max_new_tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        *,
        ends: Collection[int] = (),
        choose: Sequence[Choose] | Choose = most_likely,
        max_batch: int = 16,
        on_token: Callable[[int, int], object] = lambda index, token: None,
    ) -> list[list[int]]:
        """Continue several texts. A step computes the next token of those that run, and pieces of prompts.

        Args:
            prompts: token ids of each, at least one.
            max_new_tokens: of each.
            ends: tokens that end a text; the last one of an output may be one.
            choose: what picks tokens, one for all or one each.
            max_batch: texts that run at once.
            on_token: called with the index of a prompt and its new token, as soon as it is known.

        Returns:
            The new tokens of each.

        Raises:
            ConfigError: a prompt is empty, has a token that is not in the vocabulary, or does not fit into
                the model's context with the new tokens; or a number is below 1.
        """
        if max_new_tokens < 1 or max_batch < 1:
            raise ConfigError(
                f"max_new_tokens and max_batch must be at least 1, got {max_new_tokens}, {max_batch}"
            )
        batch = self.batch()
        for prompt in prompts:
            self.check_text(prompt, max_new_tokens)
        chooses = [choose] * len(prompts) if callable(choose) else list(choose)
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = deque(zip(range(len(prompts)), prompts, chooses, strict=True))
        running: dict[Text, tuple[int, Choose]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < max_batch:
                    index, prompt, pick = waiting.popleft()
                    running[batch.add(prompt)] = index, pick
                for text, logits in batch.step():
                    index, pick = running[text]
                    text.output.append(token := pick(logits))
                    on_token(index, token)
                    if token in ends or len(text.output) == max_new_tokens:
                        del running[text]
                        batch.remove(text)
                        outputs[index] = text.output
        finally:
            for text in running:
                batch.discard(text)
        return outputs

    def check_native(self) -> None:
        """Raise UnsupportedModelError, with `reason`, if there is one."""
        if self.reason is not None:
            raise UnsupportedModelError(f"{self._name} does not run in the engine: {self.reason}")
