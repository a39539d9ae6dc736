from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats.errors import FormatError
from oats.format.bitmask import decode, encode
from oats.format.validation import validate
from tests.conftest import random_layer


@given(d_out=st.integers(1, 20), d_in=st.integers(1, 40), density=st.floats(0, 1), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_encode_decode(d_out: int, d_in: int, density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sparse = torch.randn(d_out, d_in, generator=g) * (torch.rand(d_out, d_in, generator=g) < density)
    mask, values = encode(sparse)
    assert mask.shape == (d_out, (d_in + 7) // 8) and values.numel() == sparse.count_nonzero()
    assert torch.equal(decode(mask, values, d_in), sparse)


def test_bit_order_is_least_significant_first() -> None:
    sparse = torch.zeros(1, 10)
    sparse[0, [0, 3, 9]] = torch.tensor([1.0, 2.0, 3.0])
    mask, values = encode(sparse)
    assert mask.tolist() == [[0b00001001, 0b00000010]]
    assert values.tolist() == [1.0, 2.0, 3.0]


def damage(layer, **changes):
    return {**layer, **changes}


LAYER = random_layer(12, 20, 3, 0.5, torch.bfloat16)
BROKEN = {
    "population": (damage(LAYER, values=LAYER["values"][:-1]), r"mask keeps \d+ values but \d+ are stored"),
    "padding": (damage(LAYER, mask=LAYER["mask"] | 128), "past its last input"),
    "mask shape": (damage(LAYER, mask=LAYER["mask"][:, :2]), "mask is uint8"),
    "mask dtype": (damage(LAYER, mask=LAYER["mask"].int()), "mask is int32"),
    "value dtype": (damage(LAYER, values=LAYER["values"].half()), "values are float16"),
    "factor dtype": (damage(LAYER, low_rank_u=LAYER["low_rank_u"].float()), "low_rank_u is float32"),
    "factor shape": (damage(LAYER, low_rank_v=LAYER["low_rank_v"].T.contiguous()), "low_rank_"),
    "bias": (damage(LAYER, bias=torch.zeros(11)), r"bias is float32 \(11,\), expected .*\(12,\)"),
    "rank": (damage(LAYER, low_rank_v=LAYER["low_rank_v"][:2]), "low_rank_u is bfloat16"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_layer_and_fault(name: str) -> None:
    tensors, message = BROKEN[name]
    with pytest.raises(FormatError, match=message) as caught:
        validate("model.layers.3.q_proj", 12, 20, **tensors)
    assert str(caught.value).startswith("model.layers.3.q_proj: ")


def test_validate_accepts_what_encode_made() -> None:
    validate("layer", 12, 20, **LAYER)
