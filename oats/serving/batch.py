"""Texts that a model continues together: each call computes one token of every text.

With a few rows a linear layer takes as long as it takes to read its weights. So one token for each of eight
texts takes little longer than one token for one text. Texts are added and removed between two calls. Their
keys and values are in one cache of transformers, a row for each text. A short text is at the right end of its
row; the padding on its left is masked. A layer with sliding-window attention keeps the window only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from oats.serving.request import Request

CHUNK = 256
"""Tokens of a prompt in one call. The other texts wait for that call, so more would let them wait longer."""


def can_batch(model: Any) -> bool:
    """True if a model remembers past tokens by keys and values only, because padding can mask those.

    A recurrent state cannot be masked. Attention in chunks counts them from the left end of a row, where the
    padding is.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return False
    layers = DynamicCache(config=model.config).layers
    return not model._is_stateful and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


class NextToken:
    """Chooses tokens as ``generate`` does, by transformers' own processors of logits.

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
        """Choose the next token from logits (1, vocabulary), and remember it."""
        scores = logits.to(torch.float32, copy=True)
        if self._processors:
            scores = self._processors(torch.tensor([self._ids]), scores)
        if self._sample:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._random)
        else:
            chosen = scores.argmax(-1)
        self._ids.append(token := int(chosen))
        return token


@dataclass(eq=False)
class RunningText:
    """A text that is being continued.

    Attributes:
        request: what to generate, and where the text goes.
        next_token: chooses its tokens.
        length: number of tokens whose keys and values are in a cache.
        last: the newest token, which the model has not seen yet; -1 while the prompt is computed.
        cache: its own cache while the prompt is computed; None before that, and once it is in the batch.
    """

    request: Request
    next_token: NextToken
    length: int = 0
    last: int = -1
    cache: DynamicCache | None = None


class Batch:
    """The texts that a model continues together; :func:`can_batch` must be True of it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        # The name of this argument depends on the release of transformers.
        names = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self.texts: list[RunningText] = []
        self._cache: Any = None

    @torch.no_grad()
    def prefill(self, text: RunningText) -> bool:
        """Compute the next `CHUNK` of a prompt; after the last, choose the first token and return True.

        Then :meth:`add` may follow.
        """
        if text.cache is None:
            text.cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([text.request.ids[text.length : text.length + CHUNK]])
        end = text.length + ids.shape[1]
        mask = torch.ones(1, end, dtype=torch.long)
        output = self._run(ids, mask, torch.arange(text.length, end)[None], text.cache, logits_to_keep=1)
        text.length = end
        if end < len(text.request.ids):
            return False
        text.last = text.next_token(output.logits[:, -1])
        return True

    def add(self, text: RunningText) -> None:
        """Add a text whose prompt is done."""
        new, text.cache = text.cache, None
        if not self.texts:
            self._cache = new
        else:
            longest = max(text.length, self._longest())
            for mine, other in zip(_layers(self._cache), _layers(new), strict=True):
                _fit(mine, longest)
                _fit(other, longest)
                mine.keys = torch.cat([mine.keys, other.keys])
                mine.values = torch.cat([mine.values, other.values])
        self.texts.append(text)

    @torch.no_grad()
    def step(self) -> None:
        """Give the model the newest token of each text, and choose the next one."""
        longest = self._longest() + 1
        mask = torch.zeros(len(self.texts), longest, dtype=torch.long)
        for row, text in enumerate(self.texts):
            mask[row, longest - text.length - 1 :] = 1
        newest = torch.tensor([[text.last] for text in self.texts])
        positions = torch.tensor([[text.length] for text in self.texts])
        output = self._run(newest, mask, positions, self._cache)
        for row, text in enumerate(self.texts):
            text.length += 1
            text.last = text.next_token(output.logits[row : row + 1, -1])

    def keep(self, going_on: list[RunningText]) -> None:
        """Remove all other texts, and the padding that only they needed."""
        if len(going_on) == len(self.texts):
            return
        rows = torch.tensor(
            [row for row, text in enumerate(self.texts) if text in going_on], dtype=torch.long
        )
        self.texts = [self.texts[row] for row in rows.tolist()]
        if not self.texts:
            self._cache = None
            return
        for layer in _layers(self._cache):
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
            _fit(layer, self._longest())

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, **options: Any) -> Any:
        options = {"position_ids": positions, "use_cache": True, self._cache_name: cache, **options}
        return self._model(input_ids=ids, attention_mask=mask, **options)

    def _longest(self) -> int:
        return max(text.length for text in self.texts)


def _layers(cache: Any) -> list[Any]:
    """The layers that hold keys and values; in some models a layer reads those of another layer."""
    return [layer for layer in cache.layers if layer.is_initialized]


def _fit(layer: Any, longest: int) -> None:
    """Pad or cut the keys and values of a layer, (rows, heads, tokens, features), to the width of a batch.

    Both happen on the left. What is cut is padding, or outside of the sliding window. `longest` is the number
    of tokens of the longest text in the batch.
    """
    width = longest
    if isinstance(layer, DynamicSlidingWindowLayer):
        width = min(longest, layer.sliding_window - 1)
        layer.cumulative_length = longest  # the mask finds the window by it
    padding = (0, 0, width - layer.keys.shape[2], 0)
    layer.keys, layer.values = functional.pad(layer.keys, padding), functional.pad(layer.values, padding)
