"""Dense formats: the error of each code, its bytes, and GGUF's own quantisers."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from oats.errors import ConfigError
from oats.evaluate import dense_formats
from oats.evaluate.dense_formats import GROUP, DenseFormat

gguf = pytest.importorskip("gguf", reason="gguf is not installed")


@pytest.mark.parametrize("columns", [GROUP, 3 * GROUP + 40, 7])
def test_codes_are_the_nearest(columns) -> None:
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    for name, levels in (("int8", 254), ("int4", 15)):
        rounded, size = DenseFormat(name).round(weight)
        for start in range(0, columns, GROUP):
            group, near = weight[:, start : start + GROUP], rounded[:, start : start + GROUP]
            range_ = 2 * group.abs().amax(1) if name == "int8" else group.amax(1) - group.amin(1)
            # Half a step, and what a scale in float16 adds at the end of the range.
            assert ((group - near).abs().amax(1) <= range_ * (0.5 / levels + 2**-11) + 1e-7).all()
        assert (rounded[0] == 0).all()
        groups = 5 * -(-columns // GROUP)
        expected = 5 * columns + 2 * groups if name == "int8" else -(-5 * columns // 2) + 4 * groups
        assert size == expected


def test_weights_are_rounded_in_place_also_through_a_view() -> None:
    weight = torch.randn(64, 32)
    before = weight.clone()
    expected, size = DenseFormat("q8_0").round(weight.T)
    assert DenseFormat("q8_0").round_([weight.T]) == size == 34 * 64 * 32 // 32
    assert torch.equal(weight.T, expected) and not torch.equal(weight, before)


def test_gguf_formats_are_those_of_the_package() -> None:
    weight = torch.randn(4, 256)
    for name, kind in (("q8_0", gguf.GGMLQuantizationType.Q8_0), ("q4_0", gguf.GGMLQuantizationType.Q4_0)):
        codes = gguf.quants.quantize(weight.numpy(), kind)
        rounded, size = DenseFormat(name).round(weight)
        assert size == codes.nbytes
        assert np.array_equal(rounded.numpy(), gguf.quants.dequantize(codes, kind))
    with pytest.raises(ConfigError, match="Q8_0 takes weights with a multiple of 32 columns, not 40"):
        DenseFormat("q8_0").round(torch.randn(4, 40))


def test_q4_k_is_llama_cpps(monkeypatch, tmp_path) -> None:
    built = os.path.join(os.path.dirname(__file__), "../../.bench/llama/build/bin")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"q4_k needs llama[.]cpp's quantiser"):
        DenseFormat("q4_k")
    if not os.path.exists(f"{built}/libggml-base.so"):
        pytest.skip("llama.cpp is not built; benchmarks/install_peers.sh builds it")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", built)
    weight = torch.randn(16, 512)
    rounded, size = DenseFormat("q4_k").round(weight)
    assert size == 16 * 512 * 144 // 256
    errors = {
        name: (DenseFormat(name).round(weight)[0] - weight).norm() / weight.norm()
        for name in ("int4", "q8_0")
    }
    assert errors["q8_0"] < (rounded - weight).norm() / weight.norm() < errors["int4"]
    # Where the columns are no multiple of 256, llama.cpp takes Q5_0.
    narrow = weight[:, :384]
    codes = gguf.quants.quantize(narrow.contiguous().numpy(), gguf.GGMLQuantizationType.Q5_0)
    assert DenseFormat("q4_k").round(narrow)[1] == codes.nbytes
    # What llama.cpp and the package both write is the same.
    kind = gguf.GGMLQuantizationType.Q8_0
    array = weight.numpy()
    assert np.array_equal(dense_formats._by_llama_cpp(array, kind), gguf.quants.quantize(array, kind))
