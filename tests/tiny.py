"""A Llama of two layers and 64 features with a tokenizer of bytes, as a directory that a user would have."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import oats
from oats.compression.report import CompressionReport
from oats.serving.request_queue import RequestQueue

CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog. " * 60


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def llama(weights: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(weights)
    config = LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_dense(directory: Path, chat_template: str | None = None) -> Path:
    llama().save_pretrained(directory)
    byte_tokenizer(chat_template).save_pretrained(directory)
    return directory


def compressed_llama(weights: int = 0, **settings: object) -> tuple[LlamaForCausalLM, CompressionReport]:
    model = llama(weights)
    ids = torch.tensor(byte_tokenizer()(TEXT).input_ids[: 4 * 32]).view(4, 32)
    report = oats.compress_(model, ids, oats.OatsConfig(**{"iterations": 3, **settings}))
    return model, report


def save_compressed(directory: Path, chat_template: str | None = None) -> Path:
    compressed_llama()[0].save_pretrained(directory)
    byte_tokenizer(chat_template).save_pretrained(directory)
    return directory


def load(directory: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer; no token ends a text, so that outputs are as long as they may be."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.generation_config.eos_token_id = 9999
    return model, AutoTokenizer.from_pretrained(directory)


def continuation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int
) -> str:
    """What ``generate`` makes of a prompt, without the prompt."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def slow_queue(model: Any, tokenizer: Any, **options: int) -> RequestQueue:
    """A queue whose steps take 50 ms: long enough to do something while it works."""
    queue = RequestQueue(model, tokenizer, **options)
    batch = queue._batch
    assert batch is not None
    step = batch.step

    def slow_step() -> Any:
        time.sleep(0.05)
        return step()

    batch.step = slow_step  # type: ignore[method-assign]
    return queue
