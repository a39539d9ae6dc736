"""Latency of layers: what is timed, against what, and that nothing wrong is."""

import json

import pytest
import torch

from oats import OatsConfig
from oats.bench import contenders, plots, summary
from oats.bench.contenders import compressed, torch_dense
from oats.bench.layer_latency import LeftOut, layer_rows
from oats.bench.random_layer import RandomWeight, Reference, random_input
from oats.bench.shapes import MODELS, LayerShape, shapes_of
from oats.bench.spread import Spread
from oats.errors import ConfigError, OatsError, OutputExistsError
from oats.kernels.isa import active_isa, available_isas
from oats.kernels.packing import packed_isa

SMALL = LayerShape("96 x 200", 96, 200)


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(contenders, "_CYCLED_BYTES", 1_000_000)
    monkeypatch.setattr(contenders, "_last_level_cache_bytes", lambda: 0)
    monkeypatch.setattr("oats.bench.layer_latency.read_time", lambda: lambda: 40.0)
    monkeypatch.setattr("oats.bench.layer_latency._REST_SECONDS", 0.0)


def rows_of(ours, peers, *, batches=(1, 3), config=None, **options):
    return list(
        layer_rows(
            SMALL, batches, config or OatsConfig(), ours, peers, repetitions=3, seconds=0.01, **options
        )
    )


# --- random layers and their reference -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "pattern", "rank", "density"),
    [
        ("oats", "row", 9, 0.45),
        ("oats", "layer", 9, 0.45),
        ("oats", "2:4", 6, 0.5),
        ("unstructured", "row", 0, 0.6),
        ("dense", "row", 0, 1.0),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_random_weight_has_the_budget_of_a_compression_run(form, pattern, rank, density, dtype):
    config = OatsConfig(compression=0.4, rank_ratio=0.25, pattern=pattern, dtype=dtype)
    weight = RandomWeight.make(form, 96, 200, config)
    assert weight.rank == rank
    assert weight.nnz == pytest.approx(density * 96 * 200, rel=0.01)
    assert weight.sparse.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)


@pytest.mark.parametrize("batch", [1, 200])
def test_the_reference_sees_an_error_in_a_row_it_checks(batch):
    weight = RandomWeight.make("oats", 96, 200, OatsConfig(dtype="fp32"))
    x = random_input(weight, batch)
    dense = weight.sparse.double() + weight.low_rank_u.double() @ weight.low_rank_v.double()
    y = x.double() @ dense.T
    reference = Reference.of(weight, x)
    assert len(reference.rows) == min(batch, 64)
    assert {0, batch - 1} <= set(reference.rows.tolist())
    assert reference.error(y) < 1e-12
    # scale is the deviation of an output over random signs: about that of the outputs themselves.
    assert 0.5 < float((y[reference.rows] / reference.scale).std()) < 2
    wrong = y.clone()
    wrong[-1, 5] += float(reference.scale[-1, 5]) / 2
    assert reference.error(wrong) == pytest.approx(0.5, rel=1e-6)
    wrong[0, 0] = float("nan")
    assert reference.error(wrong) == float("inf")


def test_tolerances_tell_bf16_from_fp32():
    weight = RandomWeight.make("dense", 96, 200, OatsConfig(dtype="fp32"))
    x = random_input(weight, 16)
    reference = Reference.of(weight, x)
    rounded = (x.bfloat16() @ weight.sparse.bfloat16().T).float()
    assert contenders.TOLERANCES["fp32"] < reference.error(rounded) < contenders.TOLERANCES["bf16"]
    assert reference.error(x @ weight.sparse.T) < contenders.TOLERANCES["fp32"]


# --- rows ----------------------------------------------------------------------------------------------


def test_rows_pair_ours_with_peers_of_the_same_dtype():
    ours = [compressed("bf16"), compressed("fp32"), compressed("bf16", form="unstructured")]
    rows = rows_of(ours, [torch_dense("bf16"), torch_dense("fp32")])
    assert [(row.batch, row.ours.label, row.peer.label) for row in rows if row.batch == 3] == [
        (3, f"oats bf16 {active_isa()}", "torch bf16 dense"),
        (3, f"oats fp32 {active_isa()}", "torch fp32 dense"),
        (3, f"oats bf16 unstructured {active_isa()}", "torch bf16 dense"),
    ]
    row = rows[0]
    assert (row.ours.rank, row.ours.nnz, row.peer.nnz) == (8, 96 * 75, 96 * 200)
    assert row.peer.weight_bytes == 2 * 96 * 200
    assert row.peer.copies * row.peer.weight_bytes >= 1_000_000
    assert row.ours.copies * row.ours.weight_bytes >= 1_000_000
    assert row.ours.calls == row.peer.calls == 3
    assert row.ratio == row.peer.ms.median / row.ours.ms.median
    assert row.gflops(row.peer) == pytest.approx(2 * 96 * 200 / row.peer.ms.median / 1e6)
    assert row.share_of_bandwidth(row.peer) == pytest.approx(2 * 96 * 200 / row.peer.ms.median / 1e6 / 40)
    assert row.to_dict()["ours"]["gflops"] == row.gflops(row.ours)


def test_a_peer_without_bf16_meets_ours_in_both_dtypes():
    only_fp32 = torch_dense("fp32")
    only_fp32.name = "slow"
    rows = rows_of([compressed("bf16"), compressed("fp32")], [torch_dense("bf16"), only_fp32], batches=(1,))
    assert [(row.ours.dtype, row.peer.label) for row in rows] == [
        ("bf16", "torch bf16 dense"),
        ("bf16", "slow fp32 dense"),
        ("fp32", "slow fp32 dense"),
    ]


@pytest.mark.parametrize("isa", available_isas())
def test_ours_is_packed_for_the_isa_that_was_asked_for(isa, monkeypatch):
    monkeypatch.setenv("OATS_ISA", "scalar")
    contender = compressed("bf16", isa=isa)
    contender.load(RandomWeight.make("oats", 96, 200, OatsConfig()))
    assert {packed_isa(layer.packed) for layer in contender._layers} == {isa}
    assert active_isa() == "scalar"


def test_a_small_layer_has_few_copies(monkeypatch):
    monkeypatch.setattr(contenders, "_MOST_COPIES", 5)
    assert torch_dense("bf16").load(RandomWeight.make("dense", 4, 4, OatsConfig())).copies == 5


def test_a_contender_is_timed_at_its_own_batches_only():
    lower = compressed("bf16", isa="scalar")
    lower.batches = [3]
    rows = rows_of([compressed("bf16"), lower], [torch_dense("bf16")])
    assert [(row.batch, row.ours.isa) for row in rows] == [
        (1, active_isa()),
        (3, active_isa()),
        (3, "scalar"),
    ]


def test_a_wrong_result_of_ours_is_an_error(monkeypatch):
    monkeypatch.setattr(
        "oats.nn.SparseLowRankLinear.forward",
        lambda self, x: x.new_zeros(len(x), self.out_features),
    )
    with pytest.raises(OatsError, match=r"oats bf16 .* is wrong at 96 x 200, batch 1: .*nothing was timed"):
        rows_of([compressed("bf16")], [torch_dense("bf16")])


def test_a_wrong_peer_is_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x @ self.weight.T + 1)
    left_out = []
    assert rows_of([compressed("bf16")], [torch_dense("bf16")], left_out=left_out) == []
    assert [(item.name, item.where) for item in left_out] == [
        ("torch bf16 dense", "96 x 200, batch 1"),
        ("torch bf16 dense", "96 x 200, batch 3"),
    ]
    assert "is wrong at 96 x 200" in left_out[0].reason


def test_a_contender_that_is_too_slow_is_left_out(monkeypatch):
    monkeypatch.setattr("oats.bench.layer_latency._LONGEST_CALL_MS", 0.0)
    left_out = []
    assert rows_of([compressed("bf16")], [torch_dense("bf16")], batches=(1,), left_out=left_out) == []
    assert len(left_out) == 2 and left_out[0].reason.startswith("one call takes")


def test_compressions_are_timed_in_turn():
    ours = [compressed("bf16", compression=share) for share in (0.3, 0.7)]
    rows = rows_of(ours, [torch_dense("bf16")], batches=(1,))
    assert [row.compression for row in rows] == [0.3, 0.7]
    sizes = [row.ours.weight_bytes for row in rows]
    assert sizes[1] < sizes[0] and rows[0].ours.nnz > 1.5 * rows[1].ours.nnz
    assert rows[0].peer == rows[1].peer


def test_layer_rows_refuse_bad_settings():
    with pytest.raises(ConfigError, match=r"at least 1, got 96, 200, \[0\] and 3"):
        rows_of([], [], batches=[0])
    with pytest.raises(ConfigError, match="at least 1"):
        rows_of([], [], batches=[])
    with pytest.raises(ConfigError, match="pattern 3:8 keeps"):
        rows_of([compressed("bf16")], [], config=OatsConfig(compression=0.7, pattern="3:8"))


# --- shapes of models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        # Parameters of the linear layers in the blocks: those of the model less embeddings, head and norms.
        ("llama-3-8b", 8.03 - 2 * 128256 * 4096 / 1e9),
        ("llama-2-7b", 6.738 - 2 * 32000 * 4096 / 1e9),
        ("phi-3-mini", 3.821 - 2 * 32064 * 3072 / 1e9),
        ("gemma-3-270m", 0.2681 - 262144 * 640 / 1e9),
        ("vit-b-16", 0.0859 - (197 + 768) * 768 / 1e9),
        ("dinov2-giant", 1.1365 - (1370 + 588) * 1536 / 1e9),
    ],
)
def test_the_shapes_of_a_model_add_up_to_its_parameters(model, billions):
    total = sum(shape.d_out * shape.d_in * shape.count for shape in shapes_of(model))
    assert total / 1e9 == pytest.approx(billions, rel=5e-3)


def test_an_unknown_model_is_refused():
    assert len(MODELS) >= 6
    with pytest.raises(ConfigError, match="no model is called 'gpt-9'; known are llama-3-8b, "):
        shapes_of("gpt-9")


# --- tables and pictures -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "_CYCLED_BYTES", 1_000_000)
        patch.setattr(contenders, "_last_level_cache_bytes", lambda: 0)
        patch.setattr("oats.bench.layer_latency.read_time", lambda: lambda: 40.0)
        ours = [compressed("bf16"), compressed("bf16", form="unstructured")]
        return rows_of(ours, [torch_dense("bf16")])


def test_markdown_has_every_contender_with_its_ratio(measured):
    text = summary.markdown(measured, [LeftOut("Peer", "everywhere", "not installed")])
    main, peer = measured[0].ours, measured[0].peer
    ratio = peer.ms.median / main.ms.median
    line = next(line for line in text.splitlines() if line.startswith("| torch bf16 dense"))
    assert f"({ratio:.2f})" in line and line.startswith("| torch bf16 dense | 0.0 |")
    assert "| **oats bf16" in text and "| oats bf16 unstructured" in text
    assert "- Peer (everywhere): not installed" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {5}


def test_json_is_complete(measured):
    values = json.loads(json.dumps(summary.to_dict(measured, [])))
    assert values["machine"]["isa"] == active_isa()
    assert {"ms", "weight_bytes", "share_of_bandwidth", "gflops", "error"} <= values["rows"][0]["peer"].keys()
    assert len(values["rows"]) == len(measured) == 4


def test_a_wide_spread_is_marked(measured, monkeypatch):
    monkeypatch.setattr(Spread, "is_wide", True)
    assert r"\*" in summary.markdown(measured, []).split("1.5 ×")[1]


def test_pictures(measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "peak_gflops", lambda dtype: 800.0)
    plots.prepare(tmp_path / "out")
    files = plots.draw(measured, tmp_path / "out")
    assert [file.name for file in files] == list(plots.FILES)
    assert files[0].read_bytes().startswith(b"\x89PNG") and b"</svg>" in files[1].read_bytes()
    assert "torch bf16 dense" in files[3].read_text()
    with pytest.raises(OutputExistsError, match=r"latency.png exists"):
        plots.prepare(tmp_path / "out")


def test_pictures_without_matplotlib_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'oats-torch\[plot\]'"):
        plots.prepare(tmp_path)
