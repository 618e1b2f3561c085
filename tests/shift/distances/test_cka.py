"""Debiased CKA: by the definition of its estimator, and where the biased one fails."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.analysis import similarity
from flaxtransfer.analysis.similarity import debiased_cka


def draw(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def hsic_1(k, l):  # noqa: E741
    """Equation 4 of Song et al. (2012), as it stands there."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    return (
        np.trace(k @ l)
        + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ l @ one)
    ) / (n * (n - 3))


@pytest.mark.parametrize(("rows", "columns", "others"), [(4, 2, 3), (9, 30, 4), (30, 5, 6)])
def test_it_is_its_definition(rows, columns, others):
    x, y = draw(rows, columns, 1) + 3, draw(rows, others, 2) ** 2
    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic_1(k, l) / np.sqrt(hsic_1(k, k) * hsic_1(l, l))
    assert debiased_cka(x, y).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(300, 290), (30, 4)])
def test_pairs_gathered_or_multiplied_are_the_same(monkeypatch, rows, columns):
    x, y = draw(rows, columns, 1), draw(rows, columns, 2)
    found = []
    for largest in (0, 10**9):
        monkeypatch.setattr(similarity, "_LARGEST_GRAM", largest)
        found.append(debiased_cka(x, y, permutations=39))
    assert found[0].value == pytest.approx(found[1].value, rel=1e-9)
    assert found[0].null_mean == pytest.approx(found[1].null_mean, rel=1e-9, abs=1e-12)
    assert found[0].p == found[1].p


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.integers(4, 12), st.integers(1, 15), st.floats(-1e3, 1e3))
def test_rotations_shifts_and_scales_change_nothing(seed, rows, columns, shift):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(rows, columns)), random.normal(size=(rows, 3))
    turn = np.linalg.qr(random.normal(size=(columns, columns)))[0]
    assert debiased_cka(x, x, permutations=19).value == pytest.approx(1, abs=1e-9)
    plain = debiased_cka(x, y, permutations=19).value
    turned = debiased_cka(-0.01 * x @ turn + shift, y, permutations=19).value
    assert turned == pytest.approx(plain, rel=1e-5, abs=1e-7)
    assert debiased_cka(y, x, permutations=19).value == pytest.approx(plain, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "columns", "biased"), [(1000, 64, 0.06), (100, 512, 0.84), (50, 2048, 0.976)]
)
def test_representations_that_have_nothing_in_common(rows, columns, biased):
    x, y = draw(rows, columns, 1), draw(rows, columns, 2)
    k, l = (z @ z.T for z in (x - x.mean(0), y - y.mean(0)))  # noqa: E741
    usual = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())
    assert usual == pytest.approx(biased, abs=0.01)
    found = debiased_cka(x, y, permutations=39)
    assert abs(found.value) < 0.07
    assert found.p > 0.02


def test_what_has_something_in_common_is_found():
    x = draw(60, 200, 1)
    found = debiased_cka(x, x[:, :50] + 2 * draw(60, 50, 2))
    assert 0.02 < found.value < 0.6
    assert found.p == 1 / 200


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (draw(3, 2), draw(3, 2), "debiased CKA must have at least 4 examples, got 3"),
        (draw(5, 2), draw(6, 2), "must have the same number of rows, got 5 and 6"),
        (draw(5, 2), np.full((5, 9), 0.1), "y must not be constant over the 5 examples"),
        (np.full((5, 2), np.nan), draw(5, 2), "x must be finite, got 5 of 5 rows"),
    ],
)
def test_what_cannot_be_compared(x, y, text):
    with pytest.raises(ValueError, match=text):
        debiased_cka(x, y)
