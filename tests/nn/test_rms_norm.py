"""Norms in one call: what they return, and where they leave the work to torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from oats.nn.fusion import rms_norm
from oats.nn.fusion.known_forward import known_class
from oats.nn.fusion.rms_norm import fuse_norms_
from tests.conftest import DTYPES

KINDS = [LlamaRMSNorm, Phi3RMSNorm, MistralRMSNorm, Qwen3RMSNorm, Gemma2RMSNorm, Gemma3RMSNorm]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the fused norm."""
    seen: list[Tensor] = []
    original: Callable[..., Tensor] = rms_norm.rms_norm

    def counted(x: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(x)
        return original(x, *args, **options)

    monkeypatch.setattr(rms_norm, "rms_norm", counted)
    return seen


def norm(kind: type[nn.Module], columns: int, dtype: torch.dtype, eps: float = 1e-6) -> nn.Module:
    module = kind(columns, eps)
    nn.init.normal_(module.weight)
    fuse_norms_(module)
    return module.to(dtype).requires_grad_(False)


def exact(module: nn.Module, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result in float64, and the size of what multiplies the rounding errors."""
    x, weight = x.double(), module.weight.double()
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    plus = isinstance(module, Gemma2RMSNorm | Gemma3RMSNorm)
    return normed * (1 + weight) if plus else normed * weight, normed.abs() * (weight.abs() + plus)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: type[nn.Module], dtype: torch.dtype, calls: list[Tensor]) -> None:
    shapes = [(1,), (3, 1), (2, 3, 15), (1, 1, 16), (5, 17), (1, 640), (2, 129, 640), (0, 8)]
    for shape in shapes:
        for scale in (1e-4, 1.0, 1e4):
            module = norm(kind, shape[-1], dtype)
            x = (scale * torch.randn(shape)).to(dtype)
            y = module(x)
            assert y.shape == x.shape and y.dtype == dtype
            expected, size = exact(module, x, 1e-6)
            # The sum of squares, the root, two products; of bf16 two roundings.
            c = 2**-24 * (8 + shape[-1] / 16)
            c += (2 * 2**-8 * (1 + 2**-8)) * (dtype == torch.bfloat16)
            assert bool(((y.double() - expected).abs() <= c * size + 1e-38).all()), shape
    assert len(calls) == 3 * len(shapes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_is_that_of_the_class(kind: type[nn.Module]) -> None:
    """Bit for bit in bf16, but where the order of the sum decides a rounding."""
    module = norm(kind, 640, torch.bfloat16)
    x = torch.randn(200, 640).bfloat16()
    different = module(x) != known_class(module).forward(module, x)
    assert different.float().mean() < 1e-3


def test_extreme_inputs_are_as_in_torch() -> None:
    module = norm(LlamaRMSNorm, 64, torch.float32)
    for value in (0.0, float("inf"), float("nan"), 1e30, 1e-30):
        x = torch.ones(2, 64)
        x[0, 3] = value
        torch.testing.assert_close(module(x), known_class(module).forward(module, x), equal_nan=True)


def test_where_torch_does_the_work(calls: list[Tensor]) -> None:
    module = norm(LlamaRMSNorm, 24, torch.float32)
    x = torch.randn(4, 5, 24)
    plain = known_class(module).forward
    for other in (x.transpose(0, 1), x.double(), x.bfloat16(), x.clone().requires_grad_(True)):
        assert torch.equal(module(other), plain(module, other))
    with pytest.raises(RuntimeError, match="must match"):
        module(torch.randn(2, 23))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), plain(module, x))
    assert not calls
    module(x)
    assert len(calls) == 1
    module.weight.requires_grad_(True)
    module(x).sum().backward()
    assert module.weight.grad is not None and len(calls) == 1
    with torch.no_grad():
        module(x)
    assert len(calls) == 2


def test_other_norms_stay() -> None:
    class Other(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states * self.weight

    class Halved(Gemma3RMSNorm):
        def _norm(self, x: Tensor) -> Tensor:
            return x / 2

    for module in (Other(8), Halved(8), nn.RMSNorm(8), nn.LayerNorm(8)):
        kind = type(module)
        fuse_norms_(module)
        assert type(module) is kind


def test_fused_once_copied_and_pickled(calls: list[Tensor]) -> None:
    module = norm(Gemma3RMSNorm, 16, torch.float32)
    kind = type(module)
    fuse_norms_(module)
    assert type(module) is kind and known_class(module) is Gemma3RMSNorm
    assert repr(module).startswith("Gemma3RMSNorm")
    x = torch.randn(3, 16)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is kind and torch.equal(other(x), module(x))
    assert len(calls) == 4
    heard: list[nn.Module] = []
    module.register_forward_hook(lambda m, *_: heard.append(m))
    module(x)
    assert heard == [module]


def test_what_others_do_to_a_class_or_a_weight() -> None:
    module = norm(LlamaRMSNorm, 16, torch.float32)
    x = torch.randn(3, 16)
    expected = module(x)
    module.__class__ = type("Sharded", (type(module),), {})
    assert torch.equal(module(x), expected) and known_class(module) is LlamaRMSNorm
    torch.testing.assert_close(module(x.double()).float(), expected)
    parametrized = norm(LlamaRMSNorm, 16, torch.float32)
    parametrized.weight = module.weight
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    torch.testing.assert_close(parametrized(x), expected)
    torch.testing.assert_close(torch.func.vmap(module)(x), expected)
