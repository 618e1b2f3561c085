"""Bins that never part equal confidences, and intervals by their formula."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.shift.calibration_metrics import bin_by_confidence, reliability
from flaxtransfer.shift.statistics import check_replicates, percentile_interval, wilson_interval


@given(st.lists(st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]), min_size=1), st.integers(1, 20))
def test_ties_stay_together_and_bins_are_ordered_and_full(confidences, bins):
    array = np.array(confidences)
    numbers = bin_by_confidence(array, bins)
    counts = np.bincount(numbers)
    assert len(counts) <= bins
    assert counts.min() >= min(10, len(array))
    for value in np.unique(array):
        assert len(set(numbers[array == value])) == 1
    order = np.argsort(array, kind="stable")
    assert (np.diff(numbers[order]) >= 0).all()


@pytest.mark.parametrize(
    ("count", "bins", "expected"),
    [
        (100, 5, [20] * 5),
        (101, 2, [50, 51]),
        (45, 15, [11, 11, 12, 11]),
        (9, 15, [9]),
        (1, 15, [1]),
    ],
)
def test_bins_of_equal_mass_where_there_are_no_ties(count, bins, expected):
    numbers = bin_by_confidence(np.linspace(0.3, 1, count), bins)
    assert np.bincount(numbers).tolist() == expected


def test_a_diagram_by_hand():
    probabilities = np.repeat([[0.6, 0.4], [0.1, 0.9]], [10, 20], axis=0)
    labels = np.array([0] * 6 + [1] * 4 + [1] * 19 + [0])
    first, second = reliability(probabilities, labels)
    assert (first.count, first.accuracy, first.smallest) == (10, 0.6, 0.6)
    assert first.confidence == pytest.approx(0.6)
    assert (second.count, second.accuracy, second.largest) == (20, 0.95, 0.9)
    assert (first.low, first.high) == wilson_interval(6, 10)
    assert json.loads(json.dumps(dataclasses.asdict(second)))["count"] == 20


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # scipy.stats.binomtest(hits, count).proportion_ci(method="wilson"), scipy 1.17.1.
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371109, 1.0),
        (81, 263, 0.2552885198782742, 0.36620957698280004),
        (1, 1, 0.20654931437723745, 1.0),
    ],
)
def test_wilson_by_scipy(hits, count, low, high):
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: wilson_interval(3, 2), "got 3 successes of 2 trials"),
        (lambda: wilson_interval(0, 0), "got 0 successes of 0 trials"),
        (lambda: wilson_interval(1, 2, 95), "level must be between 0 and 1, got 95"),
        (lambda: percentile_interval(np.ones(3), 0), "level must be between 0 and 1, got 0"),
        (lambda: check_replicates(0), "replicates must be a whole number >= 1, got 0"),
        (lambda: check_replicates(1.5), "replicates must be a whole number >= 1, got 1.5"),
        (lambda: reliability([[0.5, 0.5]], [0], bins=0), "bins must be a whole number >= 1, got 0"),
        (lambda: reliability([[0.5, 0.5]], [0, 1]), r"labels must have shape \[1\]"),
    ],
)
def test_what_has_no_answer(call, text):
    with pytest.raises(ValueError, match=text):
        call()
