"""Models with random weights, where their decoding time goes, and the benchmark that is made of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Phi3Config

import oats
from oats.bench.model_speed import bytes_per_token, decode_time
from oats.bench.random_model import random_model
from oats.decomposition import budget
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.scripts import load_script

SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
ARCHITECTURES = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "phi3": Phi3Config(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16),  # tied embedding
}
# With heads that the engine takes.
TINY = Phi3Config(**SIZES | {"hidden_size": 64})
IDS = torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_a_random_model_is_what_a_compression_would_make(architecture, pattern) -> None:
    config = oats.OatsConfig(compression=0.4, pattern=pattern, iterations=2)
    before = torch.get_rng_state()
    model = random_model(architecture, config)
    assert torch.equal(torch.get_rng_state(), before)
    compressed = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    oats.compress_(compressed, IDS.repeat(2, 2), config)

    def described(model: nn.Module) -> list[Any]:
        return [
            (
                name,
                type(m).__name__,
                getattr(m, "rank", None),
                getattr(m, "nnz", None),
                getattr(m, "dtype", None),
            )
            for name, m in model.named_modules()
        ]

    assert described(model) == described(compressed)
    assert [(n, t.shape, t.dtype) for n, t in model.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in compressed.state_dict().items()
    ]
    for (name, ours), (_, theirs) in zip(model.named_buffers(), compressed.named_buffers(), strict=True):
        if not name.endswith(".packed"):
            torch.testing.assert_close(ours, theirs)
    logits = model(IDS[None]).logits.float()
    assert logits.isfinite().all() and logits.std() > 1e-3
    assert bytes_per_token(model) == bytes_per_token(compressed)


def test_the_rows_of_a_random_layer_differ_and_keep_the_same_number() -> None:
    layer = random_model(ARCHITECTURES["llama"], oats.OatsConfig()).model.layers[0].mlp.up_proj
    tensors = layer.canonical()
    bits = torch.tensor(
        [[byte >> i & 1 for byte in row for i in range(8)] for row in tensors["mask"].tolist()]
    )
    assert set(bits.sum(1).tolist()) == {budget.nnz_per_row(48, 0.5, 0.25)}
    assert len(bits.unique(dim=0)) > 40 and bits.sum(0).float().std() > 0
    assert not torch.equal(layer.weight, random_model(ARCHITECTURES["llama"], oats.OatsConfig(), seed=1)
                           .model.layers[0].mlp.up_proj.weight)  # fmt: skip


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_the_numbers_of_a_random_model_with_codes_are_finite(values) -> None:
    model = random_model(ARCHITECTURES["llama"], oats.OatsConfig(values=values))
    logits = model(IDS[None]).logits.float()
    assert logits.isfinite().all() and logits.std() > 1e-3


def test_dense_random_models_and_what_a_token_reads() -> None:
    for architecture in ARCHITECTURES.values():
        model = random_model(architecture, None)
        assert not any(isinstance(m, SparseLowRankLinear) for m in model.modules())
        read = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_word_embeddings:
            read -= model.get_input_embeddings().weight.nbytes
        assert bytes_per_token(model) == read


def test_the_parts_of_the_decoding_time() -> None:
    model = random_model(ARCHITECTURES["phi3"], oats.OatsConfig())
    calls = []
    for module in model.modules():
        if isinstance(module, (nn.Linear, SparseLowRankLinear)):
            module.register_forward_hook(lambda m, *_: calls.append(m))
    parts = decode_time(model, IDS, new_tokens=4)
    assert min(parts.linear, parts.head, parts.rest) > 0
    # Each block has six compressed matrices; the prompt's pass and three more.
    assert calls.count(model.lm_head) == 4 and len(calls) == 4 * (1 + 2 * 6)


def test_memory_stays_near_that_of_the_packed_model() -> None:
    """In a process of its own, where only the peak counts."""
    code = """
import torch
from transformers import LlamaConfig
from oats import OatsConfig
from oats.bench.model_speed import bytes_per_token
from oats.bench.random_model import random_model
def status(field):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(field))
sizes = dict(vocab_size=32, hidden_size=1024, intermediate_size=4096, num_attention_heads=8)
random_model(LlamaConfig(**sizes, num_hidden_layers=1), OatsConfig())  # what is imported on the way
before = status("VmRSS")
model = random_model(LlamaConfig(**sizes, num_hidden_layers=12), OatsConfig())
print(status("VmHWM") - before, bytes_per_token(model))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    peak, packed = map(int, result.stdout.split())
    assert packed > 200e6
    # A dense model would be 1.78 times the packed one, and both together 2.78 times.
    assert peak < 1.6 * packed


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("benchmarks/end_to_end.py")


NUMBERS = ["--new-tokens=6", "--repetitions=2", "--compression=0.4", "--threads=1"]


def run(benchmark: ModuleType, monkeypatch, capsys, *arguments: str) -> tuple[str, str]:
    """What it prints."""
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_the_benchmark(benchmark, monkeypatch, capsys) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setattr(benchmark, "MODELS", ["tiny"])
    forms = ["--forms", "oats-int8", "dense", "--transformers", "--prompts", "6", "9", "--together", "3"]
    printed, _ = run(benchmark, monkeypatch, capsys, "tiny", *NUMBERS, *forms, "--json")
    rows = json.loads(printed)
    names = ["oats-int8", "dense", "oats-int8-transformers", "dense-transformers"]
    assert [row["form"] for row in rows] == names
    for row in rows:
        speed, bandwidth = row["decode_tokens_per_s"]["median"], row["read_bytes_per_s"]["median"]
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes_per_token"] * speed / bandwidth)
        assert list(row["prefill_tokens_per_s"]) == ["6", "9"]
        assert all(rate["median"] > 0 for rate in row["prefill_tokens_per_s"].values())
        assert row["peak_bytes"] > 50e6 and row["same_tokens_as_dense"] is None
        assert list(row["together_tokens_per_s"]) == (["3"] if row["runtime"] == "engine" else [])
    assert rows[0]["bytes_per_token"] == rows[2]["bytes_per_token"] < rows[1]["bytes_per_token"]
    assert rows[0]["head"] == "int8" and rows[1]["head"] is None


def test_the_table_compares_ours_with_the_fastest_other_program(benchmark, capsys) -> None:
    def row(form: str, decode: float, together: float) -> dict[str, Any]:
        def spread(value: float) -> dict[str, float]:
            return {"median": value, "p10": value, "p90": value}

        return {
            "model": "m", "form": form, "runtime": benchmark.FORMS[form].runtime,
            "kind": benchmark.FORMS[form].kind, "decode_tokens_per_s": spread(decode),
            "together_tokens_per_s": {4: spread(together)}, "prefill_tokens_per_s": {6: spread(1000.0)},
            "bytes_per_token": 1e6, "share_of_bandwidth": 0.5, "peak_bytes": 2e6, "isa": "avx2",
            "same_tokens_as_dense": 3, "new_tokens": 4, "read_bytes_per_s": spread(1e9),
        }  # fmt: skip

    options = benchmark.argparse.Namespace(start=False, repetitions=5, prompts=[6], new_tokens=4, threads=2)
    benchmark.show(
        [row("oats-int8", 30, 300), row("llama-q8_0", 20, 400), row("openvino-int8", 10, 100)], options
    )
    ours, llama, openvino = capsys.readouterr().out.splitlines()[4:7]
    assert re.search(r"engine: oats int8 +30.0 \S+ 1.50× +300 \S+ 0.75× +1000 \S+ 1.00×", ours)
    assert "llama.cpp: Q8_0" in llama and "OpenVINO: int8" in openvino
    assert "×" not in llama + openvino and "3 of 4" in llama


def test_forms_that_do_not_fit_together_are_measured_one_after_the_other(
    benchmark, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(benchmark, "memory", lambda *_: 3 << 30)

    class Sizes:
        def __init__(self, dense: int) -> None:
            self.dense = dense

        def expected_bytes(self, form: Any) -> int:
            return self.dense if form.kind == "dense" else 1 << 30

    for dense, expected in (
        (1 << 30, [["oats", "dense"]]),
        (2 << 30, [["oats"], ["dense"]]),
        (3 << 30, [["oats"]]),
    ):
        assert list(benchmark.groups(Sizes(dense), ["oats", "dense"], "tiny")) == expected
    assert "tiny dense left out: it needs 161.1 MB more memory" in capsys.readouterr().err


def test_how_many_tokens_are_those_of_the_dense_model(benchmark) -> None:
    texts = {"dense": [1, 2, 3], "a": [1, 2, 3], "b": [1, 5, 3]}
    assert [benchmark.same_tokens(texts, name) for name in texts] == [3, 3, 1]
    assert benchmark.same_tokens({"a": [1]}, "a") is None


def test_the_benchmark_says_what_is_missing(benchmark, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["model_forms"], "BENCH", tmp_path)
    for arguments, message in (
        (["gpt"], "unknown model gpt"),
        (["gemma-3-270m", "--demo", str(tmp_path)], "run `make demo` first"),
        (
            ["smollm2-135m", "--forms", "dense"],
            "SmolLM2 is not installed; benchmarks/install_peers.sh does it",
        ),
        (
            ["phi-3-mini", "--forms", "llama-q8_0"],
            "llama.cpp is not built; benchmarks/install_peers.sh does it",
        ),
        (
            ["phi-3-mini", "--forms", "openvino-int8"],
            "OpenVINO GenAI is not installed; benchmarks/install_peers.sh does it",
        ),
        (["phi-3-mini", "--start"], "--start needs models that are in files"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(benchmark, monkeypatch, capsys, *arguments)
        assert message in f"{stop.value} {capsys.readouterr().err}"


def test_what_was_made_is_made_again_when_its_source_changes(benchmark, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["model_forms"], "BENCH", tmp_path)
    forms = benchmark.Forms("tiny", tmp_path, 0.5, "int8")
    made = []

    def make(out: Path) -> None:
        assert not out.exists()
        made.append(out.write_text("x"))

    for settings in ({"from": 1}, {"from": 1}, {"from": 2}):
        forms._made("file", settings, make)
    assert len(made) == 2


LARGER: dict[str, Any] = SIZES | dict(vocab_size=300, hidden_size=512, intermediate_size=768)


@pytest.mark.parametrize("kind", [LlamaConfig, Phi3Config])
def test_files_of_random_weights(kind, tmp_path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    llama_files = load_script("benchmarks/llama_files.py")

    def quantize(source: Path, file: Path) -> None:
        """What llama.cpp does, but for what it makes of which tensor."""
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(file, "llama")
        for tensor in reader.tensors:
            codes, raw = tensor.data, None
            if len(tensor.shape) == 2:
                raw = gguf.GGMLQuantizationType["Q8_0" if "ffn" in tensor.name else "Q4_0"]
                codes = gguf.quants.quantize(codes, raw)
            writer.add_tensor(tensor.name, codes, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    file = tmp_path / "model.gguf"
    architecture = kind(**LARGER)
    llama_files.write_random(file, architecture, quantize)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    assert sum(int(t.n_elements) for t in tensors.values()) == sum(p.numel() for p in model.parameters())
    down, up = tensors["blk.1.ffn_down.weight"], tensors["blk.1.attn_output.weight"]
    assert down.shape.tolist() == [768, 512] and down.tensor_type.name == "Q8_0"
    assert up.shape.tolist() == [512, 512] and up.tensor_type.name == "Q4_0"
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    assert 0.01 < values.std() < 0.03 and abs(values.mean()) < 1e-3
    read, blocks = llama_files.weight_bytes(file)
    inside = sum(p.numel() for p in model.model.layers.parameters())
    assert 4.5 / 8 * inside < blocks < 8.6 / 8 * inside
    assert read - blocks == 300 * 512 * 4.5 / 8 + 512 * 4


@pytest.mark.parametrize(
    ("runtime", "names"),
    [
        ("llama.cpp", ["llama-bf16", "llama-q8_0", "llama-q4_k_m"]),
        ("OpenVINO", ["openvino-int8", "openvino-int4-f32"]),
    ],
    ids=["llama.cpp", "OpenVINO"],
)
def test_every_program_that_is_installed_runs_a_model(
    runtime, names, benchmark, monkeypatch, capsys, tmp_path
) -> None:
    reason = benchmark.missing("tiny", benchmark.FORMS[names[0]], benchmark.DEMO)
    if reason is not None:
        pytest.skip(reason)
    model_forms = sys.modules["model_forms"]
    # Made here, and run by the programs that are installed there.
    for name in ("llama", "openvino-genai"):
        (tmp_path / name).symlink_to(model_forms.BENCH / name)
    monkeypatch.setattr(model_forms, "BENCH", tmp_path)
    monkeypatch.setitem(benchmark.SHAPES, "tiny", Phi3Config(**LARGER))
    monkeypatch.setattr(benchmark, "MODELS", ["tiny"])
    arguments = [*NUMBERS, "--prompts", "6", "9", "--together", "3", "--json", "--forms", *names]
    printed, _ = run(benchmark, monkeypatch, capsys, "tiny", *arguments)
    rows = json.loads(printed)
    assert [row["form"] for row in rows] == names
    parameters = 2 * (512 * 512 * 3 + 3 * 512 * 768) + 300 * 512
    for row in rows:
        assert row["runtime"] == runtime and row["decode_tokens_per_s"]["median"] > 0
        assert row["together_tokens_per_s"]["3"]["median"] > 0
        bits = 8 * row["bytes_per_token"] / parameters
        assert model_forms.FORMS[row["form"]].bits * 0.9 < bits < model_forms.FORMS[row["form"]].bits + 1.2
