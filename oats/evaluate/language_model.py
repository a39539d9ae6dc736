"""How a comparison scores a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from oats.compression.calibration_text import Text
from oats.compression.tokenization import bos_token_id, tokenize
from oats.evaluate.perplexity import default_context, perplexity
from oats.evaluate.tasks import evaluate_tasks


class Scoring:
    """Perplexity on some texts; on request also the accuracy of the next token, and tasks.

    Args:
        model: the dense model.
        texts: short name → text.
        context: tokens of a window, and `stride`, as in :func:`oats.evaluate.perplexity.perplexity`.
        max_tokens: use only the first tokens of each text.
        accuracy: score the share of next tokens that the model predicts, too.
        tasks: names of tasks of lm-evaluation-harness to score, too; `task_path` and `limit` as in
            :func:`oats.evaluate.tasks.evaluate_tasks`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, texts: Mapping[str, Text], *, context: int | None = None,
        stride: int | None = None, max_tokens: int | None = None, accuracy: bool = False,
        tasks: Sequence[str] = (), task_path: Path | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        vocabulary = model.get_input_embeddings().num_embeddings
        self._tokenizer, self.bos, self._texts = tokenizer, bos_token_id(tokenizer), texts
        self._ids: dict[str, Tensor] = {
            name: tokenize(tokenizer, text, vocabulary)[:max_tokens] for name, text in texts.items()
        }
        self._context = default_context(model) if context is None else context
        self._stride = self._context if stride is None else stride
        self._accuracy = accuracy
        self._tasks, self._task_path, self._limit = tasks, task_path, limit

    def __call__(self, model: Any) -> dict[str, float]:
        """Scores of a form of the model, by name."""
        scores = {}
        for name, ids in self._ids.items():
            found = perplexity(model, ids, bos=self.bos, context=self._context, stride=self._stride)
            scores[f"perplexity, {name}"] = found.perplexity
            if self._accuracy:
                scores[f"accuracy of the next token, {name}"] = found.accuracy
        if self._tasks:
            answers = evaluate_tasks(
                model, self._tokenizer, self._tasks, task_path=self._task_path, limit=self._limit
            )
            scores |= {
                f"accuracy, {score.task}": score.value for score in answers.scores if score.metric == "acc"
            }
        return scores

    def settings(self) -> dict[str, Any]:
        """Texts, context and stride in words."""
        texts = zip(self._texts.values(), self._ids.values(), strict=True)
        return {
            **{
                f"evaluation {i}": f"{text.name}, {text.split}, sha256 {text.sha256}, {len(ids)} tokens"
                for i, (text, ids) in enumerate(texts, 1)
            },
            "context": self._context,
            "stride": self._stride,
        }
