"""What a compression is predicted to take is enough, by the operating system's own count."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from oats import ConfigError, OatsConfig, decompose, decompose_hessian
from oats.compression.memory import (
    Limit,
    decomposition_bytes,
    parse_size,
    peak_bytes,
    resident_bytes,
    return_freed,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def growth(function) -> int:
    """By how much the peak of a process rises over what it starts with."""
    return_freed()  # else the child would use what this process freed
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = resident_bytes()
        function()
        os.write(write, str(peak_bytes() - before).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return int(os.read(read, 100))


@pytest.mark.parametrize(
    ("method", "svd", "shape"),
    [
        ("oats", "fast", (3072, 2048)),
        ("oats", "fast", (1024, 4096)),
        ("oats", "exact", (1024, 1024)),
        ("oats-hessian", "fast", (1536, 1024)),
        ("oats-hessian", "fast", (512, 2048)),
        ("oats-hessian", "exact", (512, 512)),
    ],
)
def test_a_decomposition_keeps_to_its_prediction(method, svd, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).bfloat16()
    config = OatsConfig(method=method, svd=svd, iterations=1 if svd == "exact" else 3)
    options = {"svd": svd, "iterations": config.iterations}
    if method == "oats":
        grown = growth(lambda: decompose(weight, torch.ones(shape[1]), **options))
    else:
        hessian = torch.eye(shape[1])
        grown = growth(lambda: decompose_hessian(weight, hessian, **options))
    predicted = decomposition_bytes(*shape, config)
    # At least the matrix in float32 and what is made of it: else nothing was measured.
    assert 12 * weight.numel() < grown < predicted, (grown, predicted)


def test_the_peak_is_counted() -> None:
    before = resident_bytes()
    block = torch.ones(50_000_000)
    resident = resident_bytes()
    # Read after it: what is read in between counts too.
    assert peak_bytes() >= resident > before + 150_000_000
    del block
    assert peak_bytes() > before + 150_000_000


@pytest.mark.parametrize("text", ["", "6", "GB", "-1GB", "6 XB", "0GB"])
def test_a_size_has_a_number_and_a_unit(text) -> None:
    if text == "6":
        assert parse_size(text) == 6
    else:
        with pytest.raises(ConfigError, match="a size is a number and a unit"):
            parse_size(text)


def test_a_limit_says_what_takes_how_much() -> None:
    Limit(None).check_need({"weights": 10**15})
    Limit(5).check_need({"weights": 4, "rest": 1})
    with pytest.raises(
        ConfigError, match=r"about 6\.00 GB.*limit of 5\.00 GB: 4\.00 GB for weights, 2\.00 GB"
    ):
        Limit(5 * 10**9).check_need({"weights": 4 * 10**9, "rest": 2 * 10**9, "none": 0})
