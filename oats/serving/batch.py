"""Texts that are continued together: one token of each in one call of the model.

At a few rows the time of a linear layer is the time of reading its weights, so that a token for each of eight
texts takes little more than a token for one. Texts come and go between two calls: the keys and values of all
are one cache of transformers, each text's at the right end of its row, and padding on the left is masked. A
layer that sees a window of the text keeps no more than that.
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

from oats.serving.request import Generation

CHUNK = 256
"""Tokens of a prompt that are computed in one call: how long the texts that run may have to wait."""


def can_batch(model: Any) -> bool:
    """Whether the memory of a model's past is keys and values only, which can be padded.

    A recurrent state cannot, and attention in chunks counts from the first element of a row, padding or not.
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
        model: of transformers.
        config: a generation config for greedy search or sampling, for this text alone; it is changed.
        prompt: the tokens that the text begins with.
        seed: of the sampling; None goes on with torch's random state.
    """

    def __init__(self, model: Any, config: Any, prompt: list[int], seed: int | None) -> None:
        model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
        # Some processors look for the prompt's tokens again.
        self._processors = model._get_logits_processor(
            config, len(prompt), torch.tensor([prompt]), device="cpu", model_kwargs={}
        )
        self._ids, self._sample = list(prompt), bool(config.do_sample)
        self._random = None if seed is None else torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The token after those so far.

        Args:
            logits: (1, vocabulary).
        """
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
class Text:
    """One text: its request, how its tokens are chosen, and, while the prompt is computed, its own cache.

    Attributes:
        generation: the request.
        next_token: chooses.
        length: tokens that were computed, whose keys and values are there.
        last: the newest token, not computed yet; -1 while the prompt is.
        cache: of this text alone; None before the prompt is begun, and once it is in the batch.
    """

    generation: Generation
    next_token: NextToken
    length: int = 0
    last: int = -1
    cache: DynamicCache | None = None


class Batch:
    """The texts that a model continues together, in step.

    Args:
        model: one that :func:`can_batch`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # Releases of transformers differ in what they call it.
        names = inspect.signature(type(model).forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self.texts: list[Text] = []
        self._cache: Any = None

    @torch.no_grad()
    def prefill(self, text: Text) -> bool:
        """Compute the next `CHUNK` of a prompt; after the last, choose the first token.

        Returns:
            whether the prompt is done: the text can be added, if it goes on.
        """
        if text.cache is None:
            text.cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([text.generation.ids[text.length : text.length + CHUNK]])
        end = text.length + ids.shape[1]
        output = self._model(
            input_ids=ids,
            attention_mask=torch.ones(1, end, dtype=torch.long),
            position_ids=torch.arange(text.length, end)[None],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_name: text.cache},
        )
        text.length = end
        if end < len(text.generation.ids):
            return False
        text.last = text.next_token(output.logits[:, -1])
        return True

    def add(self, text: Text) -> None:
        """Take in a text whose prompt is done."""
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
        """Compute the newest token of each text, and choose the next."""
        longest = self._longest() + 1
        mask = torch.zeros(len(self.texts), longest, dtype=torch.long)
        for row, text in enumerate(self.texts):
            mask[row, longest - text.length - 1 :] = 1
        output = self._model(
            input_ids=torch.tensor([[text.last] for text in self.texts]),
            attention_mask=mask,
            position_ids=torch.tensor([[text.length] for text in self.texts]),
            use_cache=True,
            **{self._cache_name: self._cache},
        )
        for row, text in enumerate(self.texts):
            text.length += 1
            text.last = text.next_token(output.logits[row : row + 1, -1])

    def keep(self, going_on: list[Text]) -> None:
        """Leave out the other texts, and the padding that only they needed."""
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

    def _longest(self) -> int:
        return max(text.length for text in self.texts)


def _layers(cache: Any) -> list[Any]:
    """Those that hold something: some models have layers that read the keys of others."""
    return [layer for layer in cache.layers if layer.is_initialized]


def _fit(layer: Any, longest: int) -> None:
    """Make a layer's keys and values, (rows, heads, tokens, features), as wide as those of a batch.

    Zeros are added on the left, or tokens left out there, which are padding or outside of the window.

    Args:
        layer: of a cache.
        longest: tokens of the longest text in the batch.
    """
    width = longest
    if isinstance(layer, DynamicSlidingWindowLayer):
        width = min(longest, layer.sliding_window - 1)
        layer.cumulative_length = longest  # where the window is in the mask
    padding = (0, 0, width - layer.keys.shape[2], 0)
    layer.keys, layer.values = functional.pad(layer.keys, padding), functional.pad(layer.values, padding)
