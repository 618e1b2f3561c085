"""Bayes' rule for another prevalence: by hand, by its laws, and on a mixture that is known."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.prior_correction import adjust_prior

NAN = np.full(2, np.nan)
ESTIMATE = Prevalence("BBSE", np.array([0.9, 0.1]), NAN, NAN, 0.95, np.array([0.5, 0.5]), (10, 20))

positive = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(
    lambda shares: np.array(shares) / sum(shares)
)


@given(st.lists(positive, min_size=1, max_size=5).map(np.stack), positive, positive, positive)
def test_identity_round_trip_and_composition(rows, p, q, r):
    np.testing.assert_allclose(adjust_prior(rows, p, source_prior=p), rows, rtol=1e-9)
    there = adjust_prior(rows, q, source_prior=p)
    np.testing.assert_allclose(adjust_prior(there, p, source_prior=q), rows, rtol=1e-9)
    np.testing.assert_allclose(
        adjust_prior(there, r, source_prior=q), adjust_prior(rows, r, source_prior=p), rtol=1e-9
    )


@given(st.floats(0.001, 0.999), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_two_classes_multiply_their_odds(f, p, q):
    (found,) = adjust_prior([[f, 1 - f]], [q, 1 - q], source_prior=[p, 1 - p])
    odds = f / (1 - f) * (q / (1 - q)) * ((1 - p) / p)
    assert found[0] / found[1] == pytest.approx(odds, rel=1e-9)


def test_an_estimate_knows_its_source():
    np.testing.assert_allclose(adjust_prior([[0.5, 0.5]], ESTIMATE), [[0.9, 0.1]], atol=1e-15)


def test_zeros_are_exact_and_small_numbers_survive():
    found = adjust_prior([[0.5, 0.3, 0.2]], [0.5, 0.0, 0.5], source_prior=[0.2, 0.6, 0.2])
    np.testing.assert_allclose(found, [[5 / 7, 0, 2 / 7]], atol=1e-15)
    assert found[0, 1] == 0
    found = adjust_prior([[0.5, 0.5, 0.0]], [0.9, 0.1, 0.0], source_prior=[0.5, 0.5, 0.0])
    np.testing.assert_allclose(found, [[0.9, 0.1, 0]], atol=1e-15)
    found = adjust_prior([[1.0, 0.0]], [0.1, 0.9], source_prior=[0.9, 0.1])
    np.testing.assert_array_equal(found, [[1, 0]])
    # A product of these underflows; its logarithm does not.
    found = adjust_prior(
        [[1.0, 1e-300, 0.0]], [0.0, 1e-200, 1.0], source_prior=[0.5, 0.5, 0.0 + 1e-9]
    )
    np.testing.assert_array_equal(found, [[0, 1, 0]])


def test_an_exact_correction_does_not_lose_accuracy():
    random = np.random.default_rng(0)
    gains = []
    for _ in range(20):
        p, q = random.dirichlet(np.ones(4)), random.dirichlet(np.ones(4))
        centers = random.normal(size=(4, 3))
        labels = random.choice(4, size=20_000, p=q)
        inputs = centers[labels] + random.normal(size=(20_000, 3))
        scores = inputs @ centers.T - np.square(centers).sum(1) / 2
        probabilities = softmax(scores + np.log(p), axis=1)
        corrected = adjust_prior(probabilities, q, source_prior=p)
        np.testing.assert_allclose(corrected, softmax(scores + np.log(q), axis=1), atol=1e-9)
        right = corrected.argmax(1) == labels
        gains.append(right.mean() - (probabilities.argmax(1) == labels).mean())
    # The corrected rule is the best there is; a sample of 20,000 may say otherwise by chance.
    assert min(gains) > -0.005
    assert np.mean(gains) > 0.02


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"source_prior": None}, "source_prior must be given with the target's prior, got None"),
        ({"prevalence": ESTIMATE}, "source_prior must be None with a Prevalence"),
        ({"prevalence": [0.9, 0.3]}, "the target's prior must sum to 1, got a sum of 1.2"),
        ({"source_prior": [0.5, 0.3, 0.2]}, r"the source's prior must have shape \[2\], got \[3\]"),
        (
            {"source_prior": [1.0, 0.0]},
            r"source's prior must be > 0 where the target's is, got 0 for classes \[1\]",
        ),
        (
            {"probabilities": [[1.0, 0.0]], "prevalence": [0.0, 1.0]},
            "got 1 rows without one, first",
        ),
        ({"probabilities": [[2.0, -1.0]]}, "are they logits"),
    ],
)
def test_what_cannot_be_corrected(changed, text):
    given = {
        "probabilities": [[0.5, 0.5]],
        "prevalence": [0.9, 0.1],
        "source_prior": [0.5, 0.5],
    } | changed
    with pytest.raises(ValueError, match=text):
        adjust_prior(given.pop("probabilities"), given.pop("prevalence"), **given)


def test_what_is_not_identifiable_corrects_nothing_unless_told_to():
    lost = dataclasses.replace(ESTIMATE, identifiable=False, reason="all rows are the same")
    with pytest.raises(
        ValueError, match=r"identifiable, .* all rows are the same; a correction by it"
    ):
        adjust_prior([[0.5, 0.5]], lost)
    np.testing.assert_allclose(adjust_prior([[0.5, 0.5]], lost, force=True), [[0.9, 0.1]])
