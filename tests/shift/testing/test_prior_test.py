"""The test of the prior: its maximum against bisection and plain EM, its null, its refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import chi2

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.label_shift import _detectable_total_variation, prior_test
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.marginals import noncentrality

MEANS = 1.5 * np.eye(3, 5)


def world(n=300, m=150, prevalence=(1 / 3, 1 / 3, 1 / 3), seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)

    def sample(count, shares):
        labels = rng.choice(3, size=count, p=shares)
        features = MEANS[labels] + rng.normal(size=(count, 5))
        weights = np.exp(sharpness * (features @ MEANS.T))
        return weights / weights.sum(1, keepdims=True), labels

    probabilities, labels = sample(n, np.full(3, 1 / 3))
    target, _ = sample(m, prevalence)
    return target, Calibration("none", np.ones(3), np.zeros(3), probabilities, labels)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(2, 6))
def test_the_maximum_is_certified_and_plain_em_does_not_exceed_it(seed, classes):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.full(classes, 0.5), size=80)
    rows = rng.integers(80, size=(3, 60))
    prior = rng.dirichlet(np.full(classes, 5.0))
    shares, ratios = maximize_resampled(probabilities, rows, prior, tolerance=1e-9)
    for drawn, share, ratio in zip(rows, shares, ratios, strict=True):
        likelihoods = probabilities[drawn] / prior
        density = likelihoods @ share
        assert (likelihoods / density[:, None]).mean(0).max() - 1 <= 1e-9
        assert np.log(density).sum() == pytest.approx(ratio, abs=1e-9)
        plain = prior.copy()
        for _ in range(200):
            plain *= (likelihoods / (likelihoods @ plain)[:, None]).mean(0)
        # What the certificate leaves open, in each of 60 rows.
        assert np.log(likelihoods @ plain).sum() <= ratio + 60e-9


def test_two_classes_by_bisection_of_the_score():
    target, _ = world()
    pair = target[:, :2] / target[:, :2].sum(1, keepdims=True)
    prior = np.array([0.4, 0.6])
    likelihoods = pair / prior

    def score(q):
        return ((likelihoods[:, 0] - likelihoods[:, 1]) / (likelihoods @ [q, 1 - q])).mean()

    shares, _ = maximize_resampled(pair, np.arange(len(pair))[None], prior, tolerance=1e-12)
    assert shares[0, 0] == pytest.approx(brentq(score, 1e-9, 1 - 1e-9), abs=1e-6)


def test_a_step_that_went_too_far_is_taken_back():
    # On rows like these an extrapolation ends where nothing is likely, unless it is compared.
    probabilities = np.array(
        [
            [2e-13, 0.9999994, 6e-7],
            [3e-26, 0.0018, 0.9982],
            [1e-18, 1.0, 9e-14],
            [2e-13, 0.9999994, 6e-7],
        ]
    )
    prior = np.array([0.41, 0.24, 0.35])
    shares, ratios = maximize_resampled(probabilities, np.arange(4)[None], prior)
    likelihoods = probabilities[:, 1:] / prior[1:]

    def score(q):
        return ((likelihoods[:, 0] - likelihoods[:, 1]) / (likelihoods @ [q, 1 - q])).mean()

    q = brentq(score, 1e-9, 1 - 1e-9)
    np.testing.assert_allclose(shares[0], [0, q, 1 - q], atol=1e-5)
    assert ratios[0] == pytest.approx(np.log(likelihoods @ [q, 1 - q]).sum(), abs=1e-5)


def test_certain_posteriors_are_counted_and_uninformative_ones_leave_the_prior():
    certain = np.eye(3)[[0, 0, 0, 1, 2]]
    shares, ratios = maximize_resampled(certain, np.arange(5)[None], np.array([0.2, 0.3, 0.5]))
    np.testing.assert_allclose(shares[0], [0.6, 0.2, 0.2], atol=1e-9)
    assert ratios[0] == pytest.approx((np.log([3, 3, 3, 2 / 3, 0.4])).sum())
    prior = np.array([0.2, 0.3, 0.5])
    shares, ratios = maximize_resampled(np.tile(prior, (5, 1)), np.arange(5)[None], prior)
    np.testing.assert_array_equal(shares[0], prior)
    assert ratios[0] == 0


def test_the_null_is_a_chi_square_widened_by_the_finite_validation():
    # With m = n, twice the log-likelihood ratio is 2 chi-squares: the prior is estimated too.
    target, source = world(400, 400)
    pooled = np.concatenate([source.probabilities, target])
    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(800) for _ in range(400)])
    priors = np.stack([pooled[row[:400]].mean(0) for row in order])
    _, ratios = maximize_resampled(pooled, order[:, 400:], priors)
    assert np.quantile(2 * ratios, 0.9) == pytest.approx(2 * chi2.isf(0.1, 2), rel=0.15)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_what_it_finds_calibrated_or_not(sharpness):
    assert not prior_test(*world(sharpness=sharpness, seed=1), permutations=199).rejected()
    changed = world(prevalence=(0.7, 0.2, 0.1), sharpness=sharpness)
    assert prior_test(*changed, permutations=199).rejected()


def test_the_effect_and_what_could_be_detected():
    found = prior_test(*world(2000, 1000, (0.6, 0.3, 0.1)), permutations=19)
    assert found.effect == pytest.approx(0.6 - 1 / 3, abs=0.04)
    assert found.minimum_detectable < 0.12
    assert found.counts == (2000, 1000)
    # Certain posteriors: (1 / m + 1 / n) noncentrality, and the covariance of a multinomial.
    wanted = np.sqrt(noncentrality(1) * (1 / 100 + 1 / 50) * 4 * 0.25) / 2
    assert _detectable_total_variation(np.eye(2)[np.arange(150) % 2], (100, 50)) == pytest.approx(
        wanted
    )
    assert (
        _detectable_total_variation(np.tile([[0.2, 0.4, 0.4], [0.6, 0.2, 0.2]], (9, 1)), (9, 9))
        is None
    )


def test_what_cannot_be_tested_and_shared_rows():
    target, source = world()
    assert "9 rows" in prior_test(target[:9], source).not_testable
    flat = np.full((60, 3), 1 / 3)
    blind = Calibration("none", np.ones(3), np.zeros(3), flat, np.zeros(60, int))
    assert "contain no information about the class" in prior_test(flat, blind).not_testable
    with pytest.raises(ValueError, match="same number of columns"):
        prior_test(target[:, :2] / target[:, :2].sum(1, keepdims=True), source)
    again = np.concatenate([target, source.probabilities[:3]])
    assert "3 of 153" in prior_test(again, source, permutations=19).notes[0]
    # Certain posteriors coincide by rounding.
    certain = np.eye(3)[np.arange(60) % 3]
    sure = Calibration("none", np.ones(3), np.zeros(3), certain, np.arange(60) % 3)
    assert prior_test(certain, sure, permutations=19).notes == ()


def test_a_class_that_never_occurs_changes_nothing():
    target, source = world()
    first = prior_test(target, source, permutations=49)
    wider = Calibration(
        "none",
        np.ones(4),
        np.zeros(4),
        np.pad(source.probabilities, ((0, 0), (0, 1))),
        source.labels,
    )
    again = prior_test(np.pad(target, ((0, 0), (0, 1))), wider, permutations=49)
    assert again.p == first.p
    assert again.statistic == pytest.approx(first.statistic, abs=1e-3)
