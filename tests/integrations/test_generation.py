"""``model.generate`` in the engine: what transformers alone gives, and what goes through transformers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from oats.integrations.transformers.engine_cache import EngineCache  # noqa: E402
from oats.integrations.transformers.generation import engine_of, generate_natively_  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, sliding_window=24),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
}


def model_of(name: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)  # so that texts do not repeat one token
    generate_natively_(model)
    return model


def prompt(rows: int = 1, length: int = 40) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : 7 * row], mask[row, : 7 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def in_transformers(model: Any, **options: Any) -> Any:
    return type(model)._oats_class.generate(model, **options)


def steps(model: Any) -> int:
    return engine_of(model).statistics.steps


class Stop(transformers.StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 52)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.95},
    "beams": {"num_beams": 4},
    "beams, several": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several": {"num_return_sequences": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "criterion": {"stopping_criteria": [Stop()]},
    "chunks": {"prefill_chunk_size": 7},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
}
ONE_ROW = {"prompt lookup", "chunks"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_transformers(name: str, mode: str) -> None:
    model = model_of(name)
    options = {"do_sample": False, "max_new_tokens": 24, **prompt(1 if mode in ONE_ROW else 3), **MODES[mode]}
    before = steps(model)
    torch.manual_seed(3)
    got = model.generate(**options)
    assert steps(model) > before
    before = steps(model)
    torch.manual_seed(3)
    expected = in_transformers(model, **options)
    assert steps(model) == before
    assert torch.equal(got, expected)


def test_a_compressed_model_is_its_own_assistant() -> None:
    model, assistant = model_of(), model_of(seed=5)
    options = {"do_sample": False, "max_new_tokens": 24, **prompt()}
    got = model.generate(**options, assistant_model=assistant)
    assert torch.equal(got, in_transformers(model, **options))
    assert steps(model) and steps(assistant)


def test_scores_and_a_cache_to_go_on_from() -> None:
    model, options = model_of(), prompt()
    more = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    first = model.generate(**options, **more, max_new_tokens=5)
    expected = in_transformers(model, **options, **more, max_new_tokens=9)
    for got, wanted in zip(first.scores, expected.scores, strict=False):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    cache = first.cache if hasattr(first, "cache") else first.past_key_values
    assert isinstance(cache, EngineCache)
    name = "cache" if hasattr(first, "cache") else "past_key_values"
    second = model.generate(first.sequences, do_sample=False, max_new_tokens=4, **{name: cache})
    assert torch.equal(second, expected.sequences)


def test_a_streamer_gets_each_token() -> None:
    model, got = model_of(), []

    class Streamer(transformers.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def put(self, value: Tensor) -> None:
            got.extend(value.reshape(-1).tolist())

        def end(self) -> None:
            got.append(-1)

    text = model.generate(**prompt(), do_sample=False, max_new_tokens=8, streamer=Streamer())
    assert got == [*text[0].tolist(), -1]


FALLBACKS: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "no cache": {"use_cache": False},
    "right padding": {"attention_mask": torch.tensor([[1] * 38 + [0] * 2])},
    "a hole": {"attention_mask": torch.tensor([[1] * 10 + [0] * 2 + [1] * 28])},
    "positions": {"position_ids": torch.arange(5, 45)[None]},
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_what_the_engine_cannot_do_goes_through_transformers(what: str) -> None:
    model = model_of()
    model.set_attn_implementation("eager")
    before = steps(model)
    options = {"do_sample": False, "max_new_tokens": 6, **prompt(), **FALLBACKS[what]}
    got, expected = model.generate(**options), in_transformers(model, **options)
    assert steps(model) == before
    if isinstance(got, Tensor):
        assert torch.equal(got, expected)
    else:
        assert torch.equal(got.sequences, expected.sequences)


def test_embeddings_go_through_transformers() -> None:
    model = model_of()
    before = steps(model)
    embeddings = model.get_input_embeddings()(prompt()["input_ids"])
    model.generate(inputs_embeds=embeddings, do_sample=False, max_new_tokens=4)
    assert steps(model) == before


def test_a_hook_is_called() -> None:
    model, calls = model_of(), []
    engine_of(model)
    handle = model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.generate(**prompt(), do_sample=False, max_new_tokens=4)
    assert len(calls) == 4
    handle.remove()
    model.generate(**prompt(), do_sample=False, max_new_tokens=4)
    assert len(calls) == 4


def test_forward_itself_stays_that_of_transformers() -> None:
    model = model_of()
    model.generate(**prompt(), max_new_tokens=2)
    before = steps(model)
    output = model(**prompt(), use_cache=True)
    assert steps(model) == before
    assert output.logits.requires_grad


def test_new_weights_make_a_new_engine() -> None:
    model = model_of()
    first = engine_of(model)
    assert engine_of(model) is first
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    got = model.generate(**prompt(), do_sample=False, max_new_tokens=6)
    assert engine_of(model) is not first
    assert torch.equal(got, in_transformers(model, **prompt(), do_sample=False, max_new_tokens=6))
    model.to(torch.bfloat16)
    assert engine_of(model)._native.dtype == torch.bfloat16
    model.train()
    before = steps(model)
    model.generate(**prompt(), max_new_tokens=2)
    assert steps(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_generate_too(copied: Any) -> None:
    model = model_of()
    expected = model.generate(**prompt(), do_sample=False, max_new_tokens=6)
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(other.generate(**prompt(), do_sample=False, max_new_tokens=6), expected)
    assert steps(other) and engine_of(other) is not engine_of(model)


def test_the_class_keeps_its_name_and_the_model_its_tensors(tmp_path: Any) -> None:
    model = model_of()
    model.generate(**prompt(), max_new_tokens=2)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not [name for name in model.state_dict() if "engine" in name]
    assert isinstance(model, transformers.LlamaForCausalLM)


def test_the_memory_of_texts_is_given_back() -> None:
    model = model_of("gemma3")
    for number in range(20):
        model.generate(**prompt(2), do_sample=False, max_new_tokens=3, num_beams=1 + number % 3)
    gc.collect()
    assert engine_of(model)._cache.nbytes == 0


def test_two_threads() -> None:
    model = model_of()
    expected = in_transformers(model, **prompt(3), do_sample=False, max_new_tokens=20)
    got: list[Tensor] = []

    def run() -> None:
        got.extend(model.generate(**prompt(3), do_sample=False, max_new_tokens=20) for _ in range(3))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6
    assert all(torch.equal(text, expected) for text in got)


def test_a_model_that_the_engine_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=0, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    generate_natively_(model)
    with caplog.at_level("INFO", "oats"):
        for _ in range(2):
            model.generate(**prompt(), do_sample=False, max_new_tokens=3)
    assert [record.message for record in caplog.records if record.name == "oats"] == [
        f"GPT2LMHeadModel runs in transformers, not in the engine: {engine_of(model).reason}"
    ]


def test_updating_an_engine_cache_is_refused() -> None:
    cache = EngineCache(engine_of(model_of()), [0])
    with pytest.raises(TypeError, match="belongs to `generate`"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
