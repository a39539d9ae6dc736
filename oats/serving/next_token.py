"""The choice of the next token, as ``generate`` of transformers makes it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from oats.engine.most_likely import most_likely
from oats.serving.request import Sampling

GREEDY_BELOW = 1e-5
"""Below this temperature the most likely token is taken: dividing logits by it would overflow."""


class NextToken:
    """Chooses tokens by transformers' own processors of logits.

    Args:
        model: a causal language model of transformers.
        config: a generation config for greedy search or sampling. It is changed: give each text its own.
        prompt: the tokens that the text begins with.
        seed: seed of the sampling; None continues with torch's random state.
    """

    def __init__(self, model: Any, config: Any, prompt: list[int], seed: int | None) -> None:
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
        # Some processors need the tokens of the prompt.
        self._processors = model._get_logits_processor(
            config, len(prompt), torch.tensor([prompt]), device="cpu", model_kwargs={}
        )
        self._ids, self._sample = list(prompt), bool(config.do_sample)
        self._random = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """Choose the next token from logits (vocabulary,), and remember it."""
        if not self._processors and not self._sample:
            return most_likely(logits)
        scores = logits[None].to(torch.float32, copy=True)
        if self._processors:
            scores = self._processors(torch.tensor([self._ids]), scores)
        if self._sample:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        else:
            chosen = scores.argmax(-1)
        self._ids.append(token := int(chosen))
        return token


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends if isinstance(ends, (list, tuple)) else [ends]) - {None}


def generation_config(model: Any, ends: Collection[int], sampling: Sampling) -> Any:
    """The model's generation config, with what `sampling` says."""
    config = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length = sampling.max_tokens, None
    config.eos_token_id = sorted(ends) or None
    if config.pad_token_id is None:
        # One sequence needs no padding, but generate() warns if this is not set.
        config.pad_token_id = min(ends, default=0)
    if sampling.temperature is not None and sampling.temperature < GREEDY_BELOW:
        config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
    elif sampling.temperature is not None or sampling.top_p is not None:
        config.do_sample = True
        config.temperature = sampling.temperature or config.temperature
        config.top_p = sampling.top_p or config.top_p
    return config
