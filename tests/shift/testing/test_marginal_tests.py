"""Tests of single columns and of predicted labels: scipy's numbers, and no coding of classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flaxtransfer.shift.marginals import (
    kolmogorov_smirnov_test,
    noncentrality,
    predicted_label_test,
)
from flaxtransfer.shift.statistics import holm


@pytest.mark.parametrize("counts", [(40, 30), (7, 5), (300, 300), (10_500, 50)])
def test_columns_have_the_p_values_of_scipy(counts):
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(counts[0], 4)), rng.normal(size=(counts[1], 4))
    target[:, 2] += 0.3
    found = kolmogorov_smirnov_test(source, target)
    for k, member in enumerate(found.members):
        peer = stats.ks_2samp(source[:, k], target[:, k])
        assert member.statistic == pytest.approx(peer.statistic, abs=1e-12)
        assert member.p == pytest.approx(peer.pvalue, abs=1e-10)
    assert found.p == min(member.adjusted_p for member in found.members)
    assert found.p == pytest.approx(min(1, 4 * min(member.p for member in found.members)))
    assert found.members == holm(found.members)
    largest = int(np.argmax([member.statistic for member in found.members]))
    assert found.notes[0] == f"feature {largest} differs most"
    assert found.effect == found.members[largest].effect
    # The limit of the critical value by Kolmogorov, and the scatter of a share of one half.
    unit = np.sqrt(1 / counts[0] + 1 / counts[1])
    detectable = (stats.kstwobign.isf(0.05 / 4) + stats.norm.ppf(0.8) / 2) * unit
    assert found.minimum_detectable == pytest.approx(min(1, detectable), rel=1e-3)


def test_constant_columns_do_not_count():
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(50, 3)), rng.normal([0, 2, 0], size=(50, 3))
    source[:, 0] = target[:, 0] = 1.0
    found = kolmogorov_smirnov_test(source, target, column_name="probability of class")
    assert found.members[0].not_testable == "it is constant"
    assert found.p == pytest.approx(2 * found.members[1].p)
    assert found.notes == (
        "probability of class 1 differs most",
        "1 of 3 columns are constant and were left out",
    )
    # Constant on either side, and not the same constant, is a difference.
    source[:, 0] = 0.0
    assert kolmogorov_smirnov_test(source, target).members[0].p < 1e-20
    constant = kolmogorov_smirnov_test(np.ones((9, 2)), np.ones((9, 2)))
    assert constant.not_testable == "every feature is constant and equal on both sides"
    assert "each side needs >= 5" in kolmogorov_smirnov_test(source[:4], target).not_testable


def test_shared_rows_are_noticed():
    source = np.random.default_rng(0).normal(size=(30, 2))
    assert "10 of 10 target rows" in kolmogorov_smirnov_test(source, source[:10]).notes[-1]


TABLES = [
    ([30, 40, 30], [10, 30, 60]),
    ([5, 5], [5, 5]),
    ([100, 20, 30, 9], [70, 20, 10, 9]),
]


def labels(counts):
    return np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize(("source", "target"), TABLES)
def test_the_chi_square_is_that_of_scipy_without_correction(source, target):
    peer = stats.chi2_contingency([source, target], correction=False)
    found = predicted_label_test(labels(source), labels(target))
    assert found.statistic == pytest.approx(peer.statistic, abs=1e-10)
    assert found.p == pytest.approx(peer.pvalue, abs=1e-10)
    assert "limit" in found.assumptions[1]


def test_what_shares_of_two_classes_would_have_shown():
    # Two shares near one half, at 80 % power: (1.960 + 0.842) sqrt((1 / n + 1 / m) / 4).
    found = predicted_label_test(labels([50, 50]), labels([100, 100]))
    wanted = (stats.norm.isf(0.025) + stats.norm.ppf(0.8)) * np.sqrt(0.015 / 4)
    assert found.minimum_detectable == pytest.approx(wanted, rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8), st.integers(0, 8))
def test_two_classes_are_enumerated(a, b, c, d):
    table = np.array([[a, b], [c, d]])
    found = predicted_label_test(labels(table[0]), labels(table[1]))
    if table.sum(1).min() < 5 or table.sum(0).min() == 0:
        assert found.p is None
        return
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    if expected.min() >= 5:
        return

    def square(x):
        return ((x - expected[1, 0]) ** 2) * (1 / expected).sum()

    total, common, drawn = int(table.sum()), int(table[:, 0].sum()), int(table[1].sum())
    exact = sum(
        stats.hypergeom.pmf(x, total, common, drawn)
        for x in range(drawn + 1)
        if square(x) >= square(c) - 1e-9
    )
    assert found.p == pytest.approx(exact, abs=1e-10)


def test_small_counts_of_three_classes_by_permutation():
    table = np.array([[9, 2, 1], [2, 4, 3]])
    found = predicted_label_test(labels(table[0]), labels(table[1]), permutations=20_000)
    column, drawn = table.sum(0), int(table[1].sum())
    expected = np.outer(table.sum(1), column) / table.sum()

    def square(row):
        return (((np.array([column - row, row]) - expected) ** 2) / expected).sum()

    exact = sum(
        stats.multivariate_hypergeom.pmf([a, b, drawn - a - b], column, drawn)
        for a in range(column[0] + 1)
        for b in range(column[1] + 1)
        if 0 <= drawn - a - b <= column[2]
        and square(np.array([a, b, drawn - a - b])) >= square(table[1]) - 1e-9
    )
    assert found.p == pytest.approx(exact, abs=0.01)
    assert (
        "tables with the same margins: the smallest expected count is 1.7" in found.assumptions[1]
    )


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 5))
def test_neither_the_coding_of_classes_nor_absent_ones_matter(coding, seed):
    coding = np.array([3 * number for number in coding])
    rng = np.random.default_rng(seed)
    source, target = rng.integers(5, size=20), rng.integers(3, size=12)
    first = predicted_label_test(source, target, permutations=99)
    again = predicted_label_test(coding[source], coding[target], permutations=99)
    assert (first.p, first.effect) == (again.p, pytest.approx(again.effect))
    assert first.statistic == pytest.approx(again.statistic)
    # Never random: twice is the same.
    assert predicted_label_test(source, target, permutations=99).p == first.p


def test_probabilities_are_their_largest_class():
    source, target = np.eye(3)[labels([9, 3, 4])], np.eye(3)[labels([2, 9, 8])]
    by_number = predicted_label_test(labels([9, 3, 4]), labels([2, 9, 8]))
    assert predicted_label_test(source, target) == by_number


@pytest.mark.parametrize(
    ("source", "target", "error", "text"),
    [
        ([0.5, 1.0], [1, 0], TypeError, "must be class numbers, got float64"),
        (["a"], ["b"], TypeError, "class numbers"),
        ([[0.5, 0.5]], [1, 0], ValueError, "must both be labels"),
        (
            [[0.5, 0.5]],
            [[1, 0, 0]],
            ValueError,
            "same number of columns, got 2 and 3",
        ),
    ],
)
def test_what_are_no_predictions(source, target, error, text):
    with pytest.raises(error, match=text):
        predicted_label_test(source, target)


def test_what_cannot_be_tested():
    assert predicted_label_test([3] * 9, [3] * 9).not_testable == "every prediction is class 3"
    assert "9 and 4 rows" in predicted_label_test([3] * 9, [1] * 4).not_testable


@pytest.mark.parametrize("freedom", [1, 3, 99])
def test_the_noncentrality_gives_80_per_cent(freedom):
    critical = stats.chi2.isf(0.05, freedom)
    assert stats.ncx2.sf(critical, freedom, noncentrality(freedom)) == pytest.approx(0.8, abs=1e-6)
