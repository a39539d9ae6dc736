"""Every kernel x ISA or CUDA x dtype x shape class against float64, with tolerances derived from norms."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oats.errors import FormatError, WeightError
from oats.format.bitmask import decode
from oats.kernels.isa import active_isa
from oats.kernels.keep_largest import keep_largest_in_rows
from oats.kernels.packing import pack, packed_isa, unpack
from oats.kernels.sparse_low_rank_linear import linear, linear_joined, linear_many
from tests.backends import BACKENDS, CPU_BACKENDS, EMULATED, Backend
from tests.conftest import DTYPES, ISAS, random_layer, spec_of

# d_out, d_in, rank, density
SHAPES = [
    (1, 1, 1, 1.0),
    (1, 1, 0, 0.0),
    (7, 13, 3, 0.5),
    (16, 64, 5, 1.0),
    (64, 48, 0, 0.4),
    (33, 65, 17, 0.0),
    (130, 257, 31, 1.0),
    (640, 2048, 60, 0.375),
    (1, 1, 0, None),
    (33, 65, 17, None),
    (640, 1030, 31, None),
]
BATCHES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 33, 48, 65, 100, 129]


def reference(layer: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y = S x + U (V x) + b in float64, and the sum of the magnitudes of all its terms."""
    d_in, values = layer["low_rank_v"].shape[1], layer["values"].double()
    sparse = decode(layer["mask"], values, d_in) if "mask" in layer else values.view(-1, d_in)
    u, v, x = layer["low_rank_u"].double(), layer["low_rank_v"].double(), x.double()
    b = torch.zeros(sparse.shape[0]).double() if bias is None else bias.double()
    y = x @ sparse.T + (x @ v.T) @ u.T + b
    size = x.abs() @ sparse.abs().T + (x.abs() @ v.abs().T) @ u.abs().T + b.abs()
    return y, size


def assert_close(y: Tensor, layer: dict[str, Tensor], x: Tensor, bias: Tensor | None) -> None:
    """|y - ŷ| <= c u (|S||x| + |U|(|V||x|) + |b|).

    Sums are fp32: their error grows at most with their length, and with its square root in
    practice. 16 bits add two roundings: of V x, and of the output.
    """
    expected, size = reference(layer, x, bias)
    d_in, rank = x.shape[-1], layer["low_rank_v"].shape[0]
    c = 2**-24 * (8 + 4 * (d_in**0.5 + rank**0.5))
    if y.dtype != torch.float32:
        unit = torch.finfo(y.dtype).eps / 2
        c += 2 * unit * (1 + unit)
        size = size + torch.finfo(y.dtype).smallest_normal
    excess = (y.double() - expected).abs() - c * size
    assert excess.max() <= 0, f"error exceeds its bound by {excess.max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int, float | None]
) -> None:
    d_out, d_in = shape[:2]
    layer = random_layer(*shape, dtype)
    packed = backend.pack(layer)
    assert backend.is_cuda or packed_isa(packed.tensor) == backend.name
    for batch in BATCHES:
        x = torch.randn(batch, d_in).to(dtype)
        bias = torch.randn(d_out).to(dtype) if batch % 2 else None
        assert_close(packed.linear(x, bias), layer, x, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_large_odd_shape(isa: str, dtype: torch.dtype) -> None:
    layer = random_layer(4097, 11008, 33, 0.05, dtype)
    packed = pack(layer, spec_of(layer), isa=isa)
    for batch in (1, 6):
        x = torch.randn(batch, 11008).to(dtype)
        assert_close(linear(x, packed, None, spec_of(layer)), layer, x, None)


@pytest.mark.parametrize("isa", ISAS)
def test_more_columns_than_are_held_at_once(isa: str) -> None:
    for density in (0.4, None):
        layer = random_layer(50, 70, 9, density, torch.bfloat16)
        packed = pack(layer, spec_of(layer), isa=isa)
        x = torch.randn(1100, 70).bfloat16()
        bias = torch.randn(50).bfloat16()
        assert_close(linear(x, packed, bias, spec_of(layer)), layer, x, bias)


@given(
    d_out=st.integers(1, 70),
    d_in=st.integers(1, 150),
    rank=st.integers(0, 40),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0, None]),
    batch=st.integers(1, 150),
    backend=st.sampled_from([*CPU_BACKENDS, EMULATED]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(d_out, d_in, rank, density, batch, backend, dtype, seed) -> None:
    layer = random_layer(d_out, d_in, rank, density, dtype, seed)
    packed = backend.pack(layer)
    for name, tensor in packed.unpack().items():
        assert torch.equal(tensor, layer[name]), name
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_close(packed.linear(x), layer, x, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_input_layouts(backend: Backend, dtype: torch.dtype) -> None:
    layer = random_layer(48, 70, 6, 0.4, dtype)
    packed = backend.pack(layer)
    wide = torch.randn(9, 100).to(dtype)
    inputs = {
        "leading dimension": wide[:, 5:75],
        "every other row": torch.randn(18, 70).to(dtype)[::2],
        "transposed": torch.randn(70, 9).to(dtype).T,
        "broadcast": torch.randn(1, 70).to(dtype).expand(9, 70),
        "reversed order of axes": torch.randn(3, 70, 3).to(dtype).transpose(1, 2),
        "one vector": torch.randn(70).to(dtype),
        "odd address": torch.randn(1 + 9 * 70).to(dtype)[1:].view(9, 70),
        "no rows": torch.randn(0, 70).to(dtype),
    }
    for name, x in inputs.items():
        y = packed.linear(x)
        assert y.shape == (*x.shape[:-1], 48), name
        if x.numel():
            assert_close(y, layer, x, None)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_extreme_values(backend: Backend) -> None:
    layer = random_layer(32, 32, 0, 1.0, torch.float32)
    x = torch.zeros(2, 32)
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    y = backend.pack(layer).linear(x)
    assert y[0].isnan().all() and not y[1].isfinite().any()
    # A NaN sum must not round to infinity or to a number in bf16.
    layer = random_layer(32, 32, 2, 0.5, torch.bfloat16)
    assert backend.pack(layer).linear(x[:1].bfloat16()).isnan().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 5, 40, 200])
def test_bit_equal_for_any_thread_count(isa: str, batch: int) -> None:
    layer = random_layer(400, 700, 50, 0.4, torch.bfloat16)
    packed = pack(layer, spec_of(layer), isa=isa)
    x = torch.randn(batch, 700).bfloat16()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(linear(x, packed, None, spec_of(layer)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_many_projections_are_bit_equal_to_single_calls(isa: str, dtype: torch.dtype) -> None:
    # d_out, rank, density: more and fewer rows than a block, no low-rank part, nothing sparse.
    shapes = [(200, 70, 0.4), (1, 1, 1.0), (150, 0, 0.5), (67, 20, 0.0), (300, 9, 0.1), (130, 5, None)]
    d_in = 190
    projections = []
    for seed, (d_out, rank, density) in enumerate(shapes):
        layer = random_layer(d_out, d_in, rank, density, dtype, seed)
        bias = torch.randn(d_out).to(dtype) if seed % 2 else None
        projections.append((pack(layer, spec_of(layer), isa=isa), bias, spec_of(layer)))
    for batch in (1, 2, 5, 16, 40, 100, 600):
        x = torch.randn(batch, d_in).to(dtype)
        expected = [linear(x, *projection) for projection in projections]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for part in (slice(None), slice(2, 3), slice(2)):
                chosen, alone = projections[part], expected[part]
                assert all(map(torch.equal, linear_many(x, chosen), alone)), (batch, threads)
                assert torch.equal(linear_joined(x, chosen), torch.cat(alone, -1)), (batch, threads)


@pytest.mark.parametrize("shape", [(70,), (2, 3, 70), (0, 70)], ids=str)
def test_many_projections_of_any_input(shape: tuple[int, ...]) -> None:
    # Packed for several instruction sets: they cannot share their activations.
    layers = [random_layer(48, 70, 6, 0.4, torch.float32, seed) for seed in range(4)]
    projections = [
        (pack(layer, spec_of(layer), isa=ISAS[-(i % 2)]), None, spec_of(layer))
        for i, layer in enumerate(layers)
    ]
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 140)[..., ::2]):
        expected = [linear(x, *projection) for projection in projections]
        assert all(map(torch.equal, linear_many(x, projections), expected))
        assert torch.equal(linear_joined(x, projections), torch.cat(expected, -1))


def test_uneven_rows_split_by_bytes() -> None:
    layer = random_layer(256, 512, 8, 0.0, torch.float32)
    from oats.format.bitmask import encode

    sparse = torch.zeros(256, 512)
    sparse[250:] = torch.randn(6, 512) + 10
    layer["mask"], layer["values"] = encode(sparse)
    x = torch.randn(3, 512)
    torch.set_num_threads(2)
    assert_close(linear(x, pack(layer, spec_of(layer)), None, spec_of(layer)), layer, x, None)


def test_two_python_threads_at_once() -> None:
    layer = random_layer(320, 640, 30, 0.4, torch.bfloat16)
    spec = spec_of(layer)
    packed = pack(layer, spec)
    inputs = [torch.randn(1 + i, 640).bfloat16() for i in range(4)]
    expected = [linear(x, packed, None, spec) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(linear(inputs[i], packed, None, spec), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_isa_is_forced_and_clamped(monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in ISAS:
        monkeypatch.setenv("OATS_ISA", isa)
        assert active_isa() == isa
    monkeypatch.setenv("OATS_ISA", "amx_bf16")
    assert active_isa() == ISAS[-1]


def test_damaged_packed_weight_is_refused() -> None:
    layer = random_layer(16, 16, 2, 0.5, torch.float32)
    spec = spec_of(layer)
    packed = pack(layer, spec)
    x = torch.randn(1, 16)
    header = packed.clone()
    header[16] += 1  # d_out
    for broken in (
        header,
        packed[:-64].clone(),
        torch.zeros_like(packed),
        packed[:8].clone(),
        packed.float(),
    ):
        with pytest.raises(FormatError):
            torch.ops.oats.sparse_low_rank_linear(x, broken, None, 16, 2, spec.nnz)


def test_sizes_that_are_not_those_of_the_packed_weight_are_refused() -> None:
    layer = random_layer(16, 24, 2, 0.5, torch.float32)
    spec = spec_of(layer)
    packed = pack(layer, spec)
    for other in ({"d_out": 15}, {"d_in": 23}, {"rank": 3}, {"nnz": 1}, {"dtype": torch.bfloat16}):
        wrong = replace(spec, **other)
        with pytest.raises(FormatError, match="pack the weight again"):
            unpack(packed, wrong)
        with pytest.raises(FormatError, match="pack the weight again"):
            torch.ops.oats.to_dense(packed, *wrong.sizes, wrong.dtype)
    for rank, nnz in ((3, spec.nnz), (2, 1)):
        with pytest.raises(ValueError, match=f"rank {rank} and nnz {nnz}"):
            torch.ops.oats.sparse_low_rank_linear(torch.randn(1, 24), packed, None, 16, rank, nnz)


def test_keep_largest_refuses_what_it_cannot_read() -> None:
    for rows in (torch.ones(2, 4).bfloat16(), torch.ones(4), torch.ones(2, 4, device="meta")):
        with pytest.raises(WeightError, match="expected 2-D float32 or float64"):
            keep_largest_in_rows(rows, 2)


@pytest.mark.parametrize("count", [0, 1, 3, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [64, 65, 500])
@pytest.mark.parametrize("backend", [CPU_BACKENDS[0], *BACKENDS[len(CPU_BACKENDS) :]], ids=str)
def test_keep_largest_in_rows(backend: Backend, columns: int, dtype: torch.dtype, count: int) -> None:
    g = torch.Generator().manual_seed(columns + count)
    normal = torch.randn(20, columns, dtype=dtype, generator=g)
    for rows in (
        normal,
        (normal * 2).round(),
        torch.exp(normal * 20) * normal.sign(),
        torch.zeros_like(normal),
    ):
        order = rows.abs().sort(dim=1, descending=True, stable=True).indices[:, :count]
        expected = torch.zeros_like(rows).scatter(1, order, rows.gather(1, order))
        assert torch.equal(backend.keep_largest_in_rows(rows, count), expected)
