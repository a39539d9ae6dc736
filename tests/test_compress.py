from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig, OPTConfig

import oats
from oats.calibrate import BlockRunner, as_batches, second_moments
from oats.errors import CalibrationError, ConfigError, UnsupportedModelError, WeightError
from oats.models import find_blocks
from oats.nn import SparseLowRankLinear

SMALL = dict(vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes}))


TOKENS = torch.randint(0, 61, (6, 24), generator=torch.Generator().manual_seed(1))


def test_every_linear_in_the_blocks_and_nothing_else() -> None:
    model = llama()
    seen = []
    report = oats.compress_(model, TOKENS, oats.OatsConfig(), progress=lambda *a: seen.append(a))
    kinds = {
        name: type(m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, SparseLowRankLinear))
    }
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {SparseLowRankLinear} and len(kinds) == 21
    assert [layer.name for layer in report.layers] == list(kinds)
    assert [a[0] for a in seen] == list(range(1, 22)) and {a[1] for a in seen} == {21}
    assert 0.48 < 1 - report.parameters_after / report.parameters_before < 0.54
    assert model(TOKENS).logits.isfinite().all()


def test_moments_come_from_the_compressed_blocks_before() -> None:
    model = llama()
    blocks = model.model.layers
    runner = BlockRunner(model, list(blocks), as_batches(model, TOKENS))
    config = oats.OatsConfig(compression=0.6)
    name = "model.layers.{}.mlp.down_proj"
    model.config.use_cache = False
    for index in range(2):
        linear = model.get_submodule(name.format(index))
        inputs = []
        handle = linear.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].detach())
        )
        with torch.no_grad():
            model(TOKENS)  # the whole model as it now is: independent of the runner
        handle.remove()
        expected = inputs[0].reshape(-1, 80).double().square().sum(0)
        with torch.no_grad():
            moments = second_moments(runner, index, {name.format(index): linear})
            torch.testing.assert_close(moments[name.format(index)].double(), expected, rtol=1e-4, atol=0)
            layer = SparseLowRankLinear.from_linear(linear, moments[name.format(index)], config)
            blocks[index].mlp.down_proj = layer
            runner.advance(index)


def test_attention_mask_excludes_tokens() -> None:
    model = llama()
    mask = torch.ones_like(TOKENS)
    mask[:, 20:] = 0
    garbage = TOKENS.clone()
    garbage[:, 20:] = 7
    results = []
    for ids in (TOKENS, garbage):
        runner = BlockRunner(
            model, list(model.model.layers), as_batches(model, [{"input_ids": ids, "attention_mask": mask}])
        )
        linear = model.model.layers[0].self_attn.q_proj
        with torch.no_grad():
            results.append(second_moments(runner, 0, {"q": linear})["q"])
    torch.testing.assert_close(*results)


def test_only_one_block_of_hidden_states_is_held() -> None:
    model = llama(num_hidden_layers=4)
    alive: list[int] = []
    references: list[weakref.ref] = []

    def note(_, __, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        references.append(weakref.ref(hidden))

    handles = [block.register_forward_hook(note) for block in model.model.layers]
    for block in model.model.layers:
        original = block.forward

        def forward(*args, original=original, **kwargs):
            output = original(*args, **kwargs)
            references.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
            return output

        block.forward = forward

    def progress(*_) -> None:
        alive.append(sum(r() is not None for r in references))

    oats.compress_(model, list(TOKENS.split(2)), progress=progress)
    for handle in handles:
        handle.remove()
    assert max(alive) <= 3  # one tensor a batch


@pytest.mark.parametrize(
    "model",
    [
        lambda: AutoModel.from_config(LlamaConfig(**SMALL, num_key_value_heads=2)),
        lambda: AutoModel.from_config(BertConfig(**SMALL)),
        lambda: AutoModelForCausalLM.from_config(
            OPTConfig(
                vocab_size=61,
                hidden_size=48,
                ffn_dim=80,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=48,
            )
        ),
    ],
    ids=["llama base", "bert", "opt"],
)
def test_architectures(model) -> None:
    model = model()
    report = oats.compress_(model, TOKENS)
    assert len(report.layers) >= 12 and not report.left_dense
    assert next(iter(model(TOKENS).values())).isfinite().all()


def test_plain_torch_module_by_path() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(10, 32)
            self.body = nn.ModuleDict(
                {"stack": nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(2))}
            )

        def forward(self, x):
            x = self.stem(x)
            for block in self.body["stack"]:
                x = block(x)
            return x

    model = Net()
    with pytest.raises(UnsupportedModelError, match=r"model\.layers.*it has lists at body\.stack.*blocks="):
        oats.compress_(model, [torch.randn(64, 10)])
    report = oats.compress_(model, [torch.randn(64, 10)], blocks="body.stack")
    assert [layer.name for layer in report.layers] == ["body.stack.0.0", "body.stack.1.0"]


def test_what_is_not_compressed_is_said() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Conv1D is not an nn.Linear"):
        oats.compress_(
            AutoModelForCausalLM.from_config(GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4)),
            TOKENS,
        )
    model = llama()
    model.model.layers[1].unused = nn.Linear(48, 48)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.unused \(it did not run"):
        report = oats.compress_(model, TOKENS, oats.OatsConfig(skip=("*.down_proj",)))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert len(report.left_dense) == 4


def test_bad_calibration() -> None:
    model = llama()
    for calibration, message in [
        (torch.empty(0, 8, dtype=torch.long), "empty"),
        ([], "empty"),
        (TOKENS[0], "unsqueeze"),
        (TOKENS[:1, :8], "8 tokens, at least 16"),
        (TOKENS + 50, "vocabulary has 61"),
        (TOKENS.float(), "float32"),
        ("some text", "tokenizer"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            oats.compress_(model, calibration)
    assert not any(isinstance(m, SparseLowRankLinear) for m in model.modules())


def test_bad_weight_is_named_before_anything_changes() -> None:
    model = llama()
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"model\.layers\.2\.mlp\.up_proj.*NaN"):
        oats.compress_(model, TOKENS)
    with pytest.raises(ConfigError, match="2:4"):
        oats.compress_(llama(), TOKENS, oats.OatsConfig(compression=0.7, pattern="2:4"))
    assert not any(isinstance(m, SparseLowRankLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("model_dtype", "config_dtype", "result"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.bfloat16),
        (torch.float32, "bf16", torch.bfloat16),
        (torch.bfloat16, "fp32", torch.float32),
    ],
    ids=str,
)
def test_dtypes(model_dtype, config_dtype, result) -> None:
    model = llama(num_hidden_layers=1).to(model_dtype)
    oats.compress_(model, TOKENS, oats.OatsConfig(dtype=config_dtype))
    assert model.model.layers[0].mlp.up_proj.dtype == result == model(TOKENS).logits.dtype


def test_training_mode_and_cache_setting_are_restored() -> None:
    model = llama(num_hidden_layers=1).train()
    oats.compress_(model, TOKENS)
    assert model.training and model.config.use_cache is True


def test_compile_a_compressed_model() -> None:
    model = llama(num_hidden_layers=1).eval()
    oats.compress_(model, TOKENS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits
        )


def test_find_blocks_refuses_a_path_to_something_else() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of modules at 'lm_head'"):
        find_blocks(llama(), "lm_head")
