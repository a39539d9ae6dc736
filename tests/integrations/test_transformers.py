"""Saving and loading compressed models with transformers."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Phi3Config,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

try:
    from transformers import GgufConfig
except ImportError:  # an earlier 5.x
    GgufConfig = None

from oats import ConfigError, FormatError, OatsConfig, SparseLowRankLinear, compress_, quantize_
from oats.checkpoint.stored_model import read_stored_model
from oats.integrations.transformers import OatsQuantizationConfig, OatsQuantizer, attach
from oats.nn.fusion import fuse_
from tests.rounding import assert_equal_sums, terms_of

SETTINGS = OatsConfig(iterations=2)
IDS = torch.tensor([[1, 2, 3, 4, 5]])
LAYER = "model.layers.1.mlp.down_proj"
BIASED = "model.layers.1.self_attn.q_proj"


def replace_layers(model: PreTrainedModel, within: str = "layers.") -> PreTrainedModel:
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and within in name:
            moments = torch.ones(linear.in_features)
            model.set_submodule(name, SparseLowRankLinear.from_linear(linear, moments, SETTINGS))
    fuse_(model)
    return model


def compress(model: PreTrainedModel) -> PreTrainedModel:
    attach(replace_layers(model), SETTINGS)
    return model


def dense_llama(
    kind: type[PreTrainedModel] = LlamaForCausalLM, dtype: torch.dtype = torch.float32, tied: bool = False
) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=92,  # not a multiple of 8: the mask of down_proj has padding bits
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = kind._from_config(config, dtype=dtype)  # unlike .to(dtype), keeps the rotary buffers in fp32
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.eval()


def llama(kind: type[PreTrainedModel] = LlamaForCausalLM, **options: Any) -> PreTrainedModel:
    return compress(dense_llama(kind, **options))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output = model(IDS)
    return output[0]


def tokens(model: PreTrainedModel) -> Tensor:
    return model.generate(IDS, max_new_tokens=12, do_sample=False)


def load(directory: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    model, info = kind.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(directory)
    return directory


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# Round trips.


def test_fresh_process_without_import_oats_gives_the_same_tokens(tmp_path: Path) -> None:
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = llama(dtype=dtype)
        model.save_pretrained(tmp_path / name)
        torch.save((logits(model), tokens(model)), tmp_path / name / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    logits, tokens = torch.load(f"{directory}/expected.pt")
    ids = tokens[:, :5]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), tokens)
    print(sum(type(m).__name__ == "SparseLowRankLinear" for m in model.modules()), model.dtype)
"""
    result = python(code, str(tmp_path / "fp32"), str(tmp_path / "bf16"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "14 torch.float32\n14 torch.bfloat16\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compress_then_save(tmp_path: Path, dtype: torch.dtype) -> None:
    dense_llama(dtype=dtype).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    compress_(model, torch.arange(36).view(3, 12), SETTINGS)
    model.save_pretrained(tmp_path / "compressed")
    loaded = load(tmp_path / "compressed")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(tokens(loaded), tokens(model))


def test_raises_where_oats_is_not_installed(saved: Path) -> None:
    code = """
import sys
sys.modules["oats"] = None  # as if it were not installed
from transformers import AutoModel, AutoModelForCausalLM
for kind in (AutoModelForCausalLM, AutoModel):
    try:
        kind.from_pretrained(sys.argv[1])
    except RuntimeError as error:
        print("raised", file=sys.stdout)
"""
    result = python(code, str(saved), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout == "raised\nraised\n", result.stderr
    assert "Unknown quantization type, got oats" in result.stderr
    assert "MISMATCH" in result.stderr


def test_config_on_disk(saved: Path) -> None:
    config = quantization_config(saved)
    layers = config.pop("layers")
    assert config == {"quant_method": "oats", "format_version": 1, **SETTINGS.to_dict()}
    assert len(layers) == 14
    assert layers[LAYER] == {
        "rank": 4,
        "nnz": load_file(saved / "model.safetensors")[f"{LAYER}.values"].numel(),
    }
    loaded = load(saved).config.quantization_config
    assert isinstance(loaded, OatsQuantizationConfig)
    assert loaded.settings == SETTINGS
    assert dict(loaded) == loaded.to_dict() == quantization_config(saved)


def test_saving_a_loaded_model_writes_the_same_files(saved: Path, tmp_path: Path) -> None:
    load(saved).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_loaded_layers_are_as_before_saving(saved: Path) -> None:
    before, after = llama(), load(saved)
    assert [(n, p.requires_grad) for n, p in before.named_parameters()] == [
        (n, p.requires_grad) for n, p in after.named_parameters()
    ]
    assert all(m.packed is not None for m in after.modules() if isinstance(m, SparseLowRankLinear))
    assert torch.equal(tokens(after), tokens(before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_argument_casts_the_values(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    load(saved, dtype=dtype).save_pretrained(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == (torch.uint8 if name.endswith(".mask") or tensor.numel() == 1 else dtype), name
    model = load(tmp_path)
    assert model.dtype == dtype
    torch.testing.assert_close(logits(model).float(), logits(load(saved)), atol=0.05, rtol=0.05)


def test_tied_and_sharded(tmp_path: Path) -> None:
    model = llama(tied=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(tokens(loaded), tokens(model))


@pytest.mark.parametrize("shared_when_loaded", [True, False])
def test_a_layer_under_two_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_when_loaded: bool
) -> None:
    original = LlamaForCausalLM.__init__

    def share(model: PreTrainedModel) -> None:
        first, second = (layer.self_attn for layer in model.model.layers)
        second.q_proj = first.q_proj
        first.v_proj = first.k_proj

    def init(self: PreTrainedModel, config: LlamaConfig) -> None:
        original(self, config)
        share(self)

    model = dense_llama()
    share(model)
    compress_(model, torch.arange(36).view(3, 12), SETTINGS)
    model.save_pretrained(tmp_path / "saved")
    assert len(quantization_config(tmp_path / "saved")["layers"]) == 14
    if shared_when_loaded:
        monkeypatch.setattr(LlamaForCausalLM, "__init__", init)
    loaded = load(tmp_path / "saved")
    first, second = (layer.self_attn for layer in loaded.model.layers)
    assert (second.q_proj is first.q_proj and first.v_proj is first.k_proj) == shared_when_loaded
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    loaded.dequantize()
    assert (loaded.model.layers[1].self_attn.q_proj is first.q_proj) == shared_when_loaded
    assert_equal_sums(logits(loaded), logits(model), terms_of(model))


def phi3(kind: Any = AutoModelForCausalLM, **sizes: Any) -> PreTrainedModel:
    config = Phi3Config(
        vocab_size=40, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    return kind.from_config(config).eval()


def gpt2(kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    config = GPT2Config(vocab_size=40, n_embd=48, n_layer=2, n_head=4, n_positions=64, eos_token_id=None)
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("make", "layers"), [(phi3, 14), (gpt2, 8)], ids=["phi3", "gpt2"])
def test_projections_that_are_fused_or_transposed(tmp_path: Path, make: Any, layers: int) -> None:
    model = make()
    compress_(model, torch.arange(36).view(3, 12), SETTINGS, split=("qkv_proj", "gate_up_proj"))
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(tokens(loaded), tokens(model))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()

    stored = read_stored_model(tmp_path / "saved")
    assert len(stored.layers) == layers
    compressed = {layer.name for layer in stored.layers}
    dense = make()
    elsewhere = [
        p.numel()
        for name, p in dense.named_parameters()
        if not compressed & {name.removesuffix(".weight") + part for part in ("", ".q", ".gate")}
    ]
    assert stored.parameters_elsewhere == sum(elsewhere)

    bare, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(bare), logits(model.base_model))
    assert_unreadable_without_the_package(tmp_path / "saved")

    loaded.dequantize()
    kinds = [[(name, type(m)) for name, m in m.named_modules()] for m in (loaded, dense)]
    assert kinds[0] == kinds[1]
    assert_equal_sums(logits(loaded), logits(model), terms_of(model))
    loaded.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense")), logits(loaded))


def test_a_fused_projection_without_one_of_its_parts(tmp_path: Path) -> None:
    model = phi3()
    compress_(model, torch.arange(36).view(3, 12), SETTINGS)
    model.save_pretrained(tmp_path)
    name = "model.layers.1.self_attn.qkv_proj"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["layers"][f"{name}.k"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=rf"the parts \['q', 'v'\] of '{name}', expected \['k', 'q', 'v'\]"):
        load(tmp_path)


@pytest.mark.parametrize(("values", "low_rank"), [("int8", "int8"), ("int4", "int8"), ("int4", "exact")])
def test_codes(tmp_path: Path, values: Any, low_rank: Any) -> None:
    model = llama(dtype=torch.bfloat16)
    exact = tmp_path / "exact"
    model.save_pretrained(exact)
    quantize_(model, values, low_rank, 64)
    before = logits(model)
    model.save_pretrained(tmp_path / "codes")
    config = quantization_config(tmp_path / "codes")
    assert config["format_version"] == 2 and quantization_config(exact)["format_version"] == 1
    assert (
        config["layers"][f"{LAYER}"] | {"values": values, "low_rank": low_rank, "scale_columns": 64}
        == (config["layers"][f"{LAYER}"])
    )
    assert torch.equal(logits(load(tmp_path / "codes")), before)
    in_fp32 = load(tmp_path / "codes", dtype=torch.float32)
    assert in_fp32.model.layers[0].mlp.up_proj.storage.values == values
    torch.testing.assert_close(logits(in_fp32), before.float(), rtol=0.1, atol=0.1)
    # A scale of another size is found before anything is read.
    path = damaged(
        tmp_path / "codes",
        tmp_path,
        set_tensor(f"{LAYER}.values_scale", lambda t: t[:, :1].clone()),
    )
    with pytest.raises(FormatError, match=r"values_scale has shape \(64, 1\), but config.json says"):
        load(path)


def test_base_model_prefix_in_both_directions(saved: Path, tmp_path: Path) -> None:
    whole = load(saved)
    bare, info = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not info["missing_keys"]
    assert torch.equal(logits(bare), logits(whole.model))

    base = llama(LlamaModel)
    base.save_pretrained(tmp_path / "base")
    assert "layers.0.mlp.up_proj" in quantization_config(tmp_path / "base")["layers"]
    headed, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert not info["unexpected_keys"]
    assert torch.equal(logits(headed.model), logits(base))

    whole.model.save_pretrained(tmp_path / "part")
    assert torch.equal(logits(load(tmp_path / "part", AutoModel)), logits(whole.model))


def test_the_layer_table_is_current_when_saved(tmp_path: Path) -> None:
    model = llama()
    model.set_submodule(LAYER, nn.Linear(92, 64, bias=False))
    model.save_pretrained(tmp_path)
    assert LAYER not in quantization_config(tmp_path)["layers"]
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_attach_before_the_first_layer_is_replaced(tmp_path: Path) -> None:
    model = dense_llama()
    attach(model, SETTINGS)
    replace_layers(model, "layers.0.")
    model.save_pretrained(tmp_path)
    assert len(quantization_config(tmp_path)["layers"]) == 7
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_without_a_compressed_layer_the_model_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    model = dense_llama(dtype=torch.float16)
    attach(model, SETTINGS)
    model.save_pretrained(tmp_path / "none")
    assert "quantization_config" not in json.loads((tmp_path / "none" / "config.json").read_text())
    assert load(tmp_path / "none").dtype == torch.float16

    model = dense_llama()
    attach(model, SETTINGS)
    model.save_pretrained(tmp_path / "none")
    assert torch.equal(logits(load(tmp_path / "none")), logits(model))
    replace_layers(model).save_pretrained(tmp_path / "all")
    assert torch.equal(logits(load(tmp_path / "all")), logits(model))


@pytest.mark.parametrize("attach_first", [False, True])
def test_a_base_model_is_compressed_and_the_whole_is_saved(tmp_path: Path, attach_first: bool) -> None:
    model = dense_llama()
    if attach_first:
        attach(model.model, SETTINGS)
        replace_layers(model.model)
    else:
        compress(model.model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    stored = read_stored_model(tmp_path)
    assert len(stored.layers) == 14 and stored.layers[0].name.startswith("model.layers.0.")
    assert_unreadable_without_the_package(tmp_path)


def test_layers_replaced_by_hand_do_not_become_random_ones(tmp_path: Path) -> None:
    replace_layers(dense_llama()).save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def assert_unreadable_without_the_package(directory: Path) -> None:
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    result = python(code, str(directory), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "RuntimeError" in result.stderr and "ignore_mismatched_sizes" in result.stderr, result.stderr


def test_a_copy_of_a_model_is_saved_with_its_own_layers(tmp_path: Path) -> None:
    model = llama()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(copied.config.quantization_config.layers) == 14
        copied.set_submodule(LAYER, nn.Linear(92, 64, bias=False))
        copied.save_pretrained(tmp_path)
        assert len(quantization_config(tmp_path)["layers"]) == 13
        assert torch.equal(logits(load(tmp_path)), logits(copied))
    assert len(model.config.to_dict()["quantization_config"]["layers"]) == 14


@pytest.mark.parametrize("ignored", [None, ["a"], {"a"}])
def test_the_names_to_ignore_keep_their_type(saved: Path, ignored: Any) -> None:
    # transformers 5.0 adds lists to it, later releases sets.
    model = dense_llama().to("meta")
    model._keys_to_ignore_on_load_unexpected = ignored
    config = AutoConfig.from_pretrained(saved).quantization_config
    quantizer = OatsQuantizer(OatsQuantizationConfig.from_dict(config), pre_quantized=True)
    quantizer._process_model_before_weight_loading(model, [str(saved / "model.safetensors")])
    assert type(model._keys_to_ignore_on_load_unexpected) is (set if ignored == {"a"} else list)
    assert ("a" in model._keys_to_ignore_on_load_unexpected) == (ignored is not None)


@pytest.mark.skipif(GgufConfig is None, reason="this transformers has no quantizer for GGUF")
def test_attach_replaces_the_quantizer_of_a_gguf_file(tmp_path: Path) -> None:
    model = dense_llama()
    model.config.quantization_config = GgufConfig(gguf_file="model.gguf")
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config)
    compress(model).save_pretrained(tmp_path)
    assert quantization_config(tmp_path)["quant_method"] == "oats"
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_dense_weights_are_never_built(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = 32 * 64  # k_proj
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point() and result.device.type != "meta":
                made.append((str(func), tuple(result.shape)))
            return result

    # In the main thread, where the mode sees it.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    dense_shapes = {(64, 64), (32, 64), (92, 64), (64, 92)}
    with Watch():
        AutoModelForCausalLM.from_pretrained(saved)
    assert made
    others = {(40, 64)}  # embeddings and head
    assert not [entry for entry in made if entry[1] in dense_shapes]
    assert not [
        entry for entry in made if entry[1] not in others and torch.Size(entry[1]).numel() > 3 * smallest // 2
    ]


def test_dequantize_gives_linear_layers(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(module, SparseLowRankLinear) for module in model.modules())
    assert_equal_sums(logits(model), expected, terms_of(model))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_gradients_reach_the_input_and_the_graph_compiles(saved: Path) -> None:
    model = load(saved)
    embeddings = torch.randn(1, 3, 64, requires_grad=True)
    model(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
    hidden = torch.randn(1, 3, 64)
    assert torch.equal(compiled(hidden), model.model.layers[0].mlp(hidden))


# Arguments that are refused.


def test_float16_is_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be loaded as torch.float16; pass dtype=torch.bfloat16"):
        load(saved, dtype=torch.float16)


def test_other_devices_are_refused(saved: Path) -> None:
    for device_map in ({"": "cuda:0"}, {"model": "cpu", "lm_head": "disk"}, "cuda"):
        with pytest.raises(ConfigError, match=r"on (cuda:0|disk|cuda); OATS models are loaded on the CPU"):
            load(saved, device_map=device_map)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        assert load(saved, device_map=device_map).device.type == "cpu"


def test_a_state_dict_is_refused(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    with pytest.raises(ConfigError, match=r"loaded from safetensors files; .* was given a state dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=load(saved).state_dict())


# Checkpoints that disagree with themselves.

Tensors = dict[str, Tensor]


def damaged(saved: Path, directory: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    tensors = load_file(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def set_tensor(key: str, new: Callable[[Tensor], Tensor]) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors[key] = new(tensors[key]).contiguous()

    return change


def drop(key: str) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: tensors.__delitem__(key)


def set_config(**values: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config.update(values)


def set_layer(name: str, value: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config["layers"].update({name: value})


def flip(mask: Tensor, column: int, bit: int) -> Tensor:
    mask[0, column] ^= bit
    return mask


FILE = r"model\.safetensors: "
DAMAGE: dict[str, tuple[Callable[[Tensors, dict[str, Any]], None], str]] = {
    "population": (
        set_tensor(f"{LAYER}.mask", lambda mask: flip(mask, 0, 1)),
        rf"{FILE}{LAYER}: mask keeps \d+ values but \d+ are stored",
    ),
    "padding": (
        set_tensor(f"{LAYER}.mask", lambda mask: flip(mask, 11, 128)),
        rf"{FILE}{LAYER}: mask has a bit set past its last input",
    ),
    **{
        f"no {tensor}": (drop(f"{LAYER}.{tensor}"), rf"{FILE}{LAYER}: {tensor} is missing")
        for tensor in ("mask", "values", "low_rank_u", "low_rank_v")
    },
    "no bias": (drop(f"{BIASED}.bias"), rf"{FILE}{BIASED}: bias is missing"),
    "fp16 values": (
        set_tensor(f"{LAYER}.values", lambda t: t.half()),
        rf"{FILE}{LAYER}: values is torch.float16, expected torch.float32 or torch.bfloat16",
    ),
    "integer bias": (
        set_tensor(f"{BIASED}.bias", lambda t: t.int()),
        rf"{FILE}{BIASED}: bias is I32, expected torch.float32",
    ),
    "bf16 factor": (
        set_tensor(f"{LAYER}.low_rank_u", lambda t: t.bfloat16()),
        rf"{FILE}{LAYER}: low_rank_u is torch.bfloat16, expected torch.float32",
    ),
    "bool mask": (
        set_tensor(f"{LAYER}.mask", lambda t: t.bool()),
        rf"{FILE}{LAYER}: mask is BOOL, expected torch.uint8",
    ),
    "short values": (
        set_tensor(f"{LAYER}.values", lambda t: t[:-1]),
        rf"{FILE}{LAYER}: values has shape \(\d+,\), but config.json says \(\d+,\)",
    ),
    "narrow mask": (
        set_tensor(f"{LAYER}.mask", lambda t: t[:, :-1]),
        rf"{FILE}{LAYER}: mask has shape \(64, 11\), but config.json says \(64, 12\)",
    ),
    "transposed factor": (
        set_tensor(f"{LAYER}.low_rank_v", lambda t: t.T),
        rf"{FILE}{LAYER}: low_rank_v has shape \(92, 4\), but config.json says \(4, 92\)",
    ),
    "newer version": (
        set_config(format_version=5),
        r"format_version is 5, but .* versions 1 to 4 only; .*pip install -U",
    ),
    "no version": (lambda tensors, config: config.pop("format_version"), "format_version is None"),
    "unknown key": (set_config(blocks=4), r"unknown keys \['blocks'\]"),
    "missing key": (lambda tensors, config: config.pop("seed"), r"missing keys \['seed'\]"),
    "bad setting": (set_config(compression=2), r"compression must be in \[0, 1\), got 2"),
    "bad table": (set_config(layers=[LAYER]), r"layers is \['model"),
    "bad sizes": (set_layer(LAYER, {"rank": -1, "nnz": 3}), rf"layers\['{LAYER}'\] is .*whole number"),
    "absurd rank": (
        set_layer(LAYER, {"rank": 2**62, "nnz": 1}),
        rf"layers\['{LAYER}'\] has rank {2**62} and 1 non-zeros, more than a 64 x 92 layer can have",
    ),
    "absurd number of non-zeros": (
        set_layer(LAYER, {"rank": 1, "nnz": 64 * 92 + 1}),
        rf"layers\['{LAYER}'\] has rank 1 and 5889 non-zeros, more than a 64 x 92 layer can have",
    ),
    "absurd setting": (set_config(rank_ratio=10**400), "quantization_config: int too large"),
    "other rank": (
        lambda tensors, config: config["layers"][LAYER].update(rank=3),
        rf"{LAYER}: low_rank_u has shape \(64, 4\), but config.json says \(64, 3\)",
    ),
    "extra layer": (
        set_layer("model.layers.7.mlp.up_proj", {"rank": 1, "nnz": 1}),
        "names 'model.layers.7.mlp.up_proj', which is not in LlamaForCausalLM",
    ),
    "not a linear layer": (
        set_layer("model.layers.0.mlp", {"rank": 1, "nnz": 1}),
        "names 'model.layers.0.mlp', which is a LlamaMLP",
    ),
    "unlisted layer": (
        lambda tensors, config: config["layers"].pop(LAYER),
        rf"{FILE}{LAYER}.low_rank_u belongs to a layer that config.json .* does not list",
    ),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoint(
    saved: Path, tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        load(damaged(saved, tmp_path, change))


@pytest.mark.parametrize("length", [-100, 1000, 4, 0])
def test_truncated_file(saved: Path, tmp_path: Path, length: int) -> None:
    directory = damaged(saved, tmp_path, lambda tensors, config: None)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(
        FormatError, match=r"model\.safetensors: cannot be read .* truncated or damaged, download"
    ):
        load(directory)
