import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oats
from oats import OatsConfig, decompose
from oats.decomposition import alternating, subspace
from oats.decomposition.alternating import decompose_batch
from oats.decomposition.budget import nnz_per_layer, nnz_per_row, rank_for
from oats.decomposition.selection import keep_largest
from oats.errors import ConfigError, WeightError
from tests import reference
from tests.backends import DEVICES
from tests.rounding import assert_equal_sums, condition_of_truncation

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weight(kind, d_out, d_in, seed=0):
    if kind == "gaussian":
        return normal(d_out, d_in, seed=seed)
    if kind == "heavy":  # Student's t with 3 degrees of freedom
        chi = sum(normal(d_out, d_in, seed=seed + i) ** 2 for i in (1, 2, 3))
        return normal(d_out, d_in, seed=seed) / (chi / 3).sqrt()
    inner = min(d_out, d_in) // 8
    return normal(d_out, inner, seed=seed) @ normal(inner, d_in, seed=seed + 1) / inner**0.5 + 0.3 * normal(
        d_out, d_in, seed=seed + 2
    )


def make_moment(kind, d_in, seed=0):
    generator = torch.Generator().manual_seed(seed + 99)
    if kind == "ones":
        return torch.ones(d_in)
    if kind == "decades":
        return 10 ** (torch.rand(d_in, generator=generator) * 6 - 3)
    moment = torch.exp(torch.randn(d_in, generator=generator))
    moment[::97] *= 1e5
    return moment


def decompose_on(device, weight, moment, **settings):
    """Decompose on a device, and bring the parts back to the CPU."""
    result = oats.decompose(weight.to(device), moment.to(device), **settings)
    assert result.sparse.device.type == device
    parts = {name: getattr(result, name).cpu() for name in ("sparse", "low_rank_u", "low_rank_v")}
    return dataclasses.replace(result, **parts)


def true_error(weight, moment, result):
    root = moment.double().sqrt()
    approximation = result.sparse.double() + result.low_rank_u.double() @ result.low_rank_v.double()
    scaled = weight.double() * root
    return float(torch.linalg.norm((weight.double() - approximation) * root) / torch.linalg.norm(scaled))


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "structured"])
@pytest.mark.parametrize(
    ("d_out", "d_in", "moment", "compression", "rank_ratio"),
    [(48, 80, "ones", "0.5", "0.25"), (80, 48, "decades", "0.4", "0.3"), (64, 64, "outliers", "0.7", "0.5")],
)
@pytest.mark.parametrize("device", DEVICES)
def test_exact_is_the_published_algorithm(device, kind, d_out, d_in, moment, compression, rank_ratio):
    weight, second_moment = make_weight(kind, d_out, d_in), make_moment(moment, d_in)
    expected = reference.decompose(weight.numpy(), second_moment.numpy(), compression, rank_ratio)
    budget = {"compression": float(compression), "rank_ratio": float(rank_ratio)}
    result = decompose_on(device, weight, second_moment, **budget, svd="exact")
    assert result.iterations == 80
    assert result.rank == expected.rank
    support = result.sparse.numpy() != 0
    np.testing.assert_array_equal(support.sum(axis=1), (expected.sparse != 0).sum(axis=1))
    assert result.relative_error == pytest.approx(expected.relative_error, rel=1e-6)
    np.testing.assert_array_equal(support, expected.sparse != 0)
    np.testing.assert_allclose(result.sparse.numpy(), expected.sparse, rtol=1e-4, atol=1e-5)
    low_rank = (result.low_rank_u @ result.low_rank_v).numpy()
    np.testing.assert_allclose(low_rank, expected.low_rank, rtol=1e-4, atol=1e-5)


CASES = [
    (kind, shape, moment, compression, rank_ratio)
    for kind in ("gaussian", "heavy", "structured")
    for shape, moment, compression, rank_ratio in [
        ((128, 320), "ones", "0.5", "0.25"),
        ((128, 320), "decades", "0.3", "0.1"),
        ((256, 160), "outliers", "0.5", "0.5"),
        ((256, 160), "ones", "0.7", "0.25"),
        ((192, 192), "decades", "0.6", "0.3"),
    ]
]


@pytest.mark.parametrize(("kind", "shape", "moment", "compression", "rank_ratio"), CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_fast_is_no_worse_than_the_published_algorithm(device, kind, shape, moment, compression, rank_ratio):
    weight, second_moment = make_weight(kind, *shape), make_moment(moment, shape[1])
    published = reference.decompose(weight.numpy(), second_moment.numpy(), compression, rank_ratio)
    budget = {"compression": float(compression), "rank_ratio": float(rank_ratio)}
    result = decompose_on(device, weight, second_moment, **budget)
    assert result.iterations <= 40
    assert result.relative_error <= published.relative_error
    assert true_error(weight, second_moment, result) == pytest.approx(result.relative_error, rel=1e-4)


@pytest.mark.parametrize("pattern", ["layer", "2:4", "4:8"])
@pytest.mark.parametrize("device", DEVICES)
def test_fast_is_no_worse_in_the_other_patterns(device, pattern):
    weight, moment = make_weight("heavy", 128, 192), make_moment("decades", 192)
    fast = decompose_on(device, weight, moment, compression=0.4, pattern=pattern)
    exact = decompose_on(device, weight, moment, compression=0.4, pattern=pattern, svd="exact")
    assert fast.rank == exact.rank == rank_for(128, 192, 0.4, 0.25, pattern) > 0
    assert fast.relative_error <= exact.relative_error


@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_what_is_returned_is_one_alternation(svd):
    # Undoing the scaling must give S = keep_largest(A − L) on the support.
    weight, moment = make_weight("gaussian", 96, 128), make_moment("decades", 128)
    result = oats.decompose(weight, moment, svd=svd, iterations=12)
    root = moment.sqrt()
    residual = (weight - result.low_rank_u @ result.low_rank_v) * root
    expected = keep_largest(residual, nnz_per_row(128, 0.5, 0.25)) / root
    assert ((expected != 0) == (result.sparse != 0)).float().mean() > 0.999  # rounding decides near-ties
    support = (expected != 0) & (result.sparse != 0)
    torch.testing.assert_close(result.sparse[support], expected[support], rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 99),
    st.integers(0, 100),
    st.sampled_from(["row", "layer", "1:2", "2:4"]),
    st.sampled_from(["fast", "exact"]),
)
def test_budget_and_error_at_any_shape(d_out, d_in, compression, rank_ratio, pattern, svd):
    weight, moment = normal(d_out, d_in), normal(d_in, seed=1) ** 2 + 1e-3
    compression, rank_ratio = compression / 100, rank_ratio / 100
    if ":" in pattern and (compression > 0.5 or d_in % int(pattern[-1])):
        with pytest.raises(ConfigError):
            oats.decompose(weight, moment, compression=compression, rank_ratio=rank_ratio, pattern=pattern)
        return
    result = oats.decompose(
        weight,
        moment,
        compression=compression,
        rank_ratio=rank_ratio,
        pattern=pattern,
        svd=svd,
        iterations=10,
    )
    assert result.rank == rank_for(d_out, d_in, compression, rank_ratio, pattern)
    kept = result.sparse != 0
    if pattern == "row":
        most = kept.sum(dim=1), nnz_per_row(d_in, compression, rank_ratio)
    elif pattern == "layer":
        most = kept.sum(), nnz_per_layer(d_out, d_in, compression, rank_ratio)
    else:
        n, m = map(int, pattern.split(":"))
        most = kept.view(d_out, -1, m).sum(dim=2), n
    # Exact zeros in the residual leave fewer non-zeros.
    assert (most[0] <= most[1]).all()
    if result.relative_error > 1e-3:
        assert (most[0] == most[1]).all()
    assert true_error(weight, moment, result) == pytest.approx(result.relative_error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("pattern", ["row", "layer"])
@pytest.mark.parametrize("svd", ["fast", "exact"])
def test_one_part_empty_is_solved_at_once(svd, pattern):
    weight, moment = normal(60, 90), torch.ones(90)
    sparse_only = oats.decompose(weight, moment, rank_ratio=0.0, svd=svd, pattern=pattern)
    assert (sparse_only.rank, sparse_only.iterations) == (0, 1)
    count = 45 if pattern == "row" else 60 * 45
    torch.testing.assert_close(sparse_only.sparse, keep_largest(weight, count, pattern))
    low_rank_only = oats.decompose(weight, moment, rank_ratio=1.0, svd=svd, pattern=pattern)
    assert (low_rank_only.nnz, low_rank_only.iterations) == (0, 1)
    expected = reference.truncated_svd(weight.double().numpy(), low_rank_only.rank)
    condition = condition_of_truncation(weight, low_rank_only.rank)
    assert_equal_sums(low_rank_only.to_dense(), torch.from_numpy(expected), 60 + 90, condition=condition)


def test_2_4_at_half_is_sparse_only():
    result = oats.decompose(normal(16, 32), torch.ones(32), compression=0.5, pattern="2:4")
    assert result.rank == 0
    assert ((result.sparse != 0).view(16, 8, 4).sum(dim=2) == 2).all()


@pytest.mark.parametrize("svd", ["fast", "exact"])
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(20, 30), torch.ones(20, 30), torch.eye(25), torch.ones(1, 1), torch.full((7, 13), -2.0)],
)
def test_degenerate_weights(weight, svd):
    result = oats.decompose(weight, torch.ones(weight.shape[1]), compression=0.3, svd=svd)
    assert torch.isfinite(result.to_dense()).all()
    assert result.relative_error == pytest.approx(
        true_error(weight, torch.ones(weight.shape[1]), result), abs=1e-5
    ) or (weight.count_nonzero() == 0 and result.relative_error == 0)


@pytest.mark.parametrize(
    ("scale", "rounding"),
    # Powers of two change no bit. The others do, and a support that differs in one entry takes another path.
    [(2.0**-110, 1e-6), (2.0**100, 1e-6), (2.0**126, 1e-6), (1e-38, 0.02), (1e38, 0.02)],
)
def test_error_does_not_depend_on_the_scale_of_the_weight(scale, rounding):
    weight = normal(100, 90).clamp(-3, 3)
    plain = oats.decompose(weight, torch.ones(90))
    scaled = oats.decompose(weight * scale, torch.ones(90))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=rounding)


@pytest.mark.parametrize("kind", ["gaussian", "structured"])
@pytest.mark.parametrize("moment", ["ones", "decades"])
def test_products_in_bfloat16_cost_no_accuracy(kind, moment, monkeypatch):
    weight, second_moment = make_weight(kind, 160, 256), make_moment(moment, 256)
    plain = oats.decompose(weight, second_moment)
    monkeypatch.setattr(alternating, "difference_dtype", lambda scaled: torch.bfloat16)
    first, second = (oats.decompose(weight, second_moment) for _ in range(2))
    assert first.relative_error != plain.relative_error and torch.equal(first.sparse, second.sparse)
    # Two paths end within a percent of each other; one that had lost small directions would end far above.
    assert first.relative_error == pytest.approx(plain.relative_error, rel=0.02)
    assert true_error(weight, second_moment, first) == pytest.approx(first.relative_error, rel=1e-4)


def test_bfloat16_is_for_large_layers_of_cpus_that_have_it(monkeypatch):
    small, large = torch.empty(10, 10), torch.empty(subspace.BFLOAT16_FROM, 1)
    bf16 = torch.bfloat16
    for isa, expected in (("amx_bf16", bf16), ("avx512_bf16", bf16), ("avx2", torch.float32)):
        monkeypatch.setattr(subspace, "active_isa", lambda isa=isa: isa)
        assert subspace.difference_dtype(small) == torch.float32
        assert subspace.difference_dtype(large) == expected


def test_factors_are_in_singular_order():
    weight, moment = make_weight("heavy", 96, 128), make_moment("decades", 128)
    result = oats.decompose(weight, moment)
    u, v = result.low_rank_u, result.low_rank_v * moment.sqrt()
    assert_equal_sums(u.T @ u, torch.eye(result.rank), 96)
    gram = v @ v.T
    assert_equal_sums(gram, gram.diagonal().diag(), 96 + 128)
    assert (gram.diagonal().diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    weight = normal(100, 120).to(dtype)
    moment = make_moment("decades", 120) * 1e4
    result = oats.decompose(weight, moment)
    for part in (result.sparse, result.low_rank_u, result.low_rank_v, result.to_dense()):
        assert part.dtype == dtype and part.is_contiguous() and not part.requires_grad
    rounding = 8 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5
    assert true_error(weight, moment, result) == pytest.approx(result.relative_error, rel=rounding)
    # The error is that before rounding, so float32 weights of the same values have it too.
    same = oats.decompose(weight.float(), moment)
    assert result.relative_error == same.relative_error


@pytest.mark.parametrize("moment_scale", [1e-30, 1e30])
def test_fp16_stays_in_range_whatever_the_scale_of_the_moments(moment_scale):
    moment = make_moment("decades", 120) * moment_scale
    moment[5] = 0
    result = oats.decompose(normal(100, 120).half(), moment)
    assert torch.isfinite(result.to_dense()).all()
    assert result.low_rank_u.abs().max() <= 1
    assert result.low_rank_v.abs().max() < 100


def test_only_the_shape_of_the_moments_matters():
    weight, moment = normal(100, 120), make_moment("decades", 120)
    plain = oats.decompose(weight, moment)
    assert oats.decompose(weight, moment * 2**40).relative_error == plain.relative_error
    ones, zeros = (oats.decompose(weight, value) for value in (torch.ones(120), torch.zeros(120)))
    assert torch.equal(ones.sparse, zeros.sparse) and torch.equal(ones.low_rank_v, zeros.low_rank_v)
    integers = oats.decompose(weight, torch.full((120,), 7))
    assert torch.equal(integers.sparse, ones.sparse)


def test_features_that_were_never_active():
    weight, moment = normal(100, 120), make_moment("outliers", 120)
    moment[::10] = 0
    result = oats.decompose(weight, moment)
    assert torch.isfinite(result.to_dense()).all()
    assert true_error(weight, moment, result) == pytest.approx(result.relative_error, rel=1e-4)
    # Their columns stay in the range of the weight.
    assert result.to_dense()[:, ::10].abs().max() < 3 * weight.abs().max()


def test_deterministic_and_without_global_state():
    weight, moment = normal(120, 150), make_moment("decades", 150)
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = oats.decompose(weight, moment, seed=4)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    torch.manual_seed(5)
    second = oats.decompose(weight, moment, seed=4)
    for part in ("sparse", "low_rank_u", "low_rank_v"):
        assert torch.equal(getattr(first, part), getattr(second, part))
    assert first.relative_error == second.relative_error
    assert oats.decompose(weight, moment, seed=5).relative_error != first.relative_error


def test_inputs_are_left_alone():
    weight = torch.nn.Parameter(normal(90, 100))
    moment = make_moment("outliers", 100)
    before = weight.detach().clone(), moment.clone()
    result = oats.decompose(weight, moment)
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])
    assert not result.sparse.requires_grad
    transposed = oats.decompose(before[0].T.contiguous().T, moment)
    assert transposed.sparse.is_contiguous() and transposed.relative_error == pytest.approx(
        result.relative_error
    )


def test_momentum_keeps_the_best_iterate():
    weight, moment = normal(100, 120), torch.ones(120)
    errors = [
        oats.decompose(weight, moment, momentum=0.95, iterations=n).relative_error for n in range(1, 30, 3)
    ]
    assert errors == sorted(errors, reverse=True)


def test_properties_and_repr():
    result = oats.decompose(normal(40, 60), torch.ones(60))
    assert (result.d_out, result.d_in, result.rank, result.nnz) == (40, 60, 3, 40 * 23)
    assert_equal_sums(result.to_dense(), result.sparse + result.low_rank_u @ result.low_rank_v, 4)
    assert "tensor" not in repr(result)


# Selection


@pytest.mark.parametrize("count", [0, 1, 3, 6])
@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_column(device, count):
    rows = torch.tensor(
        [[1.0, -1, 1, -1, 1, -1], [0, 2, -2, 2, 0, 2], [0, 0, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1]]
    )
    expected = reference.hard_threshold(rows.double().numpy(), count)
    np.testing.assert_array_equal(keep_largest(rows.to(device), count).cpu().numpy(), expected)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.data(),
)
def test_selection_agrees_with_a_stable_sort(d_out, groups, m, levels, seed, data):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-levels, levels + 1, (d_out, groups * m), generator=generator).float()
    plain = matrix.double().numpy()
    count = data.draw(st.integers(0, groups * m))
    np.testing.assert_array_equal(keep_largest(matrix, count), reference.hard_threshold(plain, count))
    total = data.draw(st.integers(0, matrix.numel()))
    np.testing.assert_array_equal(
        keep_largest(matrix, total, "layer"), reference.hard_threshold_layer(plain, total)
    )
    n = data.draw(st.integers(1, m))
    np.testing.assert_array_equal(
        keep_largest(matrix, 0, f"{n}:{m}"), reference.hard_threshold_n_m(plain, n, m)
    )


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
def test_selection_writes_where_it_is_told(pattern):
    matrix, out = normal(6, 12), torch.full((6, 12), torch.nan)
    assert keep_largest(matrix, 5, pattern, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, keep_largest(matrix, 5, pattern))
    with pytest.raises(WeightError, match=r"^out is torch.float64 \(6, 12\)"):
        keep_largest(matrix, 5, out=out.double())


def test_selection_leaves_no_negative_zeros():
    assert (
        not keep_largest(-torch.arange(1.0, 9).view(2, 4), 1)
        .eq(0)
        .logical_and(torch.signbit(keep_largest(-torch.arange(1.0, 9).view(2, 4), 1)))
        .any()
    )


# Bad input


def with_value(shape, index, value):
    tensor = torch.ones(shape)
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("weight", "moment", "message"),
    [
        (np.ones((4, 8)), torch.ones(8), r"the weight must be a torch.Tensor, got ndarray"),
        (
            torch.ones(4, 8, device="meta"),
            torch.ones(8),
            r"must be a dense tensor on the CPU or a CUDA device, got layout .* on meta",
        ),
        (
            torch.ones(4, 8).to_sparse(),
            torch.ones(8),
            r"must be a dense tensor on the CPU or a CUDA device, got layout torch.sparse",
        ),
        (torch.ones(8), torch.ones(8), r"must have shape \(d_out, d_in\) .* got \(8,\)"),
        (torch.ones(2, 4, 8), torch.ones(8), r"must have shape \(d_out, d_in\) .* got \(2, 4, 8\)"),
        (torch.ones(0, 8), torch.ones(8), r"with both at least 1, got \(0, 8\)"),
        (torch.ones(4, 8, dtype=torch.int8), torch.ones(8), r"must have a floating dtype, got torch.int8"),
        (
            torch.ones(4, 8, dtype=torch.complex64),
            torch.ones(8),
            r"must have a floating dtype, got torch.complex64",
        ),
        (
            with_value((4, 8), (2, 3), float("nan")),
            torch.ones(8),
            r"1 of the 32 values of the weight are NaN or infinite .* first at \[2, 3\]",
        ),
        (
            with_value((4, 8), 1, float("inf")),
            torch.ones(8),
            r"8 of the 32 values of the weight are NaN .* first at \[1, 0\]",
        ),
        (torch.full((4, 8), 1e300, dtype=torch.float64), torch.ones(8), r"32 of the 32 .* in float32"),
        (torch.ones(4, 8), [1.0] * 8, r"second_moment must be a torch.Tensor, got list"),
        (torch.ones(4, 8), torch.ones(4), r"second_moment must have shape \(8,\).* got \(4,\)"),
        (torch.ones(4, 8), torch.ones(1, 8), r"second_moment must have shape \(8,\).* got \(1, 8\)"),
        (
            torch.ones(4, 8),
            torch.ones(8, dtype=torch.bool),
            r"second_moment must hold real numbers, got torch.bool",
        ),
        (
            torch.ones(4, 8),
            torch.ones(8, dtype=torch.complex64),
            r"must hold real numbers, got torch.complex64",
        ),
        (
            torch.ones(4, 8),
            torch.ones(8, device="meta"),
            r"must hold real numbers, got torch.float32 on meta",
        ),
        (
            torch.ones(4, 8),
            with_value(8, 5, float("nan")),
            r"1 of the 8 values of the second_moment are NaN or infinite, the first at \[5\]",
        ),
        (
            torch.ones(4, 8),
            with_value(8, 0, float("inf")),
            r"second_moment are NaN or infinite, the first at \[0\]",
        ),
        (
            torch.ones(4, 8),
            with_value(8, slice(2, 5), -1),
            r"3 of the 8 values of the second_moment are negative, the first at \[2\]",
        ),
    ],
)
def test_bad_input_is_named(weight, moment, message):
    with pytest.raises(WeightError, match=r"^blocks\.3\.q_proj: .*" + message):
        oats.decompose(weight, moment, name="blocks.3.q_proj")
    with pytest.raises(WeightError, match=r"^weight: "):
        oats.decompose(weight, moment)


def test_n_m_needs_a_multiple():
    with pytest.raises(
        ConfigError, match=r"^q_proj: pattern 2:4 needs a multiple of 4 inputs, and the layer has 10"
    ):
        oats.decompose(torch.ones(4, 10), torch.ones(10), pattern="2:4", name="q_proj")


@pytest.mark.parametrize(
    "setting", [{"compression": 1.0}, {"rank_ratio": 2}, {"pattern": "3"}, {"svd": "full"}, {"iterations": 0}]
)
def test_bad_settings(setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} must be"):
        oats.decompose(torch.ones(4, 8), torch.ones(8), **setting)


@pytest.mark.parametrize("svd", ["fast", "exact"])
@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_what_each_matrix_is_alone(one_thread, device, svd, pattern) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = list(torch.randn(3, 72, 96, generator=generator))
    # Easy matrices stall early and keep their factors while the others go on.
    weights[1] = torch.randn(72, 3, generator=generator) @ torch.randn(3, 96, generator=generator)
    weights[2] = 1e-3 * weights[2].double().pow(3).float()
    moments = list(torch.rand(3, 96, generator=generator).to(device))
    weights = [weight.to(device) for weight in weights]
    config = OatsConfig(compression=0.4, pattern=pattern, svd=svd, iterations=30)
    together = decompose_batch(weights, moments, config, ["a", "b", "c"])
    for weight, moment, result in zip(weights, moments, together, strict=True):
        alone = decompose(weight, moment, compression=0.4, pattern=pattern, svd=svd, iterations=30)
        assert (result.rank, result.nnz) == (alone.rank, alone.nnz)
        assert result.relative_error == pytest.approx(alone.relative_error, rel=0.02, abs=1e-5)
        assert abs(result.iterations - alone.iterations) <= 8
        scaled = (weight - result.to_dense()) * moment.sqrt()
        assert scaled.norm() / (weight * moment.sqrt()).norm() == pytest.approx(
            result.relative_error, rel=1e-3, abs=1e-5
        )


def test_a_batch_names_the_matrix_that_is_wrong() -> None:
    weights = [torch.ones(4, 8), torch.ones(4, 8)]
    weights[1][2, 3] = torch.nan
    with pytest.raises(WeightError, match=r"v_proj: 1 of the 32 values of the weight are NaN"):
        decompose_batch(weights, [torch.ones(8)] * 2, OatsConfig(), ["k_proj", "v_proj"])
    with pytest.raises(WeightError, match=r"v_proj: .*\(8, 8\) in a batch of .*\(4, 8\)"):
        decompose_batch(
            [weights[0], torch.ones(8, 8)], [torch.ones(8)] * 2, OatsConfig(), ["k_proj", "v_proj"]
        )
