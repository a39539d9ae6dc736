"""The output head as codes, and the embedding that reads its rows."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oats import (
    FormatError,
    OatsConfig,
    SparseLowRankLinear,
    UnsupportedModelError,
    WeightError,
    compress_,
    quantize_,
)
from oats.bench.model_speed import bytes_per_token
from oats.compression.head import quantize_head_
from oats.config import EXACT, Storage
from oats.decomposition.codes import quantize_tensors
from oats.errors import DeviceError
from oats.format.bitmask import decode
from oats.format.layer_spec import exact_parts
from oats.kernels.packing import pack
from oats.kernels.to_dense import read_rows
from oats.nn.head import RowsOfHead
from tests.conftest import DTYPES, ISAS, random_layer, spec_of

transformers = pytest.importorskip("transformers")

from oats.checkpoint.stored_model import read_stored_model  # noqa: E402

IDS = torch.tensor([[1, 2, 3, 39, 5, 1]])
SIZES = dict(
    vocab_size=77, hidden_size=40, intermediate_size=56, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, eos_token_id=None,
)  # fmt: skip
LLAMA = transformers.LlamaConfig(**SIZES)
TIED = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
GEMMA = transformers.Gemma3TextConfig(**SIZES, head_dim=20)

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(configuration, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(configuration), dtype=dtype).eval()


def compressed(configuration, **options):
    model = model_of(configuration, torch.bfloat16)
    compress_(model, IDS.repeat(4, 4), OatsConfig(iterations=2, head="int8", **options))
    return model


@torch.no_grad()
def logits(model, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits.float()


# Rows of a packed weight.


@given(
    d_out=st.integers(1, 140),
    d_in=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    storage=st.sampled_from([EXACT, Storage("int8", "int8", 64), Storage("int4", "exact", 128)]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_those_of_the_sparse_part(d_out, d_in, density, isa, dtype, storage, seed) -> None:
    tensors = random_layer(d_out, d_in, 0, density, dtype, seed)
    if storage.has_codes:
        tensors = quantize_tensors(tensors, d_in, storage)
    packed = pack(tensors, spec_of(tensors, storage, dtype), isa=isa)
    rows = torch.randint(d_out, (2, 7), generator=torch.Generator().manual_seed(seed))
    if storage.has_codes:
        sparse, _, _ = exact_parts(tensors, storage)
    else:
        sparse = decode(tensors["mask"], tensors["values"], d_in)
    got = read_rows(packed, rows, d_in, dtype)
    torch.testing.assert_close(got, sparse.to(dtype)[rows], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows_of_any_number(kind: torch.dtype) -> None:
    tensors = random_layer(50, 30, 0, 0.5, torch.float32)
    packed = pack(tensors, spec_of(tensors))
    dense = decode(tensors["mask"], tensors["values"], 30)
    for rows in (torch.tensor(7), torch.arange(50).repeat(20), torch.arange(50)[::3], torch.empty(0)):
        assert torch.equal(read_rows(packed, rows.to(kind), 30, torch.float32), dense[rows.long()])


def test_rows_that_are_not_there_are_refused() -> None:
    tensors = random_layer(5, 8, 0, 0.5, torch.float32)
    packed = pack(tensors, spec_of(tensors))
    for rows in ([5], [0, -1]):
        with pytest.raises(IndexError, match="the packed weight has 5"):
            read_rows(packed, torch.tensor(rows), 8, torch.float32)
    with pytest.raises(ValueError, match=r"rows are torch\.float32"):
        read_rows(packed, torch.tensor([1.0]), 8, torch.float32)
    for d_in, dtype in ((9, torch.float32), (8, torch.bfloat16)):
        with pytest.raises(ValueError, match=f"expected {dtype} with {d_in} and rank 0"):
            read_rows(packed, torch.tensor([1]), d_in, dtype)
    tensors = random_layer(5, 8, 2, 0.5, torch.float32)
    packed = pack(tensors, spec_of(tensors))
    with pytest.raises(ValueError, match="rank 2, expected"):
        read_rows(packed, torch.tensor([1]), 8, torch.float32)


# Models.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("configuration", [LLAMA, TIED, GEMMA], ids=["untied", "tied", "scaled"])
def test_nothing_but_rounding(configuration, dtype: torch.dtype) -> None:
    model = model_of(configuration, dtype)
    before, weight = logits(model), model.get_output_embeddings().weight.detach().clone()
    quantize_head_(model)
    head = model.get_output_embeddings()
    assert isinstance(head, SparseLowRankLinear) and head.rank == 0 and head.nnz == weight.numel()
    # A code is off by half a unit at most, of which the largest of its group has 127; the scale is bf16.
    largest = torch.stack([part.abs().amax(1) for part in weight.float().split(128, dim=1)], 1)
    bound = largest.repeat_interleave(128, 1)[:, : weight.shape[1]] * (0.5 / 127 + 2**-8)
    assert bool(((head.weight.float() - weight.float()).abs() <= bound * (1 + 2**-7)).all())
    assert (logits(model) - before).norm() <= 0.05 * before.norm()
    tied = configuration is not LLAMA
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, RowsOfHead) == tied
    if tied:
        scale = float(embedding.scalar_embed_scale) if configuration is GEMMA else 1.0
        rows = (head.weight[IDS].float() * torch.tensor(scale, dtype=dtype).float()).to(dtype)
        torch.testing.assert_close(embedding(IDS), rows)
        assert "model.embed_tokens.weight" not in model.state_dict()
        assert embedding.weight.is_meta and embedding.weight.shape == weight.shape
    quantize_head_(model)  # changes nothing
    assert model.get_output_embeddings() is head


@pytest.mark.parametrize("configuration", [LLAMA, TIED, GEMMA], ids=["untied", "tied", "scaled"])
def test_saved_and_loaded(configuration, tmp_path: Path) -> None:
    model = compressed(configuration)
    model.save_pretrained(tmp_path)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["format_version"] == 4 and quantization["head"] == "int8"
    tied = configuration is not LLAMA
    assert quantization["layers"]["lm_head"] == {
        "rank": 0, "nnz": 77 * 40, "values": "int8", "low_rank": "int8", "scale_columns": 128,
        "mask": False, "embedding": "model.embed_tokens" if tied else None,
    }  # fmt: skip
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
    prompt = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(loaded.generate(IDS, **prompt), model.generate(IDS, **prompt))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()
    stored = read_stored_model(tmp_path)
    assert len(stored.layers) == 7 and stored.head is not None and stored.head.name == "lm_head"
    assert stored.head.storage.values == "int8"
    # What is elsewhere: the norms, and the embedding where it has a weight of its own.
    assert stored.parameters_elsewhere < 300 + (0 if tied else 77 * 40)


def test_a_base_model_has_the_rest(tmp_path: Path) -> None:
    compressed(LLAMA).save_pretrained(tmp_path / "untied")
    base = transformers.AutoModel.from_pretrained(tmp_path / "untied")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "untied")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    compressed(TIED).save_pretrained(tmp_path / "tied")
    with pytest.raises(FormatError, match="'lm_head', which is not in LlamaModel"):
        transformers.AutoModel.from_pretrained(tmp_path / "tied")


@pytest.mark.parametrize(
    ("layer", "embedding", "message"),
    [
        ("lm_head", "model.norm", "has the embedding 'model.norm', which is none of 77 rows"),
        ("lm_head", "model.nothing", "has the embedding 'model.nothing', which is none"),
        ("lm_head", 3, r"layers\['lm_head'\] is "),
        ("model.layers.0.mlp.up_proj", None, "only the output head has an embedding, and rank 0"),
    ],
)
def test_a_wrong_entry_of_the_head_is_an_error(layer, embedding, message, tmp_path: Path) -> None:
    compressed(TIED).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers[layer] = layers["lm_head"] | layers[layer] | {"embedding": embedding}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_embedding_with_a_weight_does_not_read_the_head(tmp_path: Path) -> None:
    compressed(LLAMA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["lm_head"]["embedding"] = "model.embed_tokens"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"model.embed_tokens has a weight, but config.json says"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_model_with_a_head_of_codes(tmp_path: Path) -> None:
    model = model_of(TIED, torch.bfloat16)
    quantize_head_(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0.02, atol=0.02)
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["head"] == "int8" and list(quantization["layers"]) == ["lm_head"]


def test_the_settings_name_a_head_that_became_codes_later() -> None:
    model = model_of(LLAMA)
    compress_(model, IDS.repeat(4, 4), OatsConfig(iterations=2))
    quantize_head_(model)
    assert model.config.quantization_config.to_dict()["head"] == "int8"


@pytest.mark.parametrize("configuration", [LLAMA, TIED], ids=["untied", "tied"])
def test_what_a_token_reads(configuration) -> None:
    """Every packed layer and the norms; of an embedding, tied or not, one row that does not count."""
    model = compressed(configuration)
    layers = [m for m in model.modules() if isinstance(m, SparseLowRankLinear)]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(layers) == 8 and len(norms) == 3
    expected = sum(layer.packed.nbytes for layer in layers) + sum(norm.nbytes for norm in norms)
    assert bytes_per_token(model) == expected


def test_copies_and_pickles_read_their_own_head() -> None:
    model = compressed(GEMMA)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.get_input_embeddings().head is other.lm_head
        assert other.lm_head is not model.lm_head
        assert torch.equal(logits(other), logits(model))
        assert type(other.get_input_embeddings()) is type(model.get_input_embeddings())


def test_another_dtype() -> None:
    model = compressed(GEMMA)
    expected = logits(model)
    model.to(torch.float32)
    assert model.get_input_embeddings()(IDS).dtype == torch.float32
    assert (logits(model) - expected).norm() <= 0.05 * expected.norm()


def test_weights_both_ways() -> None:
    model, other = compressed(TIED), compressed(TIED, seed=1)
    other.lm_head.load_state_dict({k: v for k, v in model.lm_head.state_dict().items()})
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("configuration", [LLAMA, TIED, GEMMA], ids=["untied", "tied", "scaled"])
def test_dequantised_it_is_dense_and_tied_again(configuration, tmp_path: Path) -> None:
    model = compressed(configuration)
    expected = logits(model)
    model.dequantize()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(head) is nn.Linear and not isinstance(embedding, RowsOfHead)
    assert (head.weight is embedding.weight) == (configuration is not LLAMA)
    assert (logits(model) - expected).norm() <= 0.05 * expected.norm()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_codes_of_the_blocks_leave_the_head_alone() -> None:
    model = compressed(TIED)
    before = model.lm_head.canonical()
    assert len(quantize_(model, "int4", "exact")) == 7
    assert model.lm_head.storage == Storage("int8", "int8", 128, mask=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.lm_head.canonical().items())


def test_on_the_fly(tmp_path: Path) -> None:
    from oats.integrations.transformers import OatsQuantizationConfig

    model_of(TIED).save_pretrained(tmp_path)
    settings = OatsQuantizationConfig(
        settings=OatsConfig(iterations=2, head="int8"), calibration=IDS.repeat(4, 4)
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    assert isinstance(model.get_input_embeddings(), RowsOfHead)
    model.save_pretrained(tmp_path / "compressed")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "compressed")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.skipif(sys.platform != "linux", reason="torch.compile needs a C++ compiler")
def test_compiled_as_one_graph() -> None:
    model = compressed(TIED)
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS).logits.float(), expected)


def test_what_has_no_such_head_is_refused() -> None:
    class Normed(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, nn.functional.normalize(self.weight))

    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=77, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="modules are tied to the output head"):
        quantize_head_(bart)
    assert type(bart.lm_head) is nn.Linear
    normed = model_of(LLAMA)
    normed.lm_head.__class__ = Normed
    with pytest.raises(UnsupportedModelError, match=r"no linear output head \(Normed\)"):
        quantize_head_(normed)
    with pytest.raises(DeviceError, match="output head is on meta"):
        quantize_head_(model_of(LLAMA).to("meta"))
    with pytest.raises(UnsupportedModelError, match="Linear has no linear output head"):
        quantize_head_(nn.Linear(3, 3))
    model = model_of(LLAMA)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(WeightError, match="output head has NaN"):
        quantize_head_(model)


def test_an_embedding_of_another_kind_is_refused_before_anything_is_changed() -> None:
    class Reversed(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.embedding(self.num_embeddings - 1 - input, self.weight)

    model = model_of(TIED)
    embedding = Reversed(77, 40)
    embedding.weight = model.lm_head.weight
    model.set_input_embeddings(embedding)
    with pytest.raises(UnsupportedModelError, match="Reversed does not read its rows"):
        quantize_head_(model)
    assert type(model.lm_head) is nn.Linear and model.get_input_embeddings() is embedding
