"""Every architecture with its published structure, tiny: compressed, saved, loaded in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import nn

import oats
from oats.compression.block_runner import BlockRunner
from oats.compression.statistics import second_moments
from oats.models.experts import split_all_
from oats.models.linear import is_linear
from oats.nn.experts import SplitExperts
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.rounding import assert_equal_sums, terms_of

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
GQA = {**SIZES, "num_key_value_heads": 2}
IMAGES = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


class Architecture(NamedTuple):
    """`layers` are compressed matrices in one block."""

    config: Any
    layers: int
    kind: Any = hf.AutoModelForCausalLM


ARCHITECTURES = {
    "llama2": Architecture(hf.LlamaConfig(**SIZES), 7),
    "llama3": Architecture(hf.LlamaConfig(**GQA, rope_parameters=LLAMA3, tie_word_embeddings=True), 7),
    "phi3": Architecture(hf.Phi3Config(**GQA), 6),
    "qwen2": Architecture(hf.Qwen2Config(**GQA, tie_word_embeddings=True), 7),
    "qwen3": Architecture(hf.Qwen3Config(**GQA, head_dim=16), 7),
    "gemma2": Architecture(hf.Gemma2Config(**GQA, head_dim=16, sliding_window=8), 7),
    "gemma3": Architecture(
        hf.Gemma3TextConfig(
            **GQA, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
        7,
    ),
    "mistral": Architecture(hf.MistralConfig(**GQA, sliding_window=8), 7),
    "opt": Architecture(
        hf.OPTConfig(
            vocab_size=61,
            hidden_size=48,
            ffn_dim=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=48,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        6,
    ),
    "gpt2": Architecture(
        hf.GPT2Config(
            vocab_size=61,
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        4,
    ),
    "mixtral": Architecture(hf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2), 4 + 3 * 4),
    "qwen2-moe": Architecture(
        hf.Qwen2MoeConfig(
            **GQA,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=40,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        4 + 4 + 3 * 4,
    ),
    "qwen3-moe": Architecture(
        hf.Qwen3MoeConfig(**GQA, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
        4 + 3 * 4,
    ),
    "bert": Architecture(hf.BertConfig(**{**SIZES, "is_decoder": False}), 6, hf.AutoModel),
    "vit": Architecture(hf.ViTConfig(**IMAGES, num_labels=10), 6, hf.AutoModelForImageClassification),
    "dinov2": Architecture(hf.Dinov2Config(**IMAGES, mlp_ratio=2), 6, hf.AutoModel),
    "dinov2-giant": Architecture(
        hf.Dinov2Config(**IMAGES, use_swiglu_ffn=True, mlp_ratio=2), 7, hf.AutoModel
    ),
}
HAS_TIMM = find_spec("timm") is not None
if HAS_TIMM:
    sizes = dict(img_size=16, patch_size=4, depth=2, embed_dim=48, num_heads=4)
    ARCHITECTURES["timm-vit"] = Architecture(
        hf.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes, num_labels=10),
        4,
        hf.AutoModelForImageClassification,
    )
CAUSAL = [name for name, each in ARCHITECTURES.items() if each.kind is hf.AutoModelForCausalLM]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = torch.randint(2, 61, (6, 24), generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(2))
# Two prompts of one batch, the second shorter by four tokens.
PROMPTS, MASK = TOKENS[:2, :12].clone(), torch.ones(2, 12, dtype=torch.long)
PROMPTS[1, :4], MASK[1, :4] = 0, 0


def dense(name: str, dtype: torch.dtype = torch.float32) -> Any:
    each = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = each.kind.from_config(each.config, dtype=dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or parameter.dim() == 3:
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": PIXELS.to(model.dtype)}
    return {"input_ids": TOKENS}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Path]]:
    """“architecture dtype” → model, report, and where it is saved with what it gives."""
    made = {}
    for name in ARCHITECTURES:
        for dtype_name, dtype in DTYPES.items():
            model = dense(name, dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # routers stay dense
                report = oats.compress_(model, inputs(model), oats.OatsConfig(iterations=2))
            directory = tmp_path_factory.mktemp(f"{name}-{dtype_name}")
            model.save_pretrained(directory)
            with torch.no_grad():
                expected = inputs(model), model(**inputs(model))[0], generated(model)
            torch.save(expected, directory / "expected.pt")
            made[f"{name} {dtype_name}"] = model, report, directory
    return made


def generated(model: Any) -> torch.Tensor | None:
    """What the model goes on with after a batch of prompts of two lengths, with its cache."""
    if not model.can_generate():
        return None
    return model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def loaded(
    compressed: dict[str, tuple[Any, Any, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What a fresh process, which does not import oats, finds in each directory."""
    code = """
import json, sys, torch, transformers
torch.set_num_threads(1)
found, prompts = {}, torch.load(sys.argv[1])
for line in sys.stdin:
    name, directory, kind = line.strip().split("|")
    model, info = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True)
    inputs, expected, going_on = torch.load(f"{directory}/expected.pt")
    with torch.no_grad():
        output = model(**inputs)[0]
    found[name] = {
        "equal": torch.equal(output, expected),
        "generates": None if going_on is None else torch.equal(going_on, model.generate(
            **prompts, max_new_tokens=8, do_sample=False, pad_token_id=0)),
        "layers": sum(type(m).__name__ == "SparseLowRankLinear" for m in model.modules()),
        "problems": sorted(key for keys in info.values() for key in keys),
        "tied": model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }
print(json.dumps(found))
"""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.pt"
    torch.save({"input_ids": PROMPTS, "attention_mask": MASK}, prompts)
    lines = [
        f"{name}|{directory}|{ARCHITECTURES[name.split()[0]].kind.__name__}"
        for name, (_, _, directory) in compressed.items()
    ]
    result = subprocess.run(
        [sys.executable, "-c", code, str(prompts)], input="\n".join(lines), capture_output=True, text=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed: pip install 'oats-torch[vision]'")
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_timm_without_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    import timm

    def made() -> Any:
        return timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=10).eval().to(dtype)

    model = made()
    report = oats.compress_(model, PIXELS.to(dtype), oats.OatsConfig(iterations=2))
    assert [layer.name for layer in report.layers[:2]] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert len(report.layers) == 8 and not report.left_dense
    assert model(PIXELS.to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_process_gives_the_same_outputs(compressed, loaded, name: str, dtype: str) -> None:
    model, report, _ = compressed[f"{name} {dtype}"]
    found = loaded[f"{name} {dtype}"]
    assert len(report.layers) == 2 * ARCHITECTURES[name].layers == found["layers"]
    assert not [why for why in report.left_dense.values() if "Router" not in why]
    assert found == {
        "equal": True,
        "generates": True if name in CAUSAL else None,
        "layers": found["layers"],
        "problems": [],
        "tied": bool(getattr(model.config, "tie_word_embeddings", False)) and name in CAUSAL,
    }
    assert not any(isinstance(m, nn.Linear) for m in _blocks(model).modules())
    assert model(**inputs(model))[0].isfinite().all()


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # not in the oldest transformers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CAUSAL)
def test_cache_and_padding(compressed, name: str, dtype: str) -> None:
    model, _, _ = compressed[f"{name} {dtype}"]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    batch = generated(model)
    with torch.no_grad():
        start = model(PROMPTS[:1, :8], use_cache=True)
        step = model(PROMPTS[:1, 8:9], past_key_values=start.past_key_values).logits[0, 0].float()
        whole = model(PROMPTS[:1, :9]).logits[0, -1].float()
    # In bf16 every layer rounds what it hands on.
    layers = sum(hasattr(m, "in_features") for m in model.modules())
    terms, computed = (terms_of(model), torch.float32) if dtype == "fp32" else (layers, torch.bfloat16)
    assert_equal_sums(step, whole, terms, computed)
    if dtype == "fp32":
        assert torch.equal(batch, model.generate(PROMPTS, attention_mask=MASK, use_cache=False, **options))
        assert torch.equal(batch[1:, 4:], model.generate(PROMPTS[1:, 4:], **options))
    with torch.no_grad():
        positions = (MASK.cumsum(1) - 1).clamp_min(0)
        extra = {} if name == "opt" else {"position_ids": positions}
        padded = model(PROMPTS, attention_mask=MASK, **extra).logits[1, 4:].float()
        alone = model(PROMPTS[1:, 4:]).logits[0].float()
    assert_equal_sums(padded, alone, terms, computed)


def _blocks(model: Any) -> nn.Module:
    return oats.models.architecture.find_blocks(model)[1]


def test_padding_of_an_encoder(compressed) -> None:
    model, _, _ = compressed["bert fp32"]
    with torch.no_grad():
        mask = MASK.flip(1)
        padded = model(PROMPTS.flip(1), attention_mask=mask)[0][1, :8]
        alone = model(PROMPTS.flip(1)[1:, :8])[0][0]
    assert_equal_sums(padded, alone, terms_of(model))


@pytest.mark.parametrize("name", [*CAUSAL, "bert"])
def test_padding_does_not_count_in_calibration(name: str) -> None:
    """Padded, and with a mask, sequences give the moments that each gives by itself."""
    model = dense(name)
    split_all_(model, lambda _: True)
    lengths = [24, 9, 15, 3]
    mask = torch.tensor([[1] * n + [0] * (24 - n) for n in lengths])
    ids = torch.where(mask == 1, TOKENS[: len(lengths)], 7)
    alone = [{"input_ids": each[None, :n]} for each, n in zip(ids, lengths, strict=True)]
    found = []
    for batches in ([{"input_ids": ids, "attention_mask": mask}], alone):
        path, blocks = oats.models.architecture.find_blocks(model)
        runner = BlockRunner(model, list(blocks), batches)
        with torch.no_grad():
            runner.advance(0)
            linears = {n: m for n, m in blocks[1].named_modules(prefix=path) if is_linear(m)}
            found.append(second_moments(runner, 1, linears))
    padded, expected = found
    assert padded.keys() == expected.keys() and len(padded) >= 4
    for layer, moment in expected.items():
        assert_equal_sums(padded[layer], moment, sum(lengths) + terms_of(model))


def test_an_expert_that_only_padding_reaches_stays_dense() -> None:
    model = dense("mixtral")
    with torch.no_grad():  # the padding, 7, goes to expert 3 first, and everything else to 0 and 1
        embedding, gate = model.get_input_embeddings().weight, model.model.layers[0].mlp.gate.weight
        embedding[:, 1], embedding[7, 0], embedding[7, 1] = 9, 9, 0
        gate.zero_()
        gate[0, 1], gate[1, 1], gate[3, 0] = 2, 1, 2
    ids, mask = TOKENS.clone(), torch.ones_like(TOKENS)
    ids[ids == 7] = 8
    ids[:, 12:], mask[:, 12:] = 7, 0
    with pytest.warns(UserWarning, match="left dense"):
        report = oats.compress_(
            model, {"input_ids": ids, "attention_mask": mask}, oats.OatsConfig(iterations=2)
        )
    compressed = {layer.name for layer in report.layers}
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.{expert}.down"
        assert (name in compressed) == (expert < 2), expert
        assert expert < 2 or "did not run" in report.left_dense[name]


EXPERTS = ("mixtral", "qwen2-moe", "qwen3-moe")


@pytest.mark.parametrize("name", EXPERTS)
def test_split_experts_compute_what_the_fused_ones_do(name: str) -> None:
    from oats.models.experts import is_fused_experts, split_experts
    from oats.nn.experts import fused_weights

    model = dense(name)
    fused = model.model.layers[0].mlp.experts
    assert is_fused_experts(fused) and not is_fused_experts(model.model.layers[0].mlp.gate)
    split = split_experts(fused)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 48, generator=generator)
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(10)])
    weights = torch.rand(10, 2, generator=generator)
    with torch.no_grad():
        assert_equal_sums(split(x, index, weights), fused(x, index, weights), terms_of(split))
    assert split[0].gate.weight.data_ptr() == fused.gate_up_proj.data_ptr()
    for parameter, weight in fused_weights(split).items():
        assert torch.equal(weight, fused.get_parameter(parameter))
    assert [*split.state_dict()] == [*fused.state_dict()]  # none is compressed


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_in_other_walks(tmp_path: Path, name: str, compressed) -> None:
    ids = {"input_ids": TOKENS}
    config = oats.OatsConfig(iterations=2, skip="*.experts.*")
    model = dense(name)
    with pytest.warns(UserWarning, match="Router is not a linear layer"):
        report = oats.compress_(model, ids, config)
    assert not any(isinstance(m, SplitExperts) for m in model.modules())
    assert report.left_dense["model.layers.0.mlp.experts.gate_up_proj"] == "it matches OatsConfig.skip"

    # An expert that no token reaches, and a walk that is interrupted, are saved as what they are.
    model = dense(name)
    model.model.layers[0].mlp.gate.weight.data[3] = 0
    model.model.layers[0].mlp.gate.weight.data[3, 0] = -1e4

    def interrupt(done: int, total: int, layer: str, error: float) -> None:
        if layer.startswith("model.layers.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        oats.compress_(model, ids, oats.OatsConfig(iterations=2), progress=interrupt)
    model.save_pretrained(tmp_path)
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_equal_sums(loaded(TOKENS).logits, model(TOKENS).logits, terms_of(model))
    assert isinstance(loaded.model.layers[0].mlp.experts, SplitExperts)
    assert not isinstance(loaded.model.layers[1].mlp.experts, SplitExperts)

    model, _, directory = compressed[f"{name} fp32"]
    loaded = hf.AutoModelForCausalLM.from_pretrained(directory)
    loaded.dequantize()
    assert not any(isinstance(m, (SparseLowRankLinear, SplitExperts)) for m in loaded.modules())
    with torch.no_grad():
        assert_equal_sums(loaded(TOKENS).logits, model(TOKENS).logits, terms_of(model))
    loaded.save_pretrained(tmp_path / "dense")
    again, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert_equal_sums(again(TOKENS).logits, loaded(TOKENS).logits, terms_of(model))


def test_experts_that_cannot_be_compressed_leave_the_model_as_it_was() -> None:
    model = dense("mixtral")
    with pytest.raises(oats.ConfigError, match="multiple of 7"):
        oats.compress_(model, {"input_ids": TOKENS}, oats.OatsConfig(pattern="3:7"))
    assert not any(isinstance(m, SplitExperts) for m in model.modules())
