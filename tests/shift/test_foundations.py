"""What the doors of the room let in, and Holm's correction by its definition."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.shift.checks import as_features, as_labels, as_prior, as_probabilities
from flaxtransfer.shift.statistics import HypothesisTest, holm, permutation_p

TEST = HypothesisTest("t", "H0", 0.0, 0.5, 0.0, "AUC", None, (9, 9))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        ([[0.5, np.nan]], "1 of 1 rows with NaN or infinite numbers, first row 0"),
        ([[0.5, 0.5], [0.9, 0.2]], r"1 of 2 rows that do not \(row 1 sums to 1.1\)"),
        ([[2.0, -1.0]], "negative numbers, first in row 0; are they logits"),
        ([0.5, 0.5], r"must have shape \[n, classes\], got \[2\]"),
        ([[1.0]], "one column per class, got 1"),
        (np.zeros((0, 3)), r"must have shape .*, got \[0, 3\]"),
        ([["a", "b"]], "must be numbers, got"),
    ],
)
def test_what_are_no_probabilities(array, text):
    with pytest.raises(ValueError, match=text):
        as_probabilities(array, "target probabilities")


def test_half_precision_is_probabilities_all_the_same():
    row = jnp.array([[0.1, 0.2, 0.7]], jnp.bfloat16)
    found = as_probabilities(row, "p")
    assert found.dtype == np.float64
    assert found.sum() == pytest.approx(1, abs=1e-15)
    assert as_features(row, "h").shape == (1, 3)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 1, 3], "within 0 .. 2, got 1 outside of it, first 3 in row 2"),
        ([0, -1, 2], "within 0 .. 2, got 1 outside of it, first -1 in row 1"),
        ([0, 1], r"must have shape \[3\], got \[2\]"),
        ([0.0, 0.5, 1.0], "must be class numbers, got float64"),
        ([0.0, np.nan, 1.0], "must be class numbers"),
        (["a", "b", "c"], "must be class numbers"),
    ],
)
def test_what_are_no_labels(labels, text):
    with pytest.raises(ValueError, match=text):
        as_labels(labels, "labels", count=3, classes=3)


@pytest.mark.parametrize("prior", [[0.5, 0.6], [1.5, -0.5], [np.nan, 1.0], [1.0]])
def test_what_is_no_prior(prior):
    with pytest.raises(ValueError, match="prior"):
        as_prior(prior, "prior", classes=2)


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm_by_its_definition(values):
    tests = [
        dataclasses.replace(TEST, p=p, not_testable="" if p is not None else "too few")
        for p in values
    ]
    adjusted = [test.adjusted_p for test in holm(tests)]
    testable = sorted(p for p in values if p is not None)
    # H0 number i is rejected at level a if every smaller p-value, and its own, passes a / (m - j).
    for p, found in zip(values, adjusted, strict=True):
        if p is None:
            assert found is None
            continue
        last = max(j for j, other in enumerate(testable) if other == p)
        steps = [(len(testable) - j) * other for j, other in enumerate(testable[: last + 1])]
        first = testable.index(p)
        lower = max((len(testable) - j) * q for j, q in enumerate(testable[: first + 1]))
        assert min(1, lower) <= found + 1e-12
        assert found <= min(1, max(steps)) + 1e-12


def test_a_permutation_p_is_never_zero_and_counts_ties():
    assert permutation_p(5.0, np.arange(4.0)) == 1 / 5
    assert permutation_p(0.1 + 0.2, np.array([0.3, 0.2])) == 2 / 3


def test_a_test_without_a_p_value_says_why():
    with pytest.raises(ValueError, match="exactly one of p and not_testable must be given"):
        dataclasses.replace(TEST, p=None)
    assert not dataclasses.replace(TEST, p=None, not_testable="one class").rejected()
    assert dataclasses.replace(TEST, p=0.01).rejected()
    assert not dataclasses.replace(TEST, p=0.01, adjusted_p=0.2).rejected()
