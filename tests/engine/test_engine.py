"""The engine against transformers: logits, greedy texts, and a cache that is shared and given back."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from oats import ConfigError, OatsConfig, UnsupportedModelError, compress_, quantize_  # noqa: E402
from oats.engine.cache import GONE, PAGE, PagedCache, PagePool  # noqa: E402
from oats.engine.engine import Engine  # noqa: E402
from oats.engine.most_likely import most_likely  # noqa: E402
from oats.kernels.isa import available_isas  # noqa: E402
from oats.models import decoders  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WITH_HEAD_DIM = {**SIZES, "head_dim": 16}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {**ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**WITH_HEAD_DIM),
    "llama, untied, biases": lambda: transformers.LlamaConfig(
        **WITH_HEAD_DIM, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    ),
    "llama, wide heads": lambda: transformers.LlamaConfig(**SIZES, head_dim=48),
    "llama, llama3 rope": lambda: transformers.LlamaConfig(**WITH_HEAD_DIM, rope_parameters=LLAMA3),
    "llama, yarn": lambda: transformers.LlamaConfig(**WITH_HEAD_DIM, rope_parameters=YARN),
    "llama, linear rope": lambda: transformers.LlamaConfig(
        **WITH_HEAD_DIM, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**WITH_HEAD_DIM, sliding_window=40),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**WITH_HEAD_DIM),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "phi3, part of a head": lambda: transformers.Phi3Config(
        **{**SIZES, "hidden_size": 128}, partial_rotary_factor=0.5
    ),
    "phi3, longrope": lambda: transformers.Phi3Config(
        **SIZES, rope_parameters=LONG, original_max_position_embeddings=512
    ),
    "gemma": lambda: transformers.GemmaConfig(**WITH_HEAD_DIM),
    "gemma2": lambda: transformers.Gemma2Config(**WITH_HEAD_DIM, sliding_window=50),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **WITH_HEAD_DIM, sliding_window=50, layer_types=WINDOWS, query_pre_attn_scalar=16
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **WITH_HEAD_DIM, num_local_experts=5, num_experts_per_tok=2, sliding_window=40
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=80,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **WITH_HEAD_DIM, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=True
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=2.0,
    ),
}


def model_of(which: str | Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    """A random model: of a name in ARCHITECTURES, or of another configuration."""
    torch.manual_seed(0)
    config = (ARCHITECTURES[which] if isinstance(which, str) else which)()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases, which would all be ones and zeros
            parameter.data.normal_(0, 0.3)
    return model.eval()


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist()


@torch.no_grad()
def expected_logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def logits_in_chunks(engine: Engine, ids: list[int], chunks: list[int]) -> Tensor:
    tokens, rows, at = engine.new(), [], 0
    for count in chunks:
        rows.append(engine._run([(tokens, ids[at : at + count])], range(count)).float())
        at += count
    engine.release(tokens)
    return torch.cat(rows)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Rounding of some hundred terms in each of three layers, which partly cancels."""
    assert (got - expected).norm() <= 8 * torch.finfo(dtype).eps * 6**0.5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype)
    engine = Engine(model)
    assert engine.reason is None
    ids = text(150)
    expected = expected_logits(model, ids)
    whole = logits_in_chunks(engine, ids, [150])
    assert_close(whole, expected, dtype)
    assert_close(logits_in_chunks(engine, ids, [70, 1, 1, 78]), expected, dtype)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OATS_ISA", isa)
    model, ids = model_of("gemma3", dtype), text(130)
    engine = Engine(model)
    assert engine.reason is None
    assert_close(logits_in_chunks(engine, ids, [129, 1]), expected_logits(model, ids), dtype)


@pytest.mark.parametrize("head", [None, "int8"])
@pytest.mark.parametrize("values", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "mixtral", "qwen2_moe"])
def test_compressed_models(name: str, values: str | None, head: str | None) -> None:
    model = model_of(name, torch.bfloat16)
    compress_(
        model, torch.tensor([text(64, seed) for seed in range(4)]), OatsConfig(values=values, head=head)
    )
    engine, ids = Engine(model), text(120)
    assert engine.reason is None
    assert_close(logits_in_chunks(engine, ids, [100, 20]), expected_logits(model, ids), torch.bfloat16)


def test_layers_that_stayed_dense() -> None:
    model = model_of("llama")
    config = OatsConfig(skip=("*.v_proj", "*.down_proj"))
    compress_(model, torch.tensor([text(64, seed) for seed in range(4)]), config)
    engine, ids = Engine(model), text(90)
    assert engine.reason is None
    assert_close(logits_in_chunks(engine, ids, [90]), expected_logits(model, ids), torch.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_texts_are_those_of_transformers(name: str) -> None:
    model, prompt = model_of(name), text(20)
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 20),
        max_new_tokens=200,
        do_sample=False,
        eos_token_id=None,
    )
    assert Engine(model).generate([prompt], 200)[0] == expected[0, 20:].tolist()


@pytest.mark.parametrize("name", ["gemma3", "qwen2_moe"])
def test_a_batch_of_unequal_lengths_gives_what_each_gives_alone(name: str) -> None:
    engine = Engine(model_of(name))
    prompts = [text(length, length) for length in (1, 63, 64, 65, 300, 7)]
    alone = [engine.generate([prompt], 30)[0] for prompt in prompts]
    assert engine.generate(prompts, 30) == alone
    assert engine.generate(prompts, 30, max_batch=2) == alone
    engine.forget()
    assert all(pool.in_use == 0 for pool in engine._cache.pools)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_moe"])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_logits_do_not_depend_on_the_threads(name: str, threads: int) -> None:
    engine, ids = Engine(model_of(name, torch.bfloat16)), text(140)
    torch.set_num_threads(1)
    expected = logits_in_chunks(engine, ids, [139, 1])
    torch.set_num_threads(threads)
    assert torch.equal(logits_in_chunks(engine, ids, [139, 1]), expected)


def test_engines_in_python_threads() -> None:
    engines = [Engine(model_of(name)) for name in ("llama", "gemma3")]
    expected = [engine.generate([text(30)], 40) for engine in engines]
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        results[index] = engines[index % 2].generate([text(30)], 40)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [results[i] for i in range(4)] == [expected[i % 2] for i in range(4)]


def test_a_fork_shares_pages_until_it_writes() -> None:
    engine, ids = Engine(model_of("llama")), text(PAGE + 10)
    tokens = engine.new()
    engine.prefill(tokens, ids)
    fork = engine.fork(tokens)
    pool = engine._cache.pools[0]
    assert pool.in_use == 2
    first = engine.step([(tokens, [5])])
    assert pool.in_use == 3  # the page that was written to was copied
    assert torch.equal(engine.step([(fork, [5])]), first)
    assert fork.tables[0][0] == tokens.tables[0][0] and fork.tables[0][1] != tokens.tables[0][1]
    engine.release(tokens)
    engine.release(fork)
    assert pool.in_use == 0


def test_pages_that_left_the_window_are_given_back() -> None:
    engine = Engine(model_of("mistral"))
    tokens = engine.new()
    engine.prefill(tokens, text(400))
    assert engine._cache.pools[0].in_use <= 2 + 400 // PAGE
    engine.step([(tokens, [3])])
    # One page more than the window has, so that tokens can be taken back.
    assert engine._cache.pools[0].in_use == 3 and tokens.tables[0][0] == GONE
    engine.truncate(tokens, 401 - PAGE)
    assert tokens.length == 401 - PAGE
    engine.truncate(tokens, PAGE)  # what the next token would see is gone
    assert tokens.length == 0
    engine.release(tokens)
    assert engine._cache.pools[0].in_use == 0


def test_nothing_leaks_over_ten_thousand_sequences() -> None:
    cache = PagedCache([PagePool(1, 1, 16, window, torch.float32) for window in (0, 100)])
    lengths = torch.randint(1, 500, (10_000,), generator=torch.Generator().manual_seed(0)).tolist()
    held = []
    for length in lengths:
        tokens = cache.new()
        cache.prepare(tokens, length)
        tokens.length = length
        held.append(tokens)
        if length % 3 == 0:
            held.append(cache.fork(tokens))
        while len(held) > 20:
            cache.release(held.pop(length % 20))
    for tokens in held:
        cache.release(tokens)
    assert [pool.in_use for pool in cache.pools] == [0, 0]
    assert all(len(pool.pages) < 512 for pool in cache.pools)


def test_truncated_tokens_are_computed_again() -> None:
    engine, ids = Engine(model_of("llama")), text(3 * PAGE)
    tokens = engine.new()
    expected = engine.prefill(tokens, ids)
    engine.prefill(tokens, text(PAGE + 5, 1))
    engine._cache.truncate(tokens, 2 * PAGE + 3)
    assert engine._cache.pools[0].in_use == 3
    assert torch.equal(engine.prefill(tokens, ids[2 * PAGE + 3 :]), expected)


@pytest.mark.parametrize(
    "wrong", [{"one_plus": True}, {"norms_after": True}, {"embedding_scale": lambda config: 2.0}], ids=str
)
def test_a_wrong_entry_is_found_out(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoders.DECODERS, "llama", replace(decoders.DECODERS["llama"], **wrong))
    engine = Engine(model_of("llama"))
    assert engine.reason is not None
    with pytest.raises(UnsupportedModelError, match="does not run in the engine"):
        engine.generate([text(3)], 1)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_wrong_mixture_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = decoders.DECODERS[name]
    wrong = replace(entry, normalised_experts=lambda config: not entry.normalised_experts(config))
    monkeypatch.setitem(decoders.DECODERS, name, wrong)
    assert "differ from transformers'" in str(Engine(model_of(name)).reason)


def test_what_is_not_known_says_why() -> None:
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    assert "does not know the architecture 'opt', but gemma" in str(Engine(opt).reason)
    narrow = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, head_dim=8))
    assert "multiples of 16" in str(Engine(narrow).reason)
    assert "float16" in str(Engine(copy.deepcopy(narrow).half()).reason)


def test_texts_that_do_not_fit() -> None:
    engine = Engine(model_of("llama"))
    tokens = engine.new()
    with pytest.raises(ConfigError, match="longer than the model's context of 512"):
        engine.prefill(tokens, text(513))
    with pytest.raises(ConfigError, match="no token"):
        engine.prefill(tokens, [])
    with pytest.raises(ConfigError, match="a prompt is empty"):
        engine.generate([[]], 3)
    with pytest.raises(ConfigError, match="a text of 513 tokens is longer"):
        engine.generate([text(500)], 13)
    for ids in ([3, 101], [-1]):
        with pytest.raises(ConfigError, match="the model has 101 embeddings"):
            engine.prefill(tokens, ids)
        with pytest.raises(ConfigError, match="the model has 101 embeddings"):
            engine.generate([ids], 3)
    for work in ([(tokens, [])], [(tokens, [3]), (tokens, [4])]):
        with pytest.raises(ConfigError, match="each sequence once, with at least one token"):
            engine.step(work)
    with pytest.raises(ConfigError, match="at least 1, got 0, 16"):
        engine.generate([[3]], 0)


def test_quantising_again_needs_a_new_engine() -> None:
    model = model_of("llama", torch.bfloat16)
    compress_(model, torch.tensor([text(64, seed) for seed in range(4)]), OatsConfig())
    before = Engine(model).generate([text(9)], 5)
    kept = Engine(model)
    quantize_(model, "int4")
    assert kept.generate([text(9)], 5) == before  # its weights are kept alive
    assert Engine(model).reason is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", available_isas())
def test_the_most_likely_token_is_that_of_argmax(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OATS_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3, 15, 16, 17, 33, 1000):
        for logits in (
            torch.randn(size, generator=generator),
            torch.randint(0, 2, (size,), generator=generator).float(),  # several are the largest
            torch.full((size,), float("-inf")),
            torch.cat([torch.randn(size - 1, generator=generator), torch.tensor([float("nan")])]),
        ):
            assert most_likely(logits.to(dtype)) == int(logits.to(dtype).argmax())
