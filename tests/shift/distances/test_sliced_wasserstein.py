"""Quantiles of unequal samples, against a peer and by definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.analysis.distances import (
    random_directions,
    sliced_wasserstein,
    wasserstein_on_lines,
)

I = np.arange(12.0)  # noqa: E741
SOURCE = np.stack([np.sin(I), np.cos(1.3 * I), 2 * np.sin(0.7 * I)], 1)
TARGET = np.stack([np.cos(I), np.sin(2.1 * I) + 0.5, I / 6], 1)[:9]
LINES = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0.6, -0.8]]).T


def test_a_number_of_pot():
    """ot.sliced_wasserstein_distance(source, target, projections=lines), POT 0.9.7.post1."""
    found = wasserstein_on_lines(SOURCE, TARGET, LINES)
    assert found == pytest.approx(0.6270248613520372, abs=1e-12)


def test_it_is_made_of_its_lines():
    lines = random_directions(3, 40, seed=7)
    assert np.linalg.norm(lines, axis=0) == pytest.approx(np.ones(40))
    found = sliced_wasserstein(SOURCE, TARGET, projections=40, seed=7)
    assert found.value == pytest.approx(wasserstein_on_lines(SOURCE, TARGET, lines), rel=1e-12)


@given(
    st.lists(st.integers(-50, 50), min_size=4, max_size=9),
    st.lists(st.integers(-50, 50), min_size=4, max_size=9),
)
def test_unequal_samples_are_compared_as_if_each_row_stood_often_enough(first, second):
    """Of n and m rows, each m and n times: samples of equal size, compared in their order."""
    source, target = np.array(first, float), np.array(second, float)
    long, other = np.repeat(np.sort(source), len(target)), np.repeat(np.sort(target), len(source))
    expected = np.sqrt(((long - other) ** 2).mean())
    found = wasserstein_on_lines(source[:, None], target[:, None], [[1.0]])
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)
    doubled = wasserstein_on_lines(np.repeat(source, 2)[:, None], target[:, None], [[1.0]])
    assert doubled == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_shift_costs_its_length_over_the_root_of_the_dimension():
    """The mean of cos^2 over directions of D dimensions is 1 / D."""
    rows = np.random.default_rng(0).normal(size=(50, 6))
    step = np.array([3, 4, 0, 0, 0, 0])
    found = sliced_wasserstein(rows, rows + step, projections=2000, permutations=19)
    assert found.value == pytest.approx(5 / np.sqrt(6), rel=0.04)


def test_it_sees_shapes_of_equal_mean_and_variance():
    random = np.random.default_rng(0)
    source = random.normal(size=(150, 2))
    target = np.sign(random.normal(size=(200, 2)))
    assert sliced_wasserstein(source, target).p == 1 / 200


def test_lines_are_not_made_of_features_drawn_with_the_same_seed():
    """W2 of 100 against 100 numbers of one Gaussian is some 0.2, along any line but their own."""
    source, target = np.random.default_rng(0).normal(size=(2, 100, 300))
    assert sliced_wasserstein(source, target, permutations=19, seed=0).value < 0.3


@pytest.mark.parametrize("lines", [np.ones(3), np.ones((2, 5)), np.ones((3, 0))])
def test_lines_of_another_space(lines):
    with pytest.raises(ValueError, match=r"directions must have shape \[3, projections\], got"):
        wasserstein_on_lines(SOURCE, TARGET, lines)


def test_no_lines_show_nothing():
    with pytest.raises(ValueError, match=r"projections must be >= 1 .*, got 0"):
        sliced_wasserstein(SOURCE, TARGET, projections=0)
