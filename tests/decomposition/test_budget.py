from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oats.decomposition.budget import nnz_per_layer, nnz_per_row, rank_for
from oats.errors import ConfigError
from tests.reference import budget

hundredths = st.integers(0, 99).map(lambda n: f"0.{n:02}")
size = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("d_out", "d_in", "compression", "rank_ratio", "expected"),
    [
        (4096, 4096, 0.5, 0.25, (256, 1536, 6291456)),
        (14336, 4096, 0.5, 0.3, (477, 1434, 20552089)),
        (10, 10, 0.6, 0.25, (0, 3, 30)),
        (1, 1, 0.5, 0.25, (0, 1, 0)),
        (7, 13, 0.5, 0.0, (0, 7, 45)),
        (64, 64, 0.0, 1.0, (32, 0, 0)),
    ],
)
def test_published_formulas(d_out, d_in, compression, rank_ratio, expected):
    got = (
        rank_for(d_out, d_in, compression, rank_ratio),
        nnz_per_row(d_in, compression, rank_ratio),
        nnz_per_layer(d_out, d_in, compression, rank_ratio),
    )
    assert got == expected


@given(size, size, hundredths, st.one_of(hundredths, st.just("1.0")))
def test_agrees_with_exact_arithmetic(d_out, d_in, compression, rank_ratio):
    rank, row, layer = budget(d_out, d_in, compression, rank_ratio)
    rho, kappa = float(compression), float(rank_ratio)
    assert rank_for(d_out, d_in, rho, kappa) == rank
    assert nnz_per_row(d_in, rho, kappa) == row
    assert nnz_per_layer(d_out, d_in, rho, kappa) == layer


@given(size, size, hundredths, hundredths)
def test_stays_inside_the_budget(d_out, d_in, compression, rank_ratio):
    rank = rank_for(d_out, d_in, float(compression), float(rank_ratio))
    layer = nnz_per_layer(d_out, d_in, float(compression), float(rank_ratio))
    assert rank * (d_out + d_in) + layer <= (1 - Fraction(compression)) * d_out * d_in
    row = nnz_per_row(d_in, float(compression), float(rank_ratio))
    # Rows round up, by less than one entry each.
    assert 0 <= row * d_out - layer <= d_out
    assert 0 <= row <= d_in
    assert 0 <= rank <= min(d_out, d_in)


@given(size, size, hundredths, st.integers(1, 8), st.integers(1, 8))
def test_n_m_shares_one_budget(d_out, d_in, compression, n, m):
    if n > m:
        n, m = m, n
    kept = 1 - Fraction(compression)
    if Fraction(n, m) > kept:
        with pytest.raises(ConfigError, match=f"pattern {n}:{m} keeps"):
            rank_for(d_out, d_in, float(compression), 0.25, f"{n}:{m}")
    else:
        rank = rank_for(d_out, d_in, float(compression), 0.25, f"{n}:{m}")
        assert rank * (d_out + d_in) + Fraction(n, m) * d_out * d_in <= kept * d_out * d_in
        assert rank == rank_for(d_out, d_in, float(compression), 0.9, f"{n}:{m}")


def test_n_m_conflict_names_the_way_out():
    with pytest.raises(ConfigError, match=r"lower the compression to 0\.5 or less"):
        rank_for(64, 64, 0.6, 0.25, "2:4")
