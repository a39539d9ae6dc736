"""Models with random weights, where their decoding time goes, and the benchmark that is made of them."""

from __future__ import annotations

import json
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
            (name, type(m), getattr(m, "rank", None), getattr(m, "nnz", None), getattr(m, "dtype", None))
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


def test_the_benchmark(benchmark, monkeypatch, capsys) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "tiny", ARCHITECTURES["phi3"])
    numbers = ["--prompt=6", "--new-tokens=4", "--repetitions=2", "--compression=0.4"]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "tiny", "--worker", *numbers])
    benchmark.main()
    printed = capsys.readouterr().out
    rows = json.loads(printed)
    assert [(row["form"], row["compression"]) for row in rows] == [("oats", 0.4), ("dense", None)]
    for row in rows:
        speed, bandwidth = row["decode_tokens_per_s"]["median"], row["read_bytes_per_s"]["median"]
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes_per_token"] * speed / bandwidth)
        assert row["block_bytes"] == row["bytes_per_token"] - 61 * 48 * 2

    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, printed)

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    sys.argv.remove("--worker")
    benchmark.main()
    table = capsys.readouterr().out
    assert re.search(r"tiny +oats 40% bf16, random", table) and "dense bf16, random" in table
    assert commands[0][2] == "tiny" and {"--worker", "--prompt=6", "--compression=0.4"} <= set(commands[0])
    # One process for each form where both do not fit, and none for what does not fit at all.
    free = 3 << 30
    monkeypatch.setattr(benchmark, "memory", lambda *_: free)
    sizes = {"oats": 2 << 30, "dense": 2 << 30}
    monkeypatch.setattr(benchmark, "expected_bytes", lambda model, form, _: sizes[form])
    for dense, expected in ((2 << 30, [["oats"], ["dense"]]), (3 << 30, [["oats"]])):
        commands.clear()
        sizes["dense"] = dense
        benchmark.main()
        assert [command[command.index("--forms") + 1 :] for command in commands] == expected
    assert "tiny dense left out: it needs 161.1 MB more memory" in capsys.readouterr().err


def test_the_benchmark_says_what_is_missing(benchmark, monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "BENCH", tmp_path)
    for arguments, message in (
        (["gpt"], "unknown model gpt"),
        (["--demo", str(tmp_path)], "run `make demo` first"),
        (
            ["phi-3-mini", "--forms", "llama-q8_0"],
            "llama.cpp is not built; benchmarks/install_peers.sh does it",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["end_to_end.py", *arguments])
        with pytest.raises(SystemExit):
            benchmark.main()
        assert message in capsys.readouterr().err


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


def test_llama_cpp_generates_from_such_a_file(benchmark, monkeypatch, capsys) -> None:
    llama_files = load_script("benchmarks/llama_files.py")

    if not (llama_files.BENCH / "version").exists():
        pytest.skip("llama.cpp is not built; benchmarks/install_peers.sh builds it")
    monkeypatch.setitem(benchmark.SHAPES, "tiny", Phi3Config(**LARGER))
    numbers = ["--prompt=6", "--new-tokens=4", "--repetitions=2"]
    forms = ["oats", "llama-q8_0", "llama-q4_k_m"]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", "tiny", "--worker", *numbers, "--forms", *forms])
    benchmark.main()
    rows = {row["form"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == forms
    for form in forms[1:]:
        assert rows[form]["compression"] is None and rows[form]["decode_seconds"] is None
        assert rows[form]["decode_tokens_per_s"]["median"] > 0
    parameters = 2 * (512 * 512 * 3 + 3 * 512 * 768)
    assert 8.5 / 8 * parameters < rows["llama-q8_0"]["block_bytes"] < 8.6 / 8 * parameters
    assert 4.5 / 8 * parameters < rows["llama-q4_k_m"]["block_bytes"] < 5.5 / 8 * parameters
    benchmark.show(list(rows.values()), benchmark.argparse.Namespace(prompt=6, new_tokens=4, repetitions=2))
    assert "llama.cpp Q4_K_M, random" in capsys.readouterr().out
