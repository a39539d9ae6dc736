"""One request at a time through ``generate``, for models that cannot continue several texts together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from oats.serving.request import Request


class _Listener(BaseStreamer, StoppingCriteria):
    """transformers hands it each token, and asks it whether to stop."""

    def __init__(self, request: Request, closed: Callable[[], bool]) -> None:
        self._request, self._closed, self._prompt_seen = request, closed, False

    def put(self, value: Tensor) -> None:
        """Called with the prompt first, then with each token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self._request.push(token)

    def end(self) -> None:
        """Do nothing: :meth:`Request.finish` delivers the rest."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """True to stop here."""
        return torch.full((input_ids.shape[0],), self._request.stopped or self._closed(), dtype=torch.bool)


def generate_alone(model: Any, config: Any, request: Request, closed: Callable[[], bool]) -> int:
    """Generate for one request with a generation config, deliver its text, and return the last token.

    `closed` is asked after each token; True stops.
    """
    if request.sampling.seed is not None:
        torch.manual_seed(request.sampling.seed)
    ids = torch.tensor([request.ids])
    listener = _Listener(request, closed)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=listener,
        stopping_criteria=StoppingCriteriaList([listener]),
    )  # fmt: skip
    return int(output[0, -1])
