"""`model.generate` in the engine against transformers' own: the same texts, and which of the two ran."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList  # noqa: E402

from oats import ConfigError, OatsConfig, compress_, quantize_  # noqa: E402
from oats.engine.cache import PAGE  # noqa: E402
from oats.engine.engine import CHUNK  # noqa: E402
from oats.integrations.transformers.engine_cache import EngineCache  # noqa: E402
from oats.integrations.transformers.generation import engine_of, generate_natively_  # noqa: E402
from tests.engine.test_engine import model_of, text  # noqa: E402

NAMES = ["llama", "mistral", "qwen3", "phi3", "gemma3", "granite"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


def pair(name: str = "llama") -> tuple[Any, Any]:
    """The same model, with transformers' generate and with ours."""
    plain = model_of(name)
    native = copy.deepcopy(plain)
    generate_natively_(native)
    return plain, native


def native_llama() -> Any:
    return pair()[1]


def prompt(length: int = 20, seed: int = 0) -> Tensor:
    return torch.tensor([text(length, seed)])


def padded() -> dict[str, Tensor]:
    """Three texts of 5, 70 and 33 tokens, with padding on the left."""
    ids, mask = torch.zeros(3, 70, dtype=torch.long), torch.zeros(3, 70, dtype=torch.long)
    for row, length in enumerate((5, 70, 33)):
        ids[row, 70 - length :] = torch.tensor(text(length, length))
        mask[row, 70 - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def steps(model: Any) -> int:
    engine, reason = engine_of(model)
    assert engine is not None, reason
    return engine.statistics.steps


def pages(model: Any) -> int:
    engine, _ = engine_of(model)
    assert engine is not None
    return sum(pool.in_use for pool in engine._cache.pools)


def generated(model: Any, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**{**GREEDY, **arguments})


def assert_same(plain: Any, native: Any, **arguments: Any) -> None:
    """Natively, and the same tokens."""
    before = steps(native)
    got = generated(native, **arguments)
    assert steps(native) > before
    assert torch.equal(got, generated(plain, **arguments))
    assert pages(native) == 0


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "more than one sample": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams that are returned": {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    "an end": {"eos_token_id": [*range(3, 30)], "pad_token_id": 0},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "pieces of a prompt": {"prefill_chunk_size": 7},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
}
ALONE = {"prompt lookup"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_tokens(name: str, mode: str) -> None:
    plain, native = pair(name)
    # A text that repeats itself, so that lookups find something.
    ids = torch.cat([prompt(), prompt(), prompt(5, 1)], dim=1)
    assert_same(plain, native, input_ids=ids, **MODES[mode])
    if mode not in ALONE:
        assert_same(plain, native, **padded(), **MODES[mode])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_generation(name: str, sampled: bool) -> None:
    plain, native = pair(name)
    helper = copy.deepcopy(plain)
    with torch.no_grad():
        for weight in helper.parameters():  # Right often, and wrong often.
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    native_helper = copy.deepcopy(helper)
    generate_natively_(native_helper)
    arguments = {"input_ids": prompt(90), "max_new_tokens": 60, "do_sample": sampled}
    before = steps(native), steps(native_helper)
    got = generated(native, assistant_model=native_helper, **arguments)
    assert steps(native) > before[0] and steps(native_helper) > before[1]
    assert torch.equal(got, generated(plain, assistant_model=helper, **arguments))
    gc.collect()
    assert pages(native) == pages(native_helper) == 0


def test_an_assistant_of_fewer_layers_of_the_same_model() -> None:
    plain, native = pair()
    arguments = {"input_ids": prompt(), "assistant_early_exit": 2}
    assert_same(plain, native, **arguments)


def test_prompts_of_many_steps() -> None:
    plain, native = pair("gemma3")
    for model in (plain, native):
        model.config.max_position_embeddings = 2 * CHUNK
    assert_same(plain, native, input_ids=prompt(CHUNK + PAGE + 3))


def test_streamers_and_stopping_criteria() -> None:
    class Kept(transformers.generation.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    def at_25(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] == 25)

    def only_even(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 1::2] = -torch.inf
        return scores

    plain, native = pair()
    own: dict[str, Any] = {
        "input_ids": prompt(),
        "stopping_criteria": StoppingCriteriaList([at_25]),
        "logits_processor": LogitsProcessorList([only_even]),
    }
    assert_same(plain, native, **own)
    streamer = Kept()
    got = generated(native, streamer=streamer, **own)
    assert streamer.tokens == got[0].tolist() and len(streamer.tokens) == 25 and streamer.ended


def test_scores_and_logits_are_returned() -> None:
    plain, native = pair("gemma3")
    arguments = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True, **padded()}
    got, expected = generated(native, **arguments), generated(plain, **arguments)
    assert torch.equal(got.sequences, expected.sequences)
    assert isinstance(got.past_key_values, EngineCache)
    assert isinstance(expected.past_key_values, DynamicCache)
    for kind in ("logits", "scores"):
        ours, theirs = torch.stack(getattr(got, kind)), torch.stack(getattr(expected, kind))
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert pages(native) > 0
    del got
    assert pages(native) == 0


@pytest.mark.parametrize("copied", [False, True])
def test_a_cache_that_was_returned_goes_on(copied: bool) -> None:
    plain, native = pair("gemma3")
    results = []
    for model in (plain, native):
        first = generated(model, return_dict_in_generate=True, **padded())
        cache = copy.deepcopy(first.past_key_values) if copied else first.past_key_values
        more = torch.cat([first.sequences, prompt(3, 5).expand(3, -1)], dim=1)
        mask = torch.cat([padded()["attention_mask"], torch.ones(3, 15, dtype=torch.long)], dim=1)
        results.append(generated(model, input_ids=more, attention_mask=mask, past_key_values=cache))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_loop_of_ones_own_goes_on_with_the_cache() -> None:
    plain, native = pair()
    ids = prompt()
    cache = generated(native, input_ids=ids, return_dict_in_generate=True).past_key_values
    whole = generated(plain, input_ids=ids)
    more = torch.cat([whole[:, -1:], prompt(4, 3)], dim=1)
    expected = plain(torch.cat([whole[:, :-1], more], dim=1)).logits
    for keep, logits in (
        (0, expected[:, -5:]),
        (2, expected[:, -2:]),
        (torch.tensor([1, 3]), expected[:, [-4, -2]]),
    ):
        again = copy.deepcopy(cache)
        output = native(more, past_key_values=again, logits_to_keep=keep)
        assert output.logits.shape == logits.shape and output.past_key_values is again
        assert (output.logits - logits).norm() < 1e-5 * logits.norm()
    assert native(more, past_key_values=cache, return_dict=False)[0].shape == expected[:, -5:].shape


@torch.no_grad()
@pytest.mark.parametrize(
    "wrong",
    [
        {"output_hidden_states": True},
        {"attention_mask": torch.ones(1, 3)},
        {"attention_mask": torch.tensor([[0] + [1] * 31])},
        {"attention_mask": torch.tensor([[1] * 31 + [0]])},
        {"position_ids": torch.tensor([[7]])},
        {"inputs_embeds": torch.zeros(1, 1, 64), "input_ids": None},
    ],
    ids=str,
)
def test_what_does_not_belong_to_a_cache_is_an_error(wrong: dict[str, Any]) -> None:
    native = native_llama()
    cache = generated(native, input_ids=prompt(), return_dict_in_generate=True).past_key_values
    assert cache.get_seq_length() == 31
    with pytest.raises(ConfigError, match="DynamicCache"):
        native(**{"input_ids": prompt(1), "past_key_values": cache, **wrong})
    with pytest.raises(ConfigError, match="only the causal language model"):
        native.model(prompt(1), past_key_values=cache)


@pytest.mark.parametrize("window", ["llama", "mistral"])
def test_a_cropped_cache_computes_what_it_lost(window: str) -> None:
    plain, native = pair(window)
    cache = generated(native, input_ids=prompt(300), return_dict_in_generate=True).past_key_values
    cache.crop(-200)
    assert cache.get_seq_length() == 111
    with torch.no_grad():
        got = native(prompt(4, 9), past_key_values=cache).logits
        expected = plain(torch.cat([prompt(300)[:, :111], prompt(4, 9)], dim=1)).logits[:, -4:]
    assert (got - expected).norm() < 1e-5 * expected.norm()


def with_hook(model: Any) -> dict[str, Any]:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 1.1 * output)
    return {}


def with_training(model: Any) -> dict[str, Any]:
    model.model.layers[0].train()
    return {}


def with_compiled_forward(model: Any) -> dict[str, Any]:
    model.forward = torch.compile(model.forward, backend="eager")
    return {}


def with_fewer_layers(model: Any) -> dict[str, Any]:
    model.config.num_hidden_layers = 2
    return {}


def with_embeddings(model: Any) -> dict[str, Any]:
    return {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(prompt()).detach()}


def with_right_padding(model: Any) -> dict[str, Any]:
    return {"attention_mask": torch.tensor([[1] * 17 + [0] * 3])}


FALLBACKS: dict[str, tuple[Any, str]] = {
    "a hook": (with_hook, "layers.1.mlp has a hook"),
    "training mode": (with_training, "training mode"),
    "a compiled forward": (with_compiled_forward, "was replaced"),
    "fewer layers": (with_fewer_layers, "2 of its 3 layers run"),
    "float64": (lambda model: model.to(torch.float64) and {}, "float64"),
    "embeddings": (with_embeddings, "inputs_embeds"),
    "padding on the right": (with_right_padding, "attention_mask"),
    "positions": (lambda model: {"position_ids": torch.arange(3, 23)[None]}, "position_ids"),
    "no cache": (lambda model: {"use_cache": False}, "use_cache"),
    "a cache": (lambda model: {"past_key_values": DynamicCache()}, "DynamicCache"),
    "hidden states": (
        lambda model: {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states",
    ),
    "attentions": (
        lambda model: {"output_attentions": True, "return_dict_in_generate": True},
        "output_attentions",
    ),
    "too long": (
        lambda model: {"max_length": 513, "max_new_tokens": None, "eos_token_id": [*range(3, 90)]},
        "513",
    ),
}


@pytest.mark.parametrize("what", FALLBACKS)
def test_fallbacks(what: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = FALLBACKS[what]
    plain, native = pair()
    generated(native, input_ids=prompt())
    kept = engine_of(native)[0]
    assert kept is not None
    before = kept.statistics.steps
    from oats.integrations.transformers import generation

    generation._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="oats"):
        got = generated(native, **{"input_ids": prompt(), **change(native)})
        generated(native, **{"input_ids": prompt(), **change(native)})
    assert kept.statistics.steps == before
    messages = [record.getMessage() for record in caplog.records if record.name == "oats"]
    assert len(messages) == 1 and reason in messages[0]
    expected = generated(plain, **{"input_ids": prompt(), **change(plain)})
    if not isinstance(got, Tensor):
        got, expected = got.sequences, expected.sequences
    assert torch.equal(got, expected)


def test_hidden_states_asked_for_once_do_not_end_it() -> None:
    plain, native = pair()
    generated(native, input_ids=prompt(), output_hidden_states=True, return_dict_in_generate=True)
    assert_same(plain, native, input_ids=prompt())


def test_gradients_inside() -> None:
    native = native_llama()
    before = steps(native)
    ungraded = inspect.unwrap(type(native).generate)
    got = ungraded(native, prompt(), **GREEDY)
    assert steps(native) == before
    assert torch.equal(got, generated(native, input_ids=prompt()))


def test_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    _, native = pair()
    before = generated(native, input_ids=prompt())
    adapter = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(native, adapter).eval()
    engine, reason = engine_of(adapted.get_base_model())
    assert engine is None and "no kernel" in reason
    changed = generated(adapted, input_ids=prompt())
    assert not torch.equal(changed, before)
    with adapted.disable_adapter():
        assert torch.equal(generated(adapted, input_ids=prompt()), before)


def test_an_architecture_that_is_not_known() -> None:
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.OPTForCausalLM(config).eval()
    expected = generated(model, input_ids=prompt(5) % 50)
    generate_natively_(model)
    assert "'opt'" in engine_of(model)[1]
    assert torch.equal(generated(model, input_ids=prompt(5) % 50), expected)


def replace_weight(model: Any) -> None:
    torch.manual_seed(5)
    old = model.model.layers[0].mlp.up_proj
    new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    model.model.layers[0].mlp.up_proj = new.eval()


def scale_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight *= 3


def change_scale(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


@pytest.mark.parametrize("change", [replace_weight, scale_weight, change_scale])
def test_a_model_that_changed_gets_another_engine(change: Any) -> None:
    plain, native = pair()
    assert_same(plain, native, input_ids=prompt())
    first = engine_of(native)[0]
    assert engine_of(native)[0] is first
    change(plain)
    change(native)
    assert_same(plain, native, input_ids=prompt())
    assert engine_of(native)[0] is not first


def test_a_cache_outlives_its_engine() -> None:
    _, native = pair()
    first = generated(native, input_ids=prompt(), return_dict_in_generate=True)
    scale_weight(native)
    got = generated(native, input_ids=first.sequences, past_key_values=first.past_key_values)
    assert torch.equal(got, generated(native, input_ids=first.sequences))


def test_copies_and_pickles_and_files(tmp_path: Path) -> None:
    _, native = pair()
    expected = generated(native, input_ids=prompt())
    for copied in (copy.deepcopy(native), pickle.loads(pickle.dumps(native))):
        assert type(copied) is type(native)
        before = steps(copied)
        assert torch.equal(generated(copied, input_ids=prompt()), expected)
        assert steps(copied) > before
        assert engine_of(copied)[0] is not engine_of(native)[0]
    assert native.state_dict().keys() == model_of("llama").state_dict().keys()
    native.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(generated(loaded.eval(), input_ids=prompt()), expected)


def test_a_compressed_model_that_was_loaded(tmp_path: Path) -> None:
    model = model_of("gemma3")
    compress_(model, torch.tensor([text(64, seed) for seed in range(4)]), OatsConfig(values="int8"))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    before = steps(loaded)
    got = generated(loaded, input_ids=prompt())
    assert steps(loaded) > before
    expected = generated(loaded, input_ids=prompt(), past_key_values=DynamicCache(config=loaded.config))
    assert torch.equal(got, expected)
    first = engine_of(loaded)[0]
    quantize_(loaded, "int4")
    assert engine_of(loaded)[0] is not first
    loaded.dequantize()
    got = generated(loaded, input_ids=prompt())
    expected = generated(loaded, input_ids=prompt(), past_key_values=DynamicCache(config=loaded.config))
    assert torch.equal(got, expected)


def test_a_model_is_freed_with_its_engine() -> None:
    native = native_llama()
    generated(native, input_ids=prompt())
    dead, engine = weakref.ref(native), weakref.ref(engine_of(native)[0])
    del native
    assert dead() is None and engine() is None


def test_an_engine_does_not_outlive_to() -> None:
    native = native_llama()
    generated(native, input_ids=prompt())
    engine = weakref.ref(engine_of(native)[0])
    native.to(torch.bfloat16)
    assert engine() is None
    output = generated(native, input_ids=prompt(), output_logits=True, return_dict_in_generate=True)
    assert steps(native) > 0 and isinstance(output.past_key_values, EngineCache)
    with torch.no_grad():
        expected = native(prompt()).logits[:, -1].float()
    # Roundings of three layers, see tests/engine/test_engine.py.
    assert (output.logits[0] - expected).norm() < 8 * 2**-8 * 6**0.5 * expected.norm()


def test_a_cache_goes_on_where_the_engine_cannot() -> None:
    plain, native = pair("mistral")
    results = []
    for model in (plain, native):
        first = generated(model, return_dict_in_generate=True, **padded())
        with_hook(model)
        mask = torch.cat([padded()["attention_mask"], torch.ones(3, 12, dtype=torch.long)], dim=1)
        again = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
        if model is plain:
            again["past_key_values"] = None  # The hook changes the tokens before it too.
        results.append(generated(model, attention_mask=mask, **again))
    assert torch.equal(*results)


def test_a_mask_that_changed_inside_falls_back() -> None:
    """As transformers makes one for an assistant, where a new token is that of padding."""
    plain, native = pair("mistral")
    results = []
    for model in (plain, native):
        first = generated(model, input_ids=prompt(), return_dict_in_generate=True)
        mask = torch.ones(1, 32, dtype=torch.long)
        mask[0, 25] = 0
        again = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
        results.append(generated(model, attention_mask=mask, **again))
    assert torch.equal(*results)


def test_threads() -> None:
    plain, native = pair("gemma3")
    prompts = [prompt(10 + 30 * seed, seed) for seed in range(4)]
    expected = [generated(plain, input_ids=ids, num_beams=2) for ids in prompts]
    results: dict[int, Tensor] = {}

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = native.generate(input_ids=prompts[index], num_beams=2, **GREEDY)

    workers = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(4))
    assert pages(native) == 0


def test_pages_are_given_back_over_many_calls() -> None:
    _, native = pair("gemma3")
    engine, _ = engine_of(native)
    assert engine is not None
    sizes = []
    for call in range(30):
        generated(native, num_beams=1 + call % 3, **padded())
        with pytest.raises(ZeroDivisionError):
            generated(
                native, input_ids=prompt(), logits_processor=LogitsProcessorList([lambda ids, scores: 1 // 0])
            )
        gc.collect()
        assert pages(native) == 0
        sizes.append(sum(len(pool.pages) for pool in engine._cache.pools))
    assert sizes[-1] == sizes[2]
