from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import oats
from oats.errors import ConfigError, FormatError
from oats.format.layer_spec import TENSORS
from oats.kernels.isa import active_isa
from oats.kernels.packing import packed_isa
from oats.nn.sparse_low_rank_linear import SparseLowRankLinear
from tests.backends import DEVICES, needs_cuda
from tests.compiler import needs_compiler
from tests.conftest import DTYPES, ISAS, random_layer
from tests.rounding import assert_equal_sums


def make(dtype: torch.dtype = torch.float32, bias: bool = True, device: str = "cpu") -> SparseLowRankLinear:
    torch.manual_seed(0)
    tensors = random_layer(40, 56, 5, 0.4, dtype)
    return SparseLowRankLinear.from_canonical(tensors, 56, torch.randn(40) if bias else None).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_like_a_dense_linear(dtype: torch.dtype, device: str) -> None:
    layer = make(dtype, device=device)
    x = torch.randn(2, 3, 56).to(device, dtype)
    dense = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    # In bf16 the dense weight, V x and y are rounded.
    assert_equal_sums(layer(x).float(), dense, 2 if dtype == torch.bfloat16 else 56 + layer.rank, dtype)
    assert layer.weight.shape == (40, 56) and layer.weight.dtype == layer.dtype == dtype
    assert layer(x).dtype == dtype


def test_from_linear_and_decomposition_agree() -> None:
    linear, moment = nn.Linear(64, 32), torch.rand(64) + 0.1
    config = oats.OatsConfig(compression=0.4)
    layer = SparseLowRankLinear.from_linear(linear, moment, config)
    decomposition = oats.decompose(linear.weight, moment, compression=0.4)
    assert_equal_sums(layer.to_dense(), decomposition.to_dense(), layer.rank + 1)
    assert torch.equal(layer.bias, linear.bias) and layer.bias.data_ptr() != 0
    assert (layer.rank, layer.nnz) == (decomposition.rank, decomposition.nnz)
    half = SparseLowRankLinear.from_decomposition(decomposition, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.bias is None
    with pytest.raises(ConfigError, match="float16"):
        SparseLowRankLinear.from_decomposition(decomposition, dtype=torch.float16)


def test_extra_repr() -> None:
    text = repr(make())
    for part in ("in_features=56", "out_features=40", "rank=5", "density=0.", "isa=" + active_isa()):
        assert part in text


@pytest.mark.parametrize("device", DEVICES)
def test_state_dict_is_canonical_both_ways(device: str) -> None:
    layer = make(torch.bfloat16, device=device)
    state = layer.state_dict()
    assert set(state) == {*TENSORS, "bias", "weight"}
    assert state["weight"].shape == (1,)  # the marker
    other = SparseLowRankLinear(56, 40, layer.rank, layer.nnz, dtype=torch.bfloat16, device=device)
    other.load_state_dict(state)
    x = torch.randn(3, 56).bfloat16().to(device)
    assert torch.equal(layer(x), other(x))
    packed = make(torch.bfloat16, device=device)
    packed.load_state_dict(state, assign=True)
    assert torch.equal(layer(x), packed(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*values"):
        other.load_state_dict({k: v for k, v in state.items() if k != "values"})
    state["mask"] = torch.zeros_like(state["mask"])
    with pytest.raises(FormatError, match="mask keeps 0 values"):
        other.load_state_dict(state)


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_in_this_process_is_packed_and_of_its_own(device: str) -> None:
    layer = make(device=device)
    other = copy.deepcopy(layer)
    assert torch.equal(other.packed, layer.packed) and other.packed.data_ptr() % 64 == 0
    x = torch.ones(56, device=device)
    assert torch.equal(layer(x), other(x))
    expected = layer.to_dense()
    other.packed.zero_()
    other.bias.data.zero_()
    assert torch.equal(layer.to_dense(), expected) and layer.bias.abs().sum() > 0
    twice = copy.deepcopy(nn.ModuleList([layer, layer]))
    assert twice[0] is twice[1]


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_what_leaves_the_process_is_canonical(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    if how == "pickle":
        data = pickle.dumps(layer)
        # A weaker machine reads what a stronger one wrote.
        monkeypatch.setenv("OATS_ISA", "scalar")
        other = pickle.loads(data)
        assert packed_isa(other.packed) == "scalar"
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(layer.to_dense(), other.to_dense(), rtol=0, atol=0)
    assert_equal_sums(layer(torch.ones(56)), other(torch.ones(56)), 56 + layer.rank)


@pytest.mark.parametrize("device", DEVICES)
def test_dtype_conversion(device: str) -> None:
    model = nn.Sequential(make(device=device), nn.ReLU())
    before = model[0].to_dense()
    model.to(torch.bfloat16)
    assert (
        model[0].dtype == torch.bfloat16
        and model(torch.ones(56, dtype=torch.bfloat16, device=device)).dtype == torch.bfloat16
    )
    model.float()
    torch.testing.assert_close(model[0].to_dense(), before, rtol=2**-6, atol=2**-6)
    with pytest.raises(ConfigError, match="float16"):
        model.half()
    assert model(torch.ones(56, device=device)).dtype == torch.float32


@needs_cuda
def test_to_cuda_and_back() -> None:
    layer = make(torch.bfloat16)
    state, packed = layer.state_dict(), layer.packed.clone()
    layer.cuda()
    assert layer.packed.is_cuda and layer.bias.is_cuda and "isa=cuda" in repr(layer)
    held = layer.packed
    assert layer.cuda().packed is held
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer.cpu().packed, packed)


def test_packed_is_held_once() -> None:
    layer = make(torch.bfloat16)
    assert all(getattr(layer, name) is None for name in TENSORS)
    assert [name for name, _ in layer.named_buffers()] == ["packed"]


def test_unpacked_packs_itself() -> None:
    tensors = random_layer(40, 56, 5, 0.4, torch.float32)
    layer = SparseLowRankLinear(56, 40, 5, tensors["values"].numel(), bias=False)
    for name in TENSORS:
        setattr(layer, name, tensors[name])
    assert layer(torch.ones(56)).shape == (40,) and layer.packed is not None


def test_wrong_input_is_a_clear_error() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"input is torch.bfloat16 but the layer is torch.float32"):
        layer(torch.ones(56, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"shape \(3, 55\), expected \(..., 56\)"):
        layer(torch.ones(3, 55))
    with pytest.raises(ValueError, match="expected"):
        layer(torch.tensor(1.0))
    with pytest.raises(FormatError, match="the weight is on meta"):
        SparseLowRankLinear(8, 8, 1, 4, device="meta").pack_("model.q_proj")


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_input_and_bias(device: str) -> None:
    layer = make(device=device)
    layer.bias.requires_grad_(True)
    x = torch.randn(4, 56, device=device, requires_grad=True)
    layer(x).square().sum().backward()
    dense, bias = layer.to_dense(), layer.bias.detach().clone().requires_grad_(True)
    other = x.detach().clone().requires_grad_(True)
    nn.functional.linear(other, dense, bias).square().sum().backward()
    assert_equal_sums(x.grad, other.grad, 40 + 56 + layer.rank)
    assert_equal_sums(layer.bias.grad, bias.grad, 4 + 56 + layer.rank)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    layer = make(dtype, device=device)
    linear, to_dense = torch.ops.oats.sparse_low_rank_linear, torch.ops.oats.to_dense
    rest = (40, layer.rank, layer.nnz)
    for x in (torch.randn(3, 56), torch.randn(2, 3, 56)):
        x = x.to(device, dtype)
        torch.library.opcheck(linear, (x, layer.packed, layer.bias, *rest))
        x = x.clone().requires_grad_(True)
        torch.library.opcheck(linear, (x, layer.packed, None, *rest))
    torch.library.opcheck(to_dense, (layer.packed, *layer.spec.sizes, dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_operator_is_taken_where_a_kernel_call_would_not_be_seen() -> None:
    layer, x = make(bias=False), torch.randn(3, 56)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(2 * x), layer(2 * x))
        graph = make_fx(layer)(x)
        torch.testing.assert_close(graph(2 * x), layer(2 * x))
        torch.testing.assert_close(layer(torch._neg_view(x)), -layer(x))
    assert layer(torch.ones(2, 56, device="meta")).device.type == "meta"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    layer = make(device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(torch.ones(2, 56, dtype=torch.bfloat16, device=device))
    assert torch.equal(y, layer(torch.ones(2, 56, device=device)))


def test_bias_is_checked_and_owned() -> None:
    tensors = random_layer(40, 56, 5, 0.4, torch.bfloat16)
    with pytest.raises(FormatError, match=r"bias is float32 \(3,\), expected .*\(40,\)"):
        SparseLowRankLinear.from_canonical(tensors, 56, torch.zeros(3))
    wide = torch.randn(80)
    layer = SparseLowRankLinear.from_canonical(tensors, 56, wide[::2])
    without = SparseLowRankLinear.from_canonical(tensors, 56)
    x = torch.zeros(1, 56, dtype=torch.bfloat16)
    assert torch.equal(layer(x)[0], wide[::2].bfloat16()) and not without(x).any()
    wide.zero_()
    assert layer(x).any()
    state = layer.state_dict()
    state["bias"] = state["bias"].float()
    layer.load_state_dict(state, assign=True)
    assert layer.bias.dtype == torch.bfloat16 and layer(x).any()
    wide = torch.randn(80).bfloat16()
    layer.bias = nn.Parameter(wide[::2], requires_grad=False)
    assert torch.equal(layer(x)[0], wide[::2])
    layer.bias = nn.Parameter(torch.zeros(3).bfloat16(), requires_grad=False)
    with pytest.raises(ValueError, match="bias is"):
        layer(x)


def test_to_empty_then_load() -> None:
    layer, state = make(), make().state_dict()
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)
    assert torch.equal(layer(torch.ones(56)), make()(torch.ones(56)))


@needs_compiler
def test_compile_with_the_default_backend() -> None:
    model = nn.Sequential(make(), nn.ReLU())
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(torch.ones(2, 56)), model(torch.ones(2, 56))
        )


def test_operator_checks_its_arguments() -> None:
    layer = make()
    op = torch.ops.oats.sparse_low_rank_linear
    for x, bias, d_out in [
        (torch.ones(2, 55), None, 40),
        (torch.ones(2, 56).double(), None, 40),
        (torch.ones(2, 56), torch.ones(39), 40),
        (torch.ones(2, 56), None, 41),
    ]:
        with pytest.raises(ValueError, match=r"expected|outputs"):
            op(x, layer.packed, bias, d_out, layer.rank, layer.nnz)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool, device: str) -> None:
    model = nn.Sequential(
        make(), nn.GELU(), SparseLowRankLinear.from_canonical(random_layer(8, 40, 2, 0.5, torch.float32), 40)
    ).to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (1, 5):
        x = torch.randn(batch, 56, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("device", DEVICES)
def test_export(device: str) -> None:
    model = nn.Sequential(make(device=device), nn.ReLU())
    x = torch.randn(3, 56, device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), model(x))


def test_unknown_oats_isa_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OATS_ISA", "AVX2")
    with pytest.raises(ConfigError, match="OATS_ISA is 'AVX2', expected one of scalar, avx2"):
        make()


@pytest.mark.parametrize("isa", ISAS)
def test_oats_isa_decides_the_packing(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OATS_ISA", isa)
    assert f"isa={isa}" in repr(make())
