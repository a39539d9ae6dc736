"""The decomposition in the metric of the whole Hessian, against separate formulas in float64."""

import pytest
import torch

import oats
from oats.decomposition.budget import nnz_per_row, rank_for
from oats.decomposition.hessian import decompose_hessian, refit_values
from oats.decomposition.metric import nearest_low_rank
from oats.errors import ConfigError, WeightError
from tests.decomposition.test_alternating import make_weight, normal, true_error

pytestmark = pytest.mark.usefixtures("one_thread")

DAMPING = 0.1


def make_hessian(kind, d_in, seed=0):
    """X Xᵀ of 4 d_in tokens; "correlated" inputs mix a few directions, as hidden states do."""
    tokens = 4 * d_in
    inputs = normal(d_in, tokens, seed=seed + 50)
    if kind == "correlated":
        inputs = inputs + 3 * normal(d_in, 6, seed=seed + 51) @ normal(6, tokens, seed=seed + 52)
    if kind == "outliers":
        mixed = normal(d_in, d_in, seed=seed + 53) / d_in**0.5
        inputs = torch.exp(normal(d_in, 1, seed=seed + 54)) * (inputs + mixed @ inputs)
        inputs[::31] *= 100
    hessian = inputs @ inputs.T
    return (hessian + hessian.T) / 2  # some CPUs sum the two halves in other orders


def metric_root(hessian, damping=DAMPING):
    """A factor F with F Fᵀ = (H + damping diag(H)) / (1 + damping), by Cholesky, in float64."""
    hessian = hessian.double()
    damped = (hessian + damping * torch.diag(hessian.diagonal())) / (1 + damping)
    return torch.linalg.cholesky(damped)


def error_of(weight, result, factor):
    approximation = result.sparse.double() + result.low_rank_u.double() @ result.low_rank_v.double()
    weight = weight.double()
    return float(torch.linalg.norm((weight - approximation) @ factor) / torch.linalg.norm(weight @ factor))


CASES = [
    (kind, shape, hessian, settings)
    for kind, shape in (("gaussian", (96, 128)), ("heavy", (128, 96)), ("structured", (96, 96)))
    for hessian in ("correlated", "outliers", "white")
    for settings in ({}, {"compression": 0.6, "rank_ratio": 0.3}, {"compression": 0.4, "pattern": "2:4"})
]


@pytest.mark.parametrize(("kind", "shape", "hessian", "settings"), CASES)
def test_better_than_the_published_method_in_its_own_metric(kind, shape, hessian, settings):
    weight, matrix = make_weight(kind, *shape), make_hessian(hessian, shape[1])
    factor = metric_root(matrix)
    plain = oats.decompose(weight, matrix.diagonal(), **settings)
    result = decompose_hessian(weight, matrix, **settings)
    assert result.relative_error == pytest.approx(error_of(weight, result, factor), rel=1e-4)
    assert (result.rank, result.nnz) == (plain.rank, plain.nnz)
    margin = {"correlated": 0.97, "outliers": 0.97, "white": 1.0}[hessian]
    assert result.relative_error <= margin * error_of(weight, plain, factor)


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
def test_budget_and_pattern(pattern):
    weight, matrix = make_weight("heavy", 48, 64), make_hessian("correlated", 64)
    result = decompose_hessian(weight, matrix, compression=0.4, pattern=pattern, iterations=5)
    assert result.rank == rank_for(48, 64, 0.4, 0.25, pattern)
    kept = result.sparse != 0
    if pattern == "2:4":
        assert (kept.view(-1, 4).sum(1) == 2).all()
    elif pattern == "row":
        assert (kept.sum(1) == nnz_per_row(64, 0.4, 0.25)).all()
    else:
        assert int(kept.sum()) == int(0.75 * 0.6 * 48 * 64)


def test_refit_is_least_squares_on_the_support():
    # Row by row, the normal equations restricted to the support, solved directly.
    target, metric = normal(12, 20).double(), make_hessian("correlated", 20).double()
    scale = metric.diagonal().sqrt()
    metric = metric / scale / scale[:, None]
    support = torch.rand(12, 20, generator=torch.Generator().manual_seed(3)) < 0.4
    expected = torch.zeros(12, 20, dtype=torch.float64)
    for row, kept in enumerate(support):
        expected[row, kept] = torch.linalg.solve(metric[kept][:, kept], (target[row] @ metric)[kept])
    result = refit_values(target, torch.zeros_like(target), support, metric, 60)
    # What two solvers of the same equations may differ by.
    rounding = len(metric) * torch.finfo(metric.dtype).eps * float(torch.linalg.cond(metric))
    assert torch.linalg.norm(result - expected) <= rounding * torch.linalg.norm(expected)
    gradient = ((target - result) @ metric) * support
    assert gradient.norm() < 1e-8 * (target @ metric).norm()


def test_a_few_steps_of_refitting_never_do_harm():
    target, metric = normal(12, 20).double(), make_hessian("correlated", 20).double()
    support = torch.rand(12, 20, generator=torch.Generator().manual_seed(3)) < 0.4
    start = normal(12, 20, seed=9).double() * support

    def error(sparse):
        left = target - sparse
        return ((left @ metric) * left).sum(1)

    errors = [error(refit_values(target, start, support, metric, steps)) for steps in (1, 2, 4)]
    for before, after in zip([error(start), *errors], errors, strict=False):
        assert (after <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize("svd", ["fast", "exact"])
@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_low_rank_part_is_optimal_for_the_sparse_part(svd, pattern):
    weight, matrix = make_weight("structured", 96, 128), make_hessian("outliers", 128)
    result = decompose_hessian(weight, matrix, compression=0.4, svd=svd, pattern=pattern)
    factor = metric_root(matrix)
    # Eckart–Young: no rank-r matrix leaves less than the tail of the singular values.
    values = torch.linalg.svdvals((weight.double() - result.sparse.double()) @ factor)
    least = float(values[result.rank :].norm() / torch.linalg.norm(weight.double() @ factor))
    tolerance = 1e-5 if svd == "exact" else 1e-3
    assert least * (1 - 1e-5) <= error_of(weight, result, factor) <= least * (1 + tolerance)


def test_values_are_near_their_optimum():
    weight, matrix = make_weight("gaussian", 64, 96), make_hessian("correlated", 96)
    result = decompose_hessian(weight, matrix)
    factor = metric_root(matrix)
    left = weight.double() - result.low_rank_u.double() @ result.low_rank_v.double()
    support = result.sparse != 0
    best = torch.zeros_like(left)
    for row, kept in enumerate(support):
        best[row, kept] = torch.linalg.lstsq(factor[kept].T, (left[row] @ factor)[:, None]).solution[:, 0]
    least = float((left - best).matmul(factor).norm() / (weight.double() @ factor).norm())
    assert least <= error_of(weight, result, factor) <= 1.005 * least


def test_a_diagonal_hessian_is_the_published_metric():
    weight, moment = make_weight("gaussian", 96, 128), torch.exp(normal(128, seed=4))
    result = decompose_hessian(weight, torch.diag(moment))
    assert true_error(weight, moment, result) == pytest.approx(result.relative_error, rel=1e-4)
    assert result.relative_error <= oats.decompose(weight, moment, iterations=200).relative_error


def test_large_damping_forgets_the_correlations():
    weight, matrix = make_weight("gaussian", 48, 64), make_hessian("correlated", 64)
    damped = decompose_hessian(weight, matrix, damping=1e9)
    diagonal = decompose_hessian(weight, torch.diag(matrix.diagonal()), damping=0)
    # Not the same support: rounding decides near-ties, and the paths part from there.
    assert damped.relative_error == pytest.approx(diagonal.relative_error, rel=0.05)


def test_scale_of_the_hessian_does_not_matter():
    weight, matrix = make_weight("heavy", 48, 64), make_hessian("correlated", 64)
    one = decompose_hessian(weight, matrix)
    for scale in (2.0**-60, 2.0**60):
        torch.testing.assert_close(decompose_hessian(weight, matrix * scale).to_dense(), one.to_dense())


@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_fewer_tokens_than_inputs_and_inputs_that_are_never_active(damping):
    inputs = normal(64, 20, seed=5)
    inputs[::7] = 0
    weight = make_weight("gaussian", 48, 64)
    result = decompose_hessian(weight, inputs @ inputs.T, damping=damping)
    assert result.to_dense().isfinite().all()
    lost = (weight - result.to_dense()) @ inputs
    assert lost.norm() < 0.1 * (weight @ inputs).norm()


def test_zero_hessian_stands_for_the_identity():
    weight = make_weight("gaussian", 48, 64)
    expected = decompose_hessian(weight, torch.eye(64))
    torch.testing.assert_close(decompose_hessian(weight, torch.zeros(64, 64)).to_dense(), expected.to_dense())


def test_empty_parts_and_zero_weights():
    weight, matrix = make_weight("gaussian", 32, 48), make_hessian("correlated", 48)
    factor = metric_root(matrix)
    only_low_rank = decompose_hessian(weight, matrix, rank_ratio=1.0)
    assert only_low_rank.nnz == 0
    tail = torch.linalg.svdvals(weight.double() @ factor)[only_low_rank.rank :].norm()
    least = float(tail / (weight.double() @ factor).norm())
    assert error_of(weight, only_low_rank, factor) == pytest.approx(least, rel=1e-4)
    only_sparse = decompose_hessian(weight, matrix, rank_ratio=0.0)
    assert only_sparse.rank == 0 and only_sparse.nnz == 32 * 24
    zeros = decompose_hessian(torch.zeros(32, 48), matrix)
    assert zeros.relative_error == 0 and not zeros.to_dense().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_weight_is_kept(dtype):
    weight = make_weight("gaussian", 32, 48).to(dtype)
    result = decompose_hessian(weight, make_hessian("correlated", 48), iterations=3)
    assert {result.sparse.dtype, result.low_rank_u.dtype, result.low_rank_v.dtype} == {dtype}


def test_same_seed_same_result_and_inputs_untouched():
    weight, matrix = make_weight("gaussian", 96, 128), make_hessian("correlated", 128)
    before = weight.clone(), matrix.clone()
    one, two = (decompose_hessian(weight, matrix, seed=7, iterations=4) for _ in range(2))
    assert torch.equal(one.sparse, two.sparse) and torch.equal(one.low_rank_v, two.low_rank_v)
    assert torch.equal(weight, before[0]) and torch.equal(matrix, before[1])


def test_a_transposed_weight_and_one_of_low_rank():
    weight, matrix = make_weight("gaussian", 96, 128), make_hessian("correlated", 128)
    expected = decompose_hessian(weight, matrix, iterations=4)
    result = decompose_hessian(weight.T.contiguous().T, matrix.T, iterations=4)
    assert torch.equal(result.to_dense(), expected.to_dense())
    outer = torch.outer(weight[:, 0], weight[0])
    assert decompose_hessian(outer, matrix).relative_error < 1e-5
    assert decompose_hessian(torch.zeros(96, 128), matrix).relative_error == 0


GOOD = make_hessian("correlated", 8)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.ones(8), r"\(8, 8\) matrix"),
        (torch.ones(8, 7), r"\(8, 8\) matrix"),
        (torch.ones(8, 8, dtype=torch.int64), "int64"),
        (GOOD * float("nan"), "NaN"),
        (-GOOD, "negative"),
        (GOOD + 1e3 * torch.triu(torch.ones(8, 8), 1), "not symmetric"),
        (2 * torch.eye(8) - torch.ones(8, 8), "eigenvalue"),
        ("H", "str"),
    ],
)
def test_bad_hessians_are_refused(hessian, message):
    with pytest.raises(WeightError, match=message) as caught:
        decompose_hessian(torch.ones(4, 8), hessian, name="q_proj")
    assert "q_proj" in str(caught.value)


@pytest.mark.parametrize("damping", [-0.1, float("inf"), float("nan"), "0.1"])
def test_bad_damping_is_refused(damping):
    with pytest.raises(ConfigError, match="damping"):
        decompose_hessian(torch.ones(4, 8), GOOD, damping=damping)


def test_bad_settings_are_refused_as_in_decompose():
    with pytest.raises(ConfigError, match="compression"):
        decompose_hessian(torch.ones(4, 8), GOOD, compression=1.0)
    with pytest.raises(WeightError, match="NaN"):
        decompose_hessian(torch.full((4, 8), float("nan")), GOOD)


@pytest.mark.parametrize("kind", ["white", "correlated", "outliers"])
@pytest.mark.parametrize(("shape", "rank"), [((40, 64), 5), ((96, 48), 12), ((30, 20), 20), ((200, 160), 8)])
def test_the_nearest_matrix_of_a_rank(shape, rank, kind):
    """Against a full SVD in float64. Where a subspace is iterated, the result is near the best."""
    matrix, hessian = normal(*shape, seed=7), make_hessian(kind, shape[1])
    hessian[3] = hessian[:, 3] = 0  # an input that was never active
    u, v = nearest_low_rank(matrix.float(), hessian.float(), rank)
    assert u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
    root = hessian.double().diagonal().sqrt()
    damped = hessian.double() + DAMPING * torch.diag(root.square())
    damped[3, 3] = root.max() ** 2 * 1e-12
    factor = torch.linalg.cholesky(damped)
    lost = torch.linalg.norm((matrix.double() - u.double() @ v.double()) @ factor)
    best = torch.linalg.svdvals(matrix.double() @ factor)[rank:].square().sum().sqrt()
    size = torch.linalg.norm(matrix.double() @ factor)
    assert best - 1e-5 * size <= lost <= 1.01 * best + 1e-4 * size


@pytest.mark.parametrize("pattern", ["row", "2:4"])
def test_products_in_bfloat16_do_not_raise_the_error(monkeypatch, pattern) -> None:
    ratios = []
    for seed in range(8):
        # At 96 × 128 single paths end up to 1.2 % apart, either way.
        weight, hessian = make_weight("gaussian", 192, 256, seed), make_hessian("outliers", 256, seed)
        factor = metric_root(hessian)
        errors = []
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(
                "oats.decomposition.hessian.difference_dtype", lambda scaled, dtype=dtype: dtype
            )
            compression = 0.5 if pattern == "row" else 0.4
            result = decompose_hessian(weight, hessian, compression=compression, pattern=pattern)
            errors.append(error_of(weight, result, factor))
        assert errors[0] != errors[1]  # bfloat16 was used
        assert errors[1] <= 1.01 * errors[0]
        ratios.append(errors[1] / errors[0])
    assert sum(ratios) / len(ratios) < 1.005
