"""A request by itself through ``generate``, for models whose texts cannot be continued together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from oats.serving.request import Generation


class _Listener(BaseStreamer, StoppingCriteria):
    """transformers hands it each token, and asks it whether to stop."""

    def __init__(self, generation: Generation, closed: Callable[[], bool]) -> None:
        self._generation, self._closed, self._prompt_seen = generation, closed, False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._generation.push(token)

    def end(self) -> None:
        """Nothing: what was held back is delivered with the end."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether to stop here."""
        return torch.full((input_ids.shape[0],), self._generation.stopped or self._closed(), dtype=torch.bool)


def generate_alone(model: Any, config: Any, generation: Generation, closed: Callable[[], bool]) -> int:
    """Generate for one request, and deliver its text.

    Args:
        model: of transformers.
        config: the generation config.
        generation: the request.
        closed: whether to stop after the next token.

    Returns:
        the last token.
    """
    if generation.sampling.seed is not None:
        torch.manual_seed(generation.sampling.seed)
    ids = torch.tensor([generation.ids])
    listener = _Listener(generation, closed)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=listener,
        stopping_criteria=StoppingCriteriaList([listener]),
    )
    return int(output[0, -1])
