import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oats
from oats.decomposition.truncated_svd import TruncatedSVD, truncated_svd
from oats.errors import ConfigError, WeightError
from tests.backends import DEVICES
from tests.decomposition.test_alternating import normal
from tests.decomposition.test_subspace import with_spectrum
from tests.rounding import assert_equal_sums

pytestmark = pytest.mark.usefixtures("one_thread")


def flat(m, n):
    weight = normal(m, n)
    return torch.where(weight.abs() > 0.8, 0.0, weight)


def check(matrix, result, rank, *, residual=None):
    """Check what holds for any matrix, in float64; `residual` bounds the largest one, relative to s_1."""
    u, s, vh = (part.double() for part in result)
    wide, exact = matrix.double(), torch.linalg.svdvals(matrix.double())
    eps = torch.finfo(matrix.dtype).eps
    largest, norm = float(exact[0]), float(torch.linalg.matrix_norm(wide))
    assert (u.shape, s.shape, vh.shape) == ((len(matrix), rank), (rank,), (rank, matrix.shape[1]))
    assert all(part.dtype == matrix.dtype for part in result)
    for gram in (u.T @ u, vh @ vh.T):
        assert (gram - torch.eye(rank)).abs().max() <= 50 * eps if rank else True
    assert (s >= 0).all() and (s.diff() <= 0).all()

    error = float(torch.linalg.matrix_norm(wide - (u * s) @ vh))
    assert error <= float(result.error_bound) <= 1.001 * error + 16 * eps * norm
    if rank:
        rounding = 64 * eps * largest
        for gap in (wide @ vh.T - u * s, wide.T @ u - vh.T * s):
            assert (torch.linalg.vector_norm(gap, dim=0) <= 1.01 * result.residuals + rounding).all()
        # Weyl: a singular value of the matrix is within the residual of each.
        distance = (s[:, None] - exact[None]).abs().min(dim=1).values
        assert (distance <= 1.01 * result.residuals + 4 * eps * largest).all()
    assert (s <= exact[:rank] + 16 * eps * largest).all()
    if residual is not None:
        assert bool(result.converged)
        assert float(result.residuals.max()) <= residual * largest
        best = float(exact[rank:].square().sum().sqrt())
        assert error <= best * (1 + residual) + 32 * eps * norm
        assert (exact[:rank] - s).abs().max() <= residual * largest


CASES = {
    "flat": lambda: flat(300, 340),
    "power": lambda: with_spectrum(300, 260, torch.arange(1, 261) ** -1.0),
    "steep": lambda: with_spectrum(260, 300, 0.8 ** torch.arange(260)),
    "clusters": lambda: with_spectrum(300, 260, torch.tensor([3.0] * 50 + [1.0] * 210)),
    "low rank": lambda: normal(300, 20) @ normal(20, 280, seed=1),
    "tall": lambda: flat(900, 200),
    "wide": lambda: flat(200, 900),
    "tiny": lambda: normal(5, 4),
    "identity": lambda: torch.eye(300),
    "one column": lambda: torch.eye(300)[:1].mT @ torch.ones(1, 200),
    "graded columns": lambda: normal(300, 260) * torch.logspace(0, -6, 260),
}


@pytest.mark.parametrize("tol", [1e-1, 1e-4])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_truncated_svd_of_every_kind_of_matrix(device, case, tol):
    matrix = CASES[case]().float()
    rank = min(30, *matrix.shape)
    found = truncated_svd(matrix.to(device), rank, tol=tol, oversample=8)
    tensors = (found.error_bound, found.residuals, found.passes, found.converged)
    assert all(t.device.type == device for t in (*found, *tensors) if isinstance(t, torch.Tensor))
    moved = (t.cpu() if isinstance(t, torch.Tensor) else t for t in tensors)
    result = TruncatedSVD._of(tuple(part.cpu() for part in found), *moved)
    check(matrix, result, rank, residual=max(tol, 1e-4))


def test_the_krylov_solver_and_the_dense_one_are_both_used():
    assert truncated_svd(CASES["power"]().float(), 30, oversample=8).passes > 0
    assert truncated_svd(flat(300, 340), 140).passes == 0
    # With a flat spectrum, a tight tolerance makes the dense solver faster.
    assert truncated_svd(flat(300, 340), 30, oversample=8, tol=0.3).passes > 0
    assert truncated_svd(flat(300, 340), 30, oversample=8, tol=1e-6).passes == 0


def test_a_large_matrix_is_tested_after_every_pass():
    # Otherwise the first test is after the first pass, and the second one after the third.
    result = truncated_svd(flat(700, 720), 8, oversample=8, tol=0.3)
    assert result.passes == 2 and bool(result.converged)


def test_restarts():
    matrix = flat(700, 720)
    result = truncated_svd(matrix, 8, tol=1e-3)
    assert result.passes * 32 > 2 * 8 + 128 + 32
    check(matrix, result, 8, residual=1e-3)


def test_a_tighter_tolerance_is_met_by_the_true_residuals():
    matrix = CASES["power"]().float()
    for tol in (0.3, 1e-2, 1e-3):
        u, s, vh = result = truncated_svd(matrix, 20, tol=tol)
        true = torch.linalg.vector_norm(matrix.double() @ vh.double().T - u.double() * s.double(), dim=0)
        assert float(true.max()) <= tol * float(s[-1]) and bool(result.converged)


@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("case", ["flat", "power", "low rank", "tiny", "tall", "wide"])
def test_a_fixed_number_of_passes(case, passes):
    matrix = CASES[case]().float()
    rank = min(30, *matrix.shape)
    result = truncated_svd(matrix, rank, power_passes=passes, oversample=8)
    assert result.passes == passes + 1
    check(matrix, result, rank)


def test_more_passes_are_more_accurate():
    matrix = flat(300, 340)
    errors = [float(truncated_svd(matrix, 30, power_passes=passes).error_bound) for passes in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.005 * errors[3]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape_and_rank(m, n, rank, true_rank, passes, dtype):
    rank, true_rank = min(rank, m, n), min(true_rank, m, n)
    matrix = normal(m, true_rank).to(dtype) @ normal(true_rank, n, seed=1).to(dtype)
    check(matrix, truncated_svd(matrix, rank, power_passes=passes), rank)


@settings(max_examples=12, deadline=None)
@given(st.integers(300, 400), st.integers(300, 400), st.integers(1, 40), st.integers(0, 90))
def test_krylov_at_any_rank_deficiency(m, n, rank, true_rank):
    matrix = normal(m, true_rank) @ normal(true_rank, n, seed=1)
    result = truncated_svd(matrix, rank, oversample=8)
    assert result.passes > 0 or true_rank == 0
    check(matrix, result, rank)


@pytest.mark.parametrize("passes", [None, 1])
def test_zeros_and_rank_zero(passes):
    zero = truncated_svd(torch.zeros(200, 150), 7, power_passes=passes)
    check(torch.zeros(200, 150), zero, 7)
    assert float(zero.error_bound) == 0 and torch.equal(zero.S, torch.zeros(7))
    matrix = flat(200, 210)
    check(matrix, truncated_svd(matrix, 0, power_passes=passes), 0)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
def test_extreme_scales(scale):
    matrix = CASES["power"]().float()
    plain, scaled = truncated_svd(matrix, 10), truncated_svd(matrix * scale, 10)
    assert_equal_sums(scaled.S / scale, plain.S, 64)
    assert float(scaled.error_bound) / scale == pytest.approx(float(plain.error_bound), rel=1e-4)


def test_float64_is_computed_in_float64():
    matrix = CASES["steep"]()
    check(matrix, truncated_svd(matrix, 30, tol=1e-9, oversample=8), 30, residual=1e-9)


def test_strides_do_not_matter():
    matrix = CASES["power"]().float()
    plain = truncated_svd(matrix, 10)
    for view in (matrix.mT.contiguous().mT, torch.stack([matrix, matrix], dim=2)[:, :, 0]):
        assert_equal_sums(truncated_svd(view, 10).S, plain.S, 64)


@pytest.mark.parametrize("passes", [None, 1])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_its_matrices(threads, passes):
    torch.set_num_threads(threads)
    matrices = torch.stack([flat(200, 210), torch.zeros(200, 210), normal(200, 5) @ normal(5, 210)])
    result = truncated_svd(matrices, 12, power_passes=passes)
    assert torch.get_num_threads() == threads
    assert result.U.shape == (3, 200, 12) and result.S.shape == (3, 12) and result.Vh.shape == (3, 12, 210)
    assert result.error_bound.shape == result.converged.shape == (3,) and result.residuals.shape == (3, 12)
    for i in range(3):
        single = truncated_svd(matrices[i], 12, power_passes=passes)
        assert_equal_sums(result.S[i], single.S, 64)
        # What the bound of a matrix of low rank consists of.
        rounding = 16 * torch.finfo(matrices.dtype).eps * float(torch.linalg.matrix_norm(matrices[i]))
        torch.testing.assert_close(result.error_bound[i], single.error_bound, rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_a_warm_start_saves_passes(batch):
    matrix = CASES["power"]().float().expand(*batch, 300, 260)
    first = truncated_svd(matrix, 20, tol=1e-3, oversample=8)
    changed = matrix + 1e-7 * normal(300, 260)
    again = truncated_svd(changed, 20, tol=1e-3, oversample=8, warm_start=first.Vh)
    assert again.passes < first.passes and bool(again.converged.all())
    cold = truncated_svd(changed, 20, power_passes=0)
    warm = truncated_svd(changed, 20, power_passes=0, warm_start=first.Vh)
    assert (warm.error_bound < cold.error_bound).all()


def test_truncated_svd_depends_on_the_seed_alone():
    matrix = flat(300, 340)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = truncated_svd(matrix, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, truncated_svd(matrix, 10, seed=3), strict=True))
    assert not torch.equal(first.U, truncated_svd(matrix, 10, seed=4).U)


def test_the_matrix_is_left_alone_and_gradients_are_cut():
    matrix = torch.nn.Parameter(flat(200, 210) * 1e20)
    before = matrix.detach().clone()
    assert not truncated_svd(matrix, 5).U.requires_grad
    assert torch.equal(matrix, before)


def test_is_exported():
    assert oats.truncated_svd is truncated_svd


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0]], "must be a torch.Tensor, got list"),
        (torch.ones(3), r"shape \(m, n\) or \(B, m, n\).*got \(3,\)"),
        (torch.ones(0, 3), "every size at least 1"),
        (torch.ones(3, 3, dtype=torch.bfloat16), "float32 or float64.*bfloat16"),
        (torch.ones(3, 3).to_sparse(), "sparse"),
        (torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]]), r"2 of its 4 values.*first at \[0, 1\]"),
        (torch.full((2, 3, 3), float("-inf")), "9 of its 9"),
    ],
)
def test_bad_matrices_are_named(matrix, message):
    with pytest.raises(WeightError, match="^A.*" + message):
        truncated_svd(matrix, 1)


@pytest.mark.parametrize(
    "setting",
    [{"rank": -1}, {"rank": 9}, {"oversample": -1}, {"power_passes": -1}, {"tol": -1}, {"tol": float("nan")}],
)
def test_bad_settings_are_named(setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))} must be"):
        truncated_svd(torch.ones(8, 9), **{"rank": 2} | setting)


@pytest.mark.parametrize("start", [torch.ones(2, 8), torch.ones(9), torch.full((2, 9), float("nan"))])
def test_bad_warm_starts_are_named(start):
    with pytest.raises(WeightError, match=r"^warm_start must be finite and have shape"):
        truncated_svd(torch.ones(8, 9), 2, warm_start=start)
