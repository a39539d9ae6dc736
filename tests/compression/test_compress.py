from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BatchEncoding,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
)

import oats
from oats.compression.block_runner import BlockRunner
from oats.compression.calibration import as_batches
from oats.compression.statistics import second_moments
from oats.errors import CalibrationError, ConfigError, UnsupportedModelError, WeightError
from oats.models.architecture import find_blocks
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.rounding import assert_equal_sums, terms_of

SMALL = dict(vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4)


def llama(**changes) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes}))


TOKENS = torch.randint(0, 61, (6, 24), generator=torch.Generator().manual_seed(1))


def opt() -> nn.Module:
    sizes = dict(vocab_size=61, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(OPTConfig(**sizes, word_embed_proj_dim=48)).eval()


class Chain(nn.Module):
    """Three blocks, each called by `step(block, x, norm)`."""

    def __init__(self, step=lambda block, x, norm: block(x), block=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = block or (lambda: nn.Sequential(nn.Linear(32, 32), nn.Tanh()))
        self.stem, self.norm, self.head = nn.Linear(10, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        self.layers = nn.ModuleList(make() for _ in range(3))
        self.step = step

    def forward(self, x):
        x = self.stem(x)
        for block in self.layers:
            x = self.step(block, x, self.norm)
        return self.head(x)


ROWS = torch.randn(64, 10, generator=torch.Generator().manual_seed(2))


def is_as_it_was(model: nn.Module) -> bool:
    return (
        not any(isinstance(m, SparseLowRankLinear) for m in model.modules())
        and {p.dtype for p in model.parameters()} == {torch.float32}
        and not getattr(model, "is_quantized", False)
    )


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
            assert_equal_sums(moments[name.format(index)], expected, TOKENS.numel() + terms_of(model))
            layer = SparseLowRankLinear.from_linear(linear, moments[name.format(index)], config)
            blocks[index].mlp.down_proj = layer
            runner.advance(index)


@pytest.mark.parametrize("block_matching", [0, 1])
def test_moments_of_the_dense_model(block_matching) -> None:
    model = llama()
    weights = {name: m.weight.clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    squares, handles = {}, []
    for name in weights:
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: squares.update({name: args[0].detach().square().sum((0, 1))})
            )
        )
    model(TOKENS)
    for handle in handles:
        handle.remove()
    config = oats.OatsConfig(method="wanda", moments="dense", block_matching=block_matching)
    report = oats.compress_(model, TOKENS, config)
    assert len(report.layers) == len(weights) - 1
    for layer in report.layers:
        # |w_ij| ‖x_j‖, the upper half of each row (arXiv 2306.11695, equation 1).
        scores = weights[layer.name].abs() * squares[layer.name].sqrt()
        least = scores.sort(descending=True).values[:, [scores.shape[1] // 2 - 1]]
        kept = model.get_submodule(layer.name).to_dense() != 0
        assert (kept.sum(1) == scores.shape[1] // 2).all(), layer.name
        # Rounding decides between scores this near.
        rounding = (TOKENS.numel() + terms_of(model)) * torch.finfo(scores.dtype).eps
        clear = (scores - least).abs() > rounding * least
        assert clear.float().mean() > 0.9 and torch.equal(kept[clear], (scores > least)[clear]), layer.name


@pytest.mark.parametrize(
    ("model", "name"),
    [(llama, "model.layers.0.self_attn.q_proj"), (opt, "model.decoder.layers.0.fc1")],
    ids=["llama", "flattened by OPT"],
)
def test_attention_mask_excludes_tokens(model, name) -> None:
    model = model()
    linear = model.get_submodule(name)
    mask = torch.ones_like(TOKENS)
    mask[:, 20:] = 0
    garbage = TOKENS.clone()
    garbage[:, 20:] = 7
    results = []
    for ids in (TOKENS, garbage):
        batches = as_batches(model, [{"input_ids": ids, "attention_mask": mask}])
        runner = BlockRunner(model, list(find_blocks(model)[1]), batches)
        with torch.no_grad():
            results.append(second_moments(runner, 0, {"layer": linear})["layer"])
    assert_equal_sums(*results, TOKENS.numel() + terms_of(model))


@pytest.mark.parametrize("left", [0, 15])
def test_masked_tokens_do_not_count(left) -> None:
    mask = torch.zeros_like(TOKENS)
    mask[0, :left] = 1
    with pytest.raises(CalibrationError, match=f"{left} tokens, at least 16"):
        oats.compress_(llama(), {"input_ids": TOKENS, "attention_mask": mask})


def add_in_place(block, x, norm):
    x = block(x)
    x += 1
    return x


@pytest.mark.parametrize(
    "step",
    [
        lambda block, x, norm: norm(block(x)),
        lambda block, x, norm: block(x).double().clone().view(-1, 4, 8).float().reshape(-1, 32),
        lambda block, x, norm: block(x=x) if isinstance(block, Named) else block(x),
        add_in_place,
        lambda block, x, norm: block(x.add_(1)),
    ],
    ids=["norm", "cast, copy and view", "keyword", "in place", "in place before"],
)
def test_what_the_model_does_between_blocks_happens(step) -> None:
    model = Chain(step, Named).eval()
    expected: dict[int, torch.Tensor] = {}
    handles = [
        block.linear.register_forward_pre_hook(
            lambda _, args, i=i: expected.update({i: args[0].square().sum(0)})
        )
        for i, block in enumerate(model.layers)
    ]
    with torch.no_grad():
        model(ROWS)
        for handle in handles:
            handle.remove()
        runner = BlockRunner(model, list(model.layers), as_batches(model, [ROWS]))
        for i, block in enumerate(model.layers):
            moments = second_moments(runner, i, {"": block.linear})[""]
            assert_equal_sums(moments, expected[i], len(ROWS) + terms_of(model))
            runner.advance(i)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return self.linear(x).tanh()


def test_what_a_block_passes_on_beside_its_hidden_states_arrives() -> None:
    """T5's blocks hand a position bias from one to the next."""

    class Pair(Named):
        def forward(self, x):
            x, bias = x if isinstance(x, tuple) else (x, 3.0 + x.mean())
            return super().forward(x + bias), bias

    def step(block, x, norm):
        x = block(x)
        return x if block is not model.layers[2] else x[0]

    model = Chain(step, Pair)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = model.layers[2].linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(ROWS)
        handle.remove()
        runner = BlockRunner(model, list(model.layers), as_batches(model, [ROWS]))
        runner.advance(0)
        runner.advance(1)
        moments = second_moments(runner, 2, {"": model.layers[2].linear})[""]
    assert_equal_sums(moments, seen[0].square().sum(0), len(ROWS) + terms_of(model))


def test_a_residual_stream_outside_the_blocks_is_refused() -> None:
    model = Chain(lambda block, x, norm: x + block(x))
    with pytest.raises(CalibrationError, match=r"block 2 receives what blocks before block 1 returned"):
        oats.compress_(model, [ROWS])
    assert is_as_it_was(model)


def test_overflowing_activations_are_not_taken_for_a_residual_stream() -> None:
    model = Chain(lambda block, x, norm: norm(block(x) * 1e30 * 1e30))
    with pytest.raises(WeightError, match=r"layers\.1\.0: .*second_moment"):
        oats.compress_(model, [ROWS])


def test_blocks_that_run_in_another_order_are_refused() -> None:
    model = Chain(lambda block, x, norm: block(block(x)))
    with pytest.raises(CalibrationError, match=r"runs the blocks \[0, 0\] before block 1"):
        oats.compress_(model, [ROWS])
    assert is_as_it_was(model)


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
        lambda: AutoModel.from_config(GPT2Config(vocab_size=61, n_embd=48, n_layer=3, n_head=4)),
        opt,
    ],
    ids=["llama base", "bert", "gpt2", "opt"],
)
def test_architectures(model) -> None:
    model = model()
    report = oats.compress_(model, TOKENS, oats.OatsConfig(iterations=2))
    assert len(report.layers) >= 12 and not report.left_dense
    assert next(iter(model(TOKENS).values())).isfinite().all()


def phi3() -> nn.Module:
    torch.manual_seed(0)
    config = Phi3Config(**{**SMALL, "num_hidden_layers": 2}, num_key_value_heads=2, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_fused_projections_are_decomposed_by_parts() -> None:
    model, seen = phi3(), []
    original = model.model.layers[0].self_attn.qkv_proj.weight.detach()
    report = oats.compress_(model, TOKENS, progress=lambda *a: seen.append(a))
    attention = model.model.layers[0].self_attn
    assert [layer.name.removeprefix("model.layers.0.") for layer in report.layers[:6]] == [
        "self_attn.o_proj", "self_attn.qkv_proj.q", "self_attn.qkv_proj.k", "self_attn.qkv_proj.v",
        "mlp.gate_up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert [a[:2] for a in seen] == [(i, 12) for i in range(1, 13)]
    assert [(p.out_features, p.rank) for p in attention.qkv_proj.values()] == [(48, 3), (24, 2), (24, 2)]
    # Each part is close to its own rows of the weight.
    apart = (attention.qkv_proj.weight - original).norm(dim=1) / original.norm(dim=1)
    assert apart.max() < 0.6
    x = torch.randn(2, 5, 48)
    assert_equal_sums(attention.qkv_proj(x), x @ attention.qkv_proj.weight.T, 48 + 3)

    with pytest.raises(ConfigError, match="split is 'qkv_proj', expected a collection"):
        oats.compress_(phi3(), TOKENS, split="qkv_proj")
    names = [layer.name for layer in oats.compress_(phi3(), TOKENS, split=("gate_up_proj",)).layers[:4]]
    assert [name.rpartition("layers.0.")[2] for name in names] == [
        "self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj.gate", "mlp.gate_up_proj.up",
    ]  # fmt: skip


def test_a_model_whose_first_layer_is_a_fused_one_can_be_saved() -> None:
    model = phi3()
    oats.compress_(model, TOKENS, oats.OatsConfig(skip="*.o_proj"))
    assert model.config.quantization_config.settings.skip == ("*.o_proj",)


def test_a_transposed_weight_is_decomposed_as_it_is_used() -> None:
    model = AutoModel.from_config(GPT2Config(vocab_size=61, n_embd=48, n_layer=1, n_head=4)).eval()
    conv = model.h[0].mlp.c_fc
    nn.init.normal_(conv.bias)
    linear = nn.Linear(48, 192)
    linear.weight, linear.bias = nn.Parameter(conv.weight.T), conv.bias
    inputs = []
    handle = conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(TOKENS)
    handle.remove()
    config = oats.OatsConfig(iterations=2)
    expected = SparseLowRankLinear.from_linear(linear, inputs[0].reshape(-1, 48).square().sum(0), config)
    oats.compress_(model, TOKENS, config)
    torch.testing.assert_close(model.h[0].mlp.c_fc(inputs[0]), expected(inputs[0]), atol=1e-4, rtol=1e-4)


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
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stacked = nn.Parameter(torch.ones(2, 32, 32))

        def forward(self, x):
            return x @ self.stacked[0]

    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.stacked \(Experts is not a linear layer"):
        oats.compress_(Chain(block=Experts), [ROWS])
    model = llama()
    model.model.layers[1].unused = nn.Linear(48, 48)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.unused \(it did not run"):
        report = oats.compress_(model, TOKENS, oats.OatsConfig(skip=("*.down_proj",)))
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert len(report.left_dense) == 4


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.empty(0, 8, dtype=torch.long), "empty"),
        ([], "empty"),
        ({}, "an empty dict"),
        ([{}], "batch 0 is an empty dict"),
        (TOKENS[0], "unsqueeze"),
        (TOKENS[:1, :8], "8 tokens, at least 16"),
        (TOKENS + 50, "vocabulary has 61"),
        (TOKENS - 30, "from -"),
        (TOKENS.float(), "float32"),
        (TOKENS.bool(), r"torch\.bool"),
        (TOKENS.view(2, 3, 24), r"shape \(2, 3, 24\)"),
        ({"input_ids": TOKENS[0]}, r"shape \(24,\)"),
        ({"input_ids": TOKENS.tolist()}, "input_ids is of type list"),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(6, 5)}, r"\(6, 5\), but input_ids \(6, 24\)"),
        ("some text", "tokenizer"),
        (["some text"], "type str.*tokenizer"),
        (None, "type NoneType"),
        (128, "type int"),
        (TOKENS.tolist(), "type list"),
        (TOKENS.numpy(), "type ndarray"),
        ([(TOKENS, torch.ones_like(TOKENS))], "type tuple.*dicts of keyword"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calibration(calibration, message) -> None:
    with pytest.raises(CalibrationError, match=message):
        as_batches(llama(num_hidden_layers=1), calibration)


@pytest.mark.parametrize(
    "calibration",
    [
        {"input_ids": TOKENS},
        BatchEncoding({"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}),
        list(TOKENS),
        (ids for ids in TOKENS.split(4)),
    ],
    ids=["dict", "BatchEncoding", "sequences", "generator"],
)
def test_calibration_that_is_taken(calibration) -> None:
    batches = as_batches(llama(num_hidden_layers=1), calibration)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), TOKENS)


def test_calibration_by_the_keyword_of_a_plain_module() -> None:
    class Two(Chain):
        def forward(self, y, x):
            return super().forward(x)

    assert oats.compress_(Two(), {"x": ROWS, "y": None}).layers


def test_calibration_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    images = torch.randn(1, 3, 8, 8)
    for calibration, message in [
        (
            {"pixel_values": images},
            r"batch 0: LlamaForCausalLM could not run on it up to block 0: ValueError",
        ),
        ({"input_ids": TOKENS, "position_ids": TOKENS[:, :3]}, r"block 0: IndexError: "),
    ]:
        model = llama()
        with pytest.raises(CalibrationError, match=message):
            oats.compress_(model, calibration, oats.OatsConfig(dtype="bf16"))
        assert is_as_it_was(model) and model.config.use_cache
    model = Chain()
    with pytest.raises(CalibrationError, match=r"block 0: TypeError.*'z'"):
        oats.compress_(model, {"z": ROWS}, oats.OatsConfig(dtype="bf16"))
    assert is_as_it_was(model)


def test_bad_weight_is_named_before_anything_changes() -> None:
    for name, parameter in [("up_proj", "weight"), ("down_proj", "bias")]:
        model = llama(mlp_bias=True)
        getattr(model.model.layers[2].mlp.get_submodule(name), parameter).data[3] = float("nan")
        with pytest.raises(WeightError, match=rf"model\.layers\.2\.mlp\.{name}: the {parameter} has NaN"):
            oats.compress_(model, TOKENS)
        assert is_as_it_was(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (oats.OatsConfig(compression=0.7, pattern="2:4"), "2:4"),
        (oats.OatsConfig(pattern="2:48"), r"model\.layers\.0\.mlp\.down_proj.*multiple of 48.*has 80"),
        ({"compression": 0.5}, r"oats\.OatsConfig\("),
        ({}, r"oats\.OatsConfig\("),
        (0.5, r"oats\.OatsConfig\("),
    ],
    ids=str,
)
def test_bad_config_is_said_before_anything_changes(config, message) -> None:
    model = llama()
    with pytest.raises(ConfigError, match=message):
        oats.compress_(model, TOKENS, config)
    assert is_as_it_was(model)


def test_an_interrupted_walk_is_saved_as_what_it_is(tmp_path) -> None:
    def interrupt(done, *_) -> None:
        if done == 3:
            raise KeyboardInterrupt

    model = llama().eval()
    with pytest.raises(KeyboardInterrupt):
        oats.compress_(model, TOKENS, progress=interrupt)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert sum(isinstance(m, SparseLowRankLinear) for m in loaded.modules()) == 3
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_images_follow_the_dtype_of_the_model() -> None:
    model = Chain()
    oats.compress_(model, [ROWS], oats.OatsConfig(dtype="bf16"))
    assert model(ROWS.bfloat16()).dtype == torch.bfloat16


def test_a_layer_under_two_names_stays_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Linear(32, 32)

        def forward(self, x):
            return self.second(self.first(x))

    model = Chain(block=Tied)
    model.layers[2].first = model.layers[1].first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = oats.compress_(model, [ROWS])
    assert [layer.name for layer in report.layers] == ["layers.0.first", "layers.1.first", "layers.2.second"]
    assert type(model.layers[0].first) is SparseLowRankLinear
    assert model.layers[0].first is model.layers[0].second
    assert model.layers[1].first is model.layers[1].second is model.layers[2].first


def test_a_block_in_two_places_is_refused() -> None:
    model = Chain()
    model.layers[2] = model.layers[0]
    with pytest.raises(UnsupportedModelError, match="layers holds the same block more than once"):
        oats.compress_(model, [ROWS])
    assert is_as_it_was(model)


def test_layers_that_torch_does_not_call_stay_dense() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = nn.MultiheadAttention(32, 4), nn.Linear(32, 32)

        def forward(self, x):
            return self.mlp(self.attention(x, x, x)[0])

    model = Chain(block=lambda: nn.TransformerEncoderLayer(32, 4, 48, batch_first=True))
    with pytest.raises(UnsupportedModelError, match="TransformerEncoderLayer reads its weight and does not"):
        oats.compress_(model, [ROWS])
    assert is_as_it_was(model)
    with pytest.warns(UserWarning, match="left dense"):
        report = oats.compress_(Chain(block=Attention), [ROWS])
    assert [layer.name for layer in report.layers] == [f"layers.{i}.mlp" for i in range(3)]
    assert report.left_dense["layers.0.attention.out_proj"].startswith("MultiheadAttention reads its weight")


def test_a_layer_whose_weight_is_read_stays_dense_and_one_that_is_called_too_is_right() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.called, self.both = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            x = nn.functional.linear(x, self.read.weight, self.read.bias)
            return nn.functional.linear(self.both(self.called(x)), self.both.weight)

    model = Chain(block=Reads)
    with pytest.warns(UserWarning, match=r"layers\.0\.read \(it did not run"):
        report = oats.compress_(model, [ROWS])
    assert [layer.name for layer in report.layers[:2]] == ["layers.0.called", "layers.0.both"]
    block = model.layers[0]
    x = torch.randn(3, 32)
    both = block.both.to_dense()
    expected = nn.functional.linear(block.called(block.read(x)), both, block.both.bias) @ both.T
    assert_equal_sums(block(x), expected, terms_of(block))


def test_the_encoder_beside_the_decoder_is_said() -> None:
    sizes = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in [("layers", 1), ("attention_heads", 4), ("ffn_dim", 64)]
    }
    model = BartModel(BartConfig(vocab_size=61, d_model=32, **sizes)).eval()
    with pytest.warns(UserWarning, match=r"encoder\.layers\.0\.\S+ \(only the blocks in decoder\.layers are"):
        report = oats.compress_(model, TOKENS)
    assert len(report.layers) == 10 and len(report.left_dense) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = BartModel(BartConfig(vocab_size=61, d_model=32, **sizes)).eval()
        oats.compress_(model, TOKENS, oats.OatsConfig(skip="encoder.*"))


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
        logits = (each(TOKENS, use_cache=False).logits for each in (compiled, model))
        assert_equal_sums(*logits, terms_of(model))


def test_find_blocks_refuses_a_path_to_something_else() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of modules at 'lm_head'"):
        find_blocks(llama(), "lm_head")
