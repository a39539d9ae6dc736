"""Low-rank approximations of a slowly changing matrix, against full SVDs."""

import pytest
import torch

from oats.decomposition.subspace import OVERSAMPLING, WarmSubspace, exact_low_rank, singular_order
from tests.decomposition.test_alternating import normal
from tests.reference import truncated_svd as best_approximation
from tests.rounding import assert_equal_sums, condition_of_truncation

pytestmark = pytest.mark.usefixtures("one_thread")


def with_spectrum(m, n, values, seed=0):
    """A matrix with these singular values, in float64, so that they hold beyond the rounding of float32."""
    u = torch.linalg.qr(normal(m, len(values), seed=seed).double()).Q
    v = torch.linalg.qr(normal(n, len(values), seed=seed + 1).double()).Q
    return (u * values.double()) @ v.T


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 1), (1, 9), (9, 1)])
def test_exact_equals_numpy(shape):
    matrix = normal(*shape)
    for rank in range(min(shape) + 1):
        u, v = exact_low_rank(matrix, rank)
        assert u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
        best = torch.from_numpy(best_approximation(matrix.double().numpy(), rank))
        assert_equal_sums(u @ v, best, sum(shape), condition=condition_of_truncation(matrix, rank))


def test_exact_is_accurate_in_columns_of_every_scale():
    scale = torch.logspace(0, -6, 40)
    matrix = normal(60, 40) * scale
    u, v = exact_low_rank(matrix, 39)
    expected = u.double() @ (u.double().T @ matrix.double())
    error = torch.linalg.vector_norm((u.double() @ v.double() - expected) / scale, dim=0)
    size = torch.linalg.vector_norm(matrix / scale, dim=0)
    assert (error <= 60 * torch.finfo(torch.float32).eps * size).all()


@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
def test_factors_are_singular_vectors(shape):
    for u, v in (exact_low_rank(normal(*shape), 6), WarmSubspace(shape, 6).approximate(normal(*shape))):
        assert_equal_sums(u.T @ u, torch.eye(6), shape[0])
        gram = v @ v.T
        assert_equal_sums(gram, gram.diagonal().diag(), sum(shape))
        assert (gram.diagonal().diff() <= 0).all()


def test_subspace_is_near_best_on_the_first_matrix_and_follows_the_next():
    matrix, drift = normal(200, 150), normal(200, 150, seed=1)
    subspace = WarmSubspace((200, 150), 10)
    for step in range(6):
        current = matrix + 0.05 * step * drift
        u, v = subspace.approximate(current)
        best = torch.linalg.matrix_norm(current - torch.mm(*exact_low_rank(current, 10)))
        assert torch.linalg.matrix_norm(current - u @ v) < 1.005 * best


def test_subspace_finds_directions_far_below_the_largest():
    # The values span eight decades, those within the rank six.
    matrix = with_spectrum(200, 150, torch.logspace(0, -8, 61)).float()
    u, v = WarmSubspace((200, 150), 45).approximate(matrix)
    rest = torch.linalg.vector_norm(torch.logspace(0, -8, 61)[45:])
    assert torch.linalg.matrix_norm(matrix - u @ v) < 1.5 * rest


@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_subspace_survives_rank_deficiency(true_rank):
    matrix = normal(100, true_rank) @ normal(true_rank, 90)
    subspace = WarmSubspace((100, 90), 8)
    for _ in range(3):
        u, v = subspace.approximate(matrix)
        assert_equal_sums(u @ v, matrix, 100 + 90)
    full = normal(100, 90, seed=2)
    for _ in range(8):
        u, v = subspace.approximate(full)
    best = torch.linalg.matrix_norm(full - torch.mm(*exact_low_rank(full, 8)))
    assert torch.linalg.matrix_norm(full - u @ v) < 1.01 * best


def test_subspace_depends_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = WarmSubspace((90, 80), 4, seed=5).approximate(normal(90, 80))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = WarmSubspace((90, 80), 4, seed=5).approximate(normal(90, 80))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_subspace_carries_the_oversampling():
    subspace = WarmSubspace((90, 80), 4)
    u, v = subspace.approximate(normal(90, 80))
    assert (u.shape, v.shape) == ((90, 4), (4, 80))
    assert subspace._basis.shape == (80, 4 + OVERSAMPLING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_subspace_follows_differences(dtype, exponent):
    matrix = with_spectrum(200, 150, torch.arange(1, 151).double() ** -exponent).float()
    drift = normal(200, 150, seed=1) / 1e5
    subspace = WarmSubspace((200, 150), 10)
    u, v = subspace.approximate(matrix)
    for step in range(1, 7):
        current = matrix + step * drift
        u, v = subspace.follow((current - u @ v).to(dtype))
        assert_equal_sums(u.T @ u, torch.eye(10), 200)
        best = torch.linalg.matrix_norm(current - torch.mm(*exact_low_rank(current, 10)))
        assert torch.linalg.matrix_norm(current - u @ v) < 1.005 * best
    ordered = singular_order(u, v)
    assert_equal_sums(torch.mm(*ordered), u @ v, 200 + 10)
    norms = torch.linalg.vector_norm(ordered[1], dim=1)
    assert (norms.diff() <= 0).all()
    expected = torch.linalg.svdvals(current)[:10]
    torch.testing.assert_close(norms, expected, rtol=5e-3, atol=0)


def test_subspace_follows_an_approximation_only():
    with pytest.raises(RuntimeError, match="before approximate"):
        WarmSubspace((90, 80), 4).follow(normal(90, 80))
