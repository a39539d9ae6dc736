"""A compressed model through everything that writes, copies, converts or compiles models."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    PreTrainedModel,
    pipeline,
)

import oats
from oats.errors import CalibrationError, ConfigError
from oats.integrations.transformers import OatsQuantizationConfig
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.compiler import needs_compiler
from tests.fake_hub import fake_hub
from tests.rounding import assert_equal_sums, terms_of
from tests.tiny import TEXT, byte_tokenizer, compressed_llama, llama, save_compressed, save_dense

IDS = torch.tensor([[0, 72, 101, 108, 108, 111]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_compressed(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def model(saved: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def layers(model: nn.Module) -> list[SparseLowRankLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLowRankLinear)]


# Copies and files.


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_whole_model_is_copied(model: PreTrainedModel, how: str) -> None:
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        assert len(file.getvalue()) < 1.2 * sum(t.nbytes for t in model.state_dict().values()) + 200_000
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other), logits(model))
    other.get_input_embeddings().weight.data.zero_()
    assert logits(model).abs().sum() > 0 and not torch.equal(logits(other), logits(model))


def test_state_dict_both_ways(model: PreTrainedModel) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = compressed_llama(weights=1)[0]
    assert not torch.equal(logits(other), logits(model))
    assert not any(other.load_state_dict(state))
    assert torch.equal(logits(other), logits(model))


def test_a_state_dict_of_the_other_kind_is_an_error_that_names_the_layers(model: PreTrainedModel) -> None:
    dense = llama()
    with pytest.raises(RuntimeError, match=r"Missing key.*mlp\.up_proj\.mask"):
        model.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.self_attn\.q_proj\.weight"):
        dense.load_state_dict(model.state_dict())


# Conversions.


def test_to_another_dtype_and_back(model: PreTrainedModel) -> None:
    before = logits(model)
    model.to(torch.bfloat16)
    assert {layer.dtype for layer in layers(model)} == {torch.bfloat16} == {logits(model).dtype}
    torch.testing.assert_close(logits(model).float(), before, atol=0.05, rtol=0.05)
    model.to(torch.float32)
    torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)


def test_half_precision_is_refused_and_the_model_works_on(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"cannot be torch.float16; choose torch.bfloat16 or torch.float32"):
        model.to(torch.float16)
    # What was converted before the first compressed layer comes back.
    torch.testing.assert_close(
        logits(model.to(torch.float32)), logits(compressed_llama()[0]), atol=5e-3, rtol=5e-3
    )
    with pytest.raises(ValueError, match=r"\.half\(\).* is not supported for quantized model"):
        model.half()


# Compilers.


def test_export_is_saved_and_loaded(model: PreTrainedModel) -> None:
    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    length = torch.export.Dim("length", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), dynamic_shapes=({1: length},), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for ids in (IDS, torch.arange(17)[None]):
        assert_equal_sums(loaded(ids), logits(model, ids), terms_of(model))


def test_generate_with_a_static_cache_and_the_compiler(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    compiling = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend="aot_eager")
    compiling._compile_all_devices = True  # transformers compiles on GPUs by itself
    torch._dynamo.utils.counters.clear()
    static = model.generate(IDS, cache_implementation="static", compile_config=compiling, **options)
    assert torch.equal(static, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@needs_compiler
def test_generate_with_a_static_cache_and_compiled_code(model: PreTrainedModel) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **options), expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


# transformers.


def test_pipeline(saved: Path) -> None:
    generate = pipeline("text-generation", model=str(saved), device_map="cpu", dtype=torch.bfloat16)
    assert {layer.dtype for layer in layers(generate.model)} == {torch.bfloat16}
    (result,) = generate("The quick", max_new_tokens=4, do_sample=False)
    assert result["generated_text"].startswith("The quick") and len(result["generated_text"]) > len(
        "The quick"
    )


def test_push_to_hub_and_load_from_there(saved: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.push_to_hub("me/small", max_shard_size="60KB")
AutoTokenizer.from_pretrained(sys.argv[1]).push_to_hub("me/small")
again = AutoModelForCausalLM.from_pretrained("me/small")
ids = AutoTokenizer.from_pretrained("me/small")("The quick", return_tensors="pt").input_ids
assert torch.equal(again(ids).logits, model(ids).logits)
print(sum(type(m).__name__ == "SparseLowRankLinear" for m in again.modules()))
"""
    with fake_hub() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_fake",
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
        result = subprocess.run(
            [sys.executable, "-c", code, saved], env=environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        files = hub.files["me/small"]
    assert result.stdout == "14\n"
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2 and {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(files)


# Compressing while loading.


def test_a_dense_model_is_compressed_while_it_is_loaded(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    settings = oats.OatsConfig(iterations=3, compression=0.4)
    config = OatsQuantizationConfig(settings=settings, calibration=text, samples=4, length=32)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert len(layers(model)) == 14 and model.config.quantization_config.settings == settings

    ids = byte_tokenizer()(TEXT, add_special_tokens=False).input_ids
    from oats.compression.tokenization import calibration_windows

    by_hand = AutoModelForCausalLM.from_pretrained(dense)
    oats.compress_(by_hand, calibration_windows(torch.tensor(ids), 4, 32, bos=0), settings)
    assert torch.equal(logits(model), logits(by_hand))

    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    model.dequantize()
    assert not layers(model)


def test_compressing_while_loading_takes_the_built_in_text_and_any_dtype(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        dense,
        quantization_config=oats.OatsConfig(iterations=1, dtype="bf16"),
        dtype=torch.float16,
        device_map="auto",
    )
    assert {layer.dtype for layer in layers(model)} == {torch.bfloat16} == {model.dtype}
    assert logits(model).isfinite().all()


def test_compressing_while_loading_takes_token_ids(dense: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"has no tokenizer .* pass token ids, \(sequences, length\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=oats.OatsConfig(iterations=1))
    config = OatsQuantizationConfig(settings=oats.OatsConfig(iterations=1), calibration=IDS.repeat(2, 4))
    assert len(layers(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))) == 14


def test_a_compressed_model_is_not_compressed_again(saved: Path) -> None:
    with pytest.raises(
        ValueError, match="is quantized with OatsQuantizationConfig but you are passing a OatsConfig"
    ):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=oats.OatsConfig())


def test_loading_what_is_not_for_a_layer_leaves_it_packed_and_still_names_what_is_missing() -> None:
    model = nn.Sequential(
        oats.SparseLowRankLinear.from_linear(nn.Linear(32, 16), torch.ones(32), oats.OatsConfig()),
        nn.Linear(16, 4),
    )
    packed = model[0].packed
    found = model.load_state_dict({"1.bias": torch.ones(4)}, strict=False)
    assert model[0].packed is packed and torch.equal(model[1].bias, torch.ones(4))
    assert set(found.missing_keys) == set(model.state_dict()) - {"1.bias", "0.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.mask"):
        model.load_state_dict({"1.bias": torch.ones(4)})
