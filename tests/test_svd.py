import numpy as np
import pytest
import torch

from oats.svd import OVERSAMPLING, WarmSubspace, exact_low_rank
from tests.reference import truncated_svd

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 1), (1, 9), (9, 1)])
def test_exact_equals_numpy(shape):
    matrix = normal(*shape)
    for rank in range(min(shape) + 1):
        u, v = exact_low_rank(matrix, rank)
        assert u.shape == (shape[0], rank) and v.shape == (rank, shape[1])
        np.testing.assert_allclose((u @ v).numpy(), truncated_svd(matrix.double().numpy(), rank), atol=1e-4)


def test_exact_is_accurate_in_columns_of_every_scale():
    scale = torch.logspace(0, -6, 40)
    matrix = normal(60, 40) * scale
    u, v = exact_low_rank(matrix, 39)
    expected = u.double() @ (u.double().T @ matrix.double())
    error = torch.linalg.vector_norm((u.double() @ v.double() - expected) / scale, dim=0)
    assert error.max() < 1e-5


@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
def test_factors_are_singular_vectors(shape):
    for u, v in (exact_low_rank(normal(*shape), 6), WarmSubspace(shape, 6).approximate(normal(*shape))):
        torch.testing.assert_close(u.T @ u, torch.eye(6), atol=1e-5, rtol=0)
        gram = v @ v.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), atol=1e-5 * float(gram.max()), rtol=0)
        assert (gram.diagonal().diff() <= 0).all()


def test_subspace_is_near_best_on_the_first_matrix_and_follows_the_next():
    matrix, drift = normal(200, 150), normal(200, 150, seed=1)
    subspace = WarmSubspace((200, 150), 10)
    for step in range(6):
        current = matrix + 0.05 * step * drift
        u, v = subspace.approximate(current)
        best = torch.linalg.matrix_norm(current - torch.mm(*exact_low_rank(current, 10)))
        assert torch.linalg.matrix_norm(current - u @ v) < 1.005 * best


@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_subspace_survives_rank_deficiency(true_rank):
    matrix = normal(100, true_rank) @ normal(true_rank, 90)
    subspace = WarmSubspace((100, 90), 8)
    for _ in range(3):
        u, v = subspace.approximate(matrix)
        torch.testing.assert_close(u @ v, matrix, atol=1e-4, rtol=1e-4)
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
