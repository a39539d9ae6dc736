"""Perplexity of a causal language model, with a sliding window that scores each token once.

Perplexity is e to the mean negative log-likelihood per token; lower is better. A value of 10 means that the
model is as unsure as if it chose among 10 equally likely tokens.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from oats.engine.engine import Engine
from oats.errors import CalibrationError, ConfigError, OatsError
from oats.models.architecture import context_limit

DEFAULT_CONTEXT = 2048
"""The context length that papers on pruning use. A model with a shorter one uses its own."""

# Rows of logits converted to fp32 at a time: with a vocabulary of 262144, a whole window would take 2 GB.
_ROWS = 64


@dataclass(frozen=True)
class Perplexity:
    """A perplexity, and every setting that it depends on.

    Attributes:
        perplexity: e to the power of `nll`.
        nll: mean negative log-likelihood of the scored tokens, in nats per token.
        accuracy: share of the scored tokens that the model finds most likely at their place.
        tokens: number of scored tokens; each is scored once.
        context: most tokens of a window.
        stride: tokens scored in each window after the first.
        bos: True if every window starts with the tokenizer's BOS token.
    """

    perplexity: float
    nll: float
    accuracy: float
    tokens: int
    context: int
    stride: int
    bos: bool
    dtype: str
    threads: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


def perplexity(
    model: Any, ids: Tensor, *, bos: int | None = None, context: int | None = None, stride: int | None = None,
    progress: Callable[[int, int, float], None] | None = None, engine: Engine | None = None,
) -> Perplexity:  # fmt: skip
    """Perplexity of `model` on a tokenized text.

    A window of `context` tokens moves over the text. The first window scores every token that it predicts.
    Each later window scores the next `stride` tokens; the tokens before them in the window are only context.
    So each token is scored exactly once, and predicted from all of the text before it or from at least
    ``context − stride`` tokens. With `bos`, every window starts with that token, and the first token of the
    text is scored too. Without `bos`, nothing predicts the first token, so it is not scored.

    Args:
        model: a causal language model of transformers.
        ids: (n,) token ids without special tokens.
        bos: id of the token that starts every window, or None.
        context: tokens of a window, `bos` included; None means 2048, or the most that the model takes if
            less.
        stride: tokens scored in a window; None means `context`, so that windows do not overlap.
        progress: called as progress(scored, total, perplexity so far) after each window.
        engine: of `model`; gives the logits if it runs the model and takes the context. Otherwise the model's
            ``forward`` does.

    Raises:
        CalibrationError: the text has no token that can be scored.
        ConfigError: context or stride is out of range.
        OatsError: the model gives NaN or infinite logits.
    """
    limit = context_limit(model)
    context = default_context(model) if context is None else context
    stride = context if stride is None else stride
    if context < 1 or (limit is not None and context > limit):
        at_most = "" if limit is None else f" and at most {limit}, the model's own"
        raise ConfigError(f"context must be at least 1{at_most}, got {context}")
    if not 1 <= stride <= context:
        raise ConfigError(f"stride must be in [1, context = {context}], got {stride}")

    prefix = [] if bos is None else [bos]
    sequence = torch.cat([torch.tensor(prefix, dtype=torch.int64), ids])
    total = sequence.numel() - 1
    if total < 1:
        raise CalibrationError(
            f"perplexity needs a token to predict and one before it, got {ids.numel()} tokens"
            + (" and no BOS token" if bos is None else "")
            + "; give a longer text"
        )

    native = engine is not None and engine.reason is None and context <= (engine.context or context)
    logits_of = _in_engine(engine) if engine is not None and native else _forward(model)
    started = time.perf_counter()
    nll, right, done = 0.0, 0, 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for inputs, next_tokens in _windows(sequence, context, stride, bos):
                scored = next_tokens.numel()
                logits = logits_of(inputs, scored)
                rows = zip(logits.split(_ROWS), next_tokens.split(_ROWS), strict=True)
                nll += math.fsum(float(cross_entropy(x.float(), y, reduction="sum")) for x, y in rows)
                right += int((logits.argmax(-1) == next_tokens).sum())
                done += scored
                if not math.isfinite(nll):
                    raise OatsError(
                        f"the model gives NaN or infinite log-likelihoods within its first {done} tokens; "
                        "its weights are damaged, or its dtype overflows: try float32"
                    )
                if progress is not None:
                    progress(done, total, _exp(nll / done))
    finally:
        model.train(training)
    return Perplexity(
        perplexity=_exp(nll / total), nll=nll / total, accuracy=right / total, tokens=total,
        context=context, stride=stride, bos=bos is not None, dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _forward(model: Any) -> Callable[[Tensor, int], Tensor]:
    """Tokens (n,), and how many of the last rows are wanted → their logits, by transformers."""
    few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits_of(inputs: Tensor, keep: int) -> Tensor:
        options = {"logits_to_keep": keep} if few_logits else {}
        logits: Tensor = model(input_ids=inputs[None], use_cache=False, **options).logits[0, -keep:]
        return logits

    return logits_of


def _in_engine(engine: Engine) -> Callable[[Tensor, int], Tensor]:
    """The same in the engine."""
    return lambda inputs, keep: engine.logits(inputs.tolist(), keep)


def _windows(sequence: Tensor, context: int, stride: int, bos: int | None) -> list[tuple[Tensor, Tensor]]:
    """Inputs and next tokens of each window; the last inputs are those that predict the next tokens."""
    windows = []
    scored, end = 1, min(1 + context, sequence.numel())
    while scored < sequence.numel():
        start = max(0, end - 1 - context)
        inputs = sequence[start : end - 1]
        if start > 0 and bos is not None:
            inputs = torch.cat([torch.tensor([bos], dtype=sequence.dtype), inputs[1:]])
        windows.append((inputs, sequence[scored:end]))
        scored, end = end, min(end + stride, sequence.numel())
    return windows


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def default_context(model: Any) -> int:
    """Tokens of a window by default: 2048, or the most that the model takes if less."""
    return min(DEFAULT_CONTEXT, context_limit(model) or DEFAULT_CONTEXT)
