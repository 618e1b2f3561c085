"""Averages of weights: laws, and the network that comes out."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flaxtransfer as ft
from tests.support.small import PREPROCESSING, batch, network

values = st.floats(-100, 100, width=32)


def one(*numbers: float) -> ft.models.Variables:
    return {"params": {"w": np.array(numbers, np.float32)}, "batch_stats": {}}


def value(variables: ft.models.Variables) -> np.ndarray:
    return variables["params"]["w"]


@given(st.lists(st.tuples(values, st.floats(0.1, 10)), min_size=1, max_size=6))
def test_the_average_is_numpys_and_order_is_of_no_account(rows):
    numbers, weights = zip(*rows, strict=True)
    mixed = ft.training.average([one(n) for n in numbers], weights)
    expected = np.average(np.array(numbers, np.float64), weights=weights)
    np.testing.assert_allclose(value(mixed)[0], expected, rtol=1e-6, atol=1e-5)
    backwards = ft.training.average([one(n) for n in numbers[::-1]], weights[::-1])
    np.testing.assert_allclose(value(backwards), value(mixed), rtol=1e-6, atol=1e-6)


@given(values, st.integers(1, 5), st.floats(0, 1))
def test_what_is_alike_stays_bit_for_bit(number, count, amount):
    same = [one(number, -0.0) for _ in range(count)]
    assert value(ft.training.average(same)).tobytes() == value(same[0]).tobytes()
    assert (
        value(ft.training.interpolate(same[0], same[0], amount)).tobytes()
        == value(same[0]).tobytes()
    )


def test_the_ends_of_an_interpolation_are_the_networks():
    a, b = one(1.0, 2.0), one(3.0, -4.0)
    np.testing.assert_array_equal(value(ft.training.interpolate(a, b, 0.0)), value(a))
    np.testing.assert_array_equal(value(ft.training.interpolate(a, b, 1.0)), value(b))
    np.testing.assert_array_equal(value(ft.training.interpolate(a, b, 0.25)), [1.5, 0.5])


@given(st.lists(values, min_size=1, max_size=6), values)
def test_a_soup_is_never_worse_than_its_best_ingredient(numbers, target):
    soup = ft.training.greedy_soup(
        [one(n) for n in numbers], lambda v: -abs(float(value(v)[0]) - target)
    )
    assert soup.score >= max(soup.scores)
    assert soup.score == -abs(float(value(soup.variables)[0]) - target)
    assert soup.scores[soup.ingredients[0]] == max(soup.scores)


def test_statistics_of_an_average_are_measured_anew():
    model, first = network(0)
    _, second = network(1)

    def statistics(variables):
        return ft.training.recalibrate(
            ft.Classifier(model, variables, PREPROCESSING), [batch(0, 32)]
        )

    mixed = ft.training.average([first, second], statistics=statistics)
    plain = ft.training.average([first, second])
    assert jax.tree.all(jax.tree.map(np.array_equal, mixed["params"], plain["params"]))
    expected = statistics(plain)
    assert jax.tree.all(jax.tree.map(np.array_equal, mixed["batch_stats"], expected))
    assert not np.array_equal(
        mixed["batch_stats"]["bn1"]["var"], plain["batch_stats"]["bn1"]["var"]
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ft.training.average([]), "must have at least one network"),
        (lambda: ft.training.greedy_soup([], lambda v: 0.0), "must have at least one network"),
        (
            lambda: ft.training.average([one(1), one(1, 2)]),
            r"network 1 differs from network 0 in params/w",
        ),
        (lambda: ft.training.average([one(1), one(2)], [1, -1]), "a sum other than 0"),
        (lambda: ft.training.average([one(1), one(2)], [1]), "2 finite numbers"),
        (lambda: ft.training.interpolate(one(1), one(2), 1.5), "0 to 1, got 1.5"),
        (
            lambda: ft.training.greedy_soup([one(1)], lambda v: np.nan),
            "scores must be finite; that of network 0 is not",
        ),
        (
            lambda: ft.training.average(
                [{"params": {"n": np.array(1)}}, {"params": {"n": np.array(2)}}]
            ),
            "integer leaves must be equal",
        ),
    ],
)
def test_what_cannot_be_averaged_is_said(make, text):
    with pytest.raises(ValueError, match=text):
        make()
