"""Tests of a few labels: exact distributions by enumeration, and the number of labels needed."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom, norm

from flaxtransfer.shift import concept_shift
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.concept_shift import (
    label_residual_test,
    labels_needed,
    log_loss_test,
    posterior_ratio_tests,
)
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.prior_correction import EstimatedPosteriors, corrected_posteriors

POSTERIORS = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.25, 0.6, 0.15]])
OTHER = np.array([[0.2, 0.6, 0.2], [0.1, 0.3, 0.6], [0.1, 0.1, 0.8], [0.5, 0.1, 0.4]])
LABELS = np.array([1, 1, 0, 2])


def every_label(posteriors, value):
    """Values of all 81 possible labels, and their probabilities."""
    found = []
    for labels in itertools.product(range(3), repeat=4):
        chance = np.prod(posteriors[np.arange(4), labels])
        found.append((value(np.array(labels)), chance))
    return np.array(found)


def log_loss(labels):
    return -np.log(POSTERIORS[np.arange(4), labels]).sum()


def square(labels):
    residual = np.bincount(labels, minlength=3) - POSTERIORS.sum(0)
    covariance = sum(np.diag(row) - np.outer(row, row) for row in POSTERIORS)
    return residual @ np.linalg.pinv(covariance) @ residual


def ratio(labels):
    rows = np.arange(4)
    return np.log(OTHER[rows, labels] / POSTERIORS[rows, labels]).sum()


@pytest.mark.parametrize(
    ("value", "truth", "sign", "test"),
    [
        (log_loss, POSTERIORS, 1, lambda: log_loss_test(POSTERIORS, LABELS)),
        (square, POSTERIORS, 1, lambda: label_residual_test(POSTERIORS, LABELS)),
        (ratio, POSTERIORS, 1, lambda: posterior_ratio_tests(POSTERIORS, OTHER, LABELS)[0]),
        (ratio, OTHER, -1, lambda: posterior_ratio_tests(POSTERIORS, OTHER, LABELS)[1]),
    ],
)
def test_p_is_that_of_all_possible_labels(value, truth, sign, test):
    every = every_label(truth, value)
    exact = every[sign * every[:, 0] >= sign * value(LABELS) - 1e-9, 1].sum()
    found = test()
    assert found.statistic == pytest.approx(value(LABELS))
    assert found.p == pytest.approx(exact, abs=0.02)
    assert found.counts == (4,)


def test_effects_by_definition():
    loss = log_loss_test(POSTERIORS, LABELS)
    entropy = -(POSTERIORS * np.log(POSTERIORS)).sum()
    assert loss.effect == pytest.approx((loss.statistic - entropy) / 4)
    residual = label_residual_test(POSTERIORS, LABELS)
    missed = np.array([1, 2, 1]) - POSTERIORS.sum(0)
    assert residual.effect == pytest.approx(np.abs(missed).sum() / 8)
    assert residual.notes == ("class 2 is more frequent than expected, by 0.2 of 4 labels",)


def test_what_would_have_been_detected_is_that_of_a_normal_sum():
    # Sums of 400 labels are normal: 1.645 + 0.842 deviations from what is expected.
    raw, other = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    labels, far = np.repeat([0, 1], [280, 120]), norm.ppf(0.95) + norm.ppf(0.8)

    def moments(shares, scores):
        mean = shares @ scores
        return mean, np.sqrt((shares @ scores**2 - mean**2) / 400)

    given = [np.tile(shares, (400, 1)) for shares in (raw, other)]
    loss = log_loss_test(given[0], labels)
    assert loss.minimum_detectable == pytest.approx(far * moments(raw, -np.log(raw))[1], rel=0.05)
    ratio = np.log(other / raw)
    for found, shares, sign in zip(
        posterior_ratio_tests(*given, labels), (raw, other), (1, -1), strict=True
    ):
        mean, deviation = moments(shares, ratio)
        wanted = mean + sign * far * deviation
        assert found.minimum_detectable == pytest.approx(wanted, abs=0.05 * deviation * far)


def test_many_labels_are_drawn_as_few_are(monkeypatch):
    posteriors = np.random.default_rng(0).dirichlet(np.ones(4), size=6)
    found = []
    for at_once in (0, 10**9):
        monkeypatch.setattr(concept_shift, "_MAX_COMPARISONS", at_once)
        random = np.random.default_rng(1)
        found.append(concept_shift._draw_labels(posteriors, 50, random))
    np.testing.assert_array_equal(found[0], found[1])


def test_two_classes_are_a_binomial_test():
    posteriors = np.tile([0.8, 0.2], (30, 1))
    labels = np.repeat([0, 1], [19, 11])
    found = label_residual_test(posteriors, labels, simulations=20_000)
    exact = binom.sf(10, 30, 0.2) + binom.cdf(1, 30, 0.2)
    assert found.p == pytest.approx(exact, abs=0.005)


def test_impossible_labels_are_rejected_and_certain_right_ones_say_nothing():
    posteriors = np.tile([1.0, 0.0], (5, 1))
    wrong = [0, 0, 0, 0, 1]
    for test in (log_loss_test, label_residual_test):
        assert test(posteriors, wrong).p == pytest.approx(1e-4)
        assert "certain" in test(posteriors, [0] * 5).not_testable
        assert "2 labels; a test needs >= 3" in test(posteriors[:2], [0, 1]).not_testable
    covariate, label = posterior_ratio_tests(posteriors, np.full((5, 2), 0.5), wrong)
    assert covariate.rejected()
    assert not label.rejected()


def test_equal_hypotheses_are_not_told_apart():
    for found in posterior_ratio_tests(POSTERIORS, POSTERIORS, LABELS):
        assert "the same posteriors" in found.not_testable
    for found in posterior_ratio_tests(POSTERIORS[:2], OTHER[:2], LABELS[:2]):
        assert "2 labels" in found.not_testable


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: log_loss_test(POSTERIORS, [0, 1]), "labels must have shape"),
        (lambda: label_residual_test(POSTERIORS, [0, 1, 2, 3]), "within 0 .. 2, got 1 outside"),
        (
            lambda: log_loss_test(POSTERIORS, LABELS, simulations=9),
            "must be >= 19, got 9",
        ),
        (lambda: posterior_ratio_tests(POSTERIORS, OTHER[:, :2], LABELS), "must sum to 1 per row"),
        (
            lambda: labels_needed(POSTERIORS, OTHER[:3]),
            "same examples, got 4 and 3 rows",
        ),
        (
            lambda: labels_needed(POSTERIORS, OTHER, power=1.0),
            "must be between 0 and 1, got 1.0",
        ),
        (lambda: labels_needed(POSTERIORS, OTHER, max_labels=0), "max_labels must be >= 1, got 0"),
    ],
)
def test_what_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def target(m=200, seed=0, prevalence=(0.8, 0.2)):
    rng = np.random.default_rng(seed)

    def sample(count, shares):
        labels = rng.choice(2, size=count, p=shares)
        logits = 2 * (2 * labels - 1) + 2 * rng.normal(size=count)
        positive = 1 / (1 + np.exp(-logits))
        return np.stack([1 - positive, positive], 1), labels

    probabilities, labels = sample(300, (0.5, 0.5))
    source = Calibration("none", np.ones(2), np.zeros(2), probabilities, labels)
    return *sample(m, prevalence), source


def test_corrected_posteriors_follow_bayes_and_scatter_as_their_estimate_does():
    probabilities, _, source = target()
    rows = np.arange(0, 40, 2)
    found = corrected_posteriors(rows, probabilities, source, draws=300)
    share = maximize_resampled(probabilities, np.arange(200)[None], source.prior)[0][0]
    weighted = probabilities[rows] * share / source.prior
    np.testing.assert_allclose(
        found.posteriors, weighted / weighted.sum(1, keepdims=True), atol=1e-12
    )
    assert found.estimates.shape == (300, 20, 2)
    # Log-odds of the estimates differ from those of the same examples by one number a draw: the
    # log-odds of prevalence, whose scatter is that of estimates on new targets.
    log_odds = np.diff(np.log(found.estimates), axis=2)[:, :, 0]
    own = np.diff(np.log(found.posteriors), axis=1)[:, 0][found.rows]
    apart = log_odds - own
    np.testing.assert_allclose(apart, apart[:, :1] * np.ones(20), atol=1e-6)
    estimates = []
    for seed in range(100):
        fresh, _, other = target(seed=seed + 1)
        q = maximize_resampled(fresh, np.arange(200)[None], other.prior)[0][0]
        estimates.append(np.log(q[1] / q[0]) - np.log(other.prior[1] / other.prior[0]))
    assert np.std(apart[:, 0]) == pytest.approx(np.std(estimates), rel=0.35)
    with pytest.raises(ValueError, match=r"labeled must be within 0 \.\. 199, got rows 0 \.\. 200"):
        corrected_posteriors([0, 200], probabilities, source)
    with pytest.raises(ValueError, match="labeled must be row numbers"):
        corrected_posteriors([0.5], probabilities, source)


def test_labeled_examples_are_drawn_into_the_target_that_corrects_them():
    # With every example labeled and a source that does not scatter, a draw is its rows alone.
    probabilities, _, _ = target(30)
    even = np.full((40, 2), 0.5)
    source = Calibration("none", np.ones(2), np.zeros(2), even, np.arange(40) % 2)
    found = corrected_posteriors(np.arange(30), probabilities, source, draws=20)
    shares, _ = maximize_resampled(probabilities, found.rows, source.prior)
    weighted = probabilities[found.rows] * shares[:, None]
    np.testing.assert_allclose(found.estimates, weighted / weighted.sum(2, keepdims=True))


def test_a_class_that_the_source_never_has_is_left_as_it_is():
    rows = np.tile([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0]], (20, 1))
    source = Calibration("none", np.ones(3), np.zeros(3), rows, np.arange(40) % 2)
    found = corrected_posteriors([0, 1, 2], np.concatenate([np.eye(3)[2:], rows]), source)
    np.testing.assert_array_equal(found.posteriors[0], [0, 0, 1])
    np.testing.assert_allclose(found.estimates.sum(2), 1)


def test_estimated_posteriors_without_scatter_are_known_ones():
    known = EstimatedPosteriors.known(POSTERIORS)
    for test in (log_loss_test, label_residual_test):
        assert test(known, LABELS).p == test(POSTERIORS, LABELS).p
    assert "known" in log_loss_test(POSTERIORS, LABELS).assumptions[1]
    assert "bootstrap" in log_loss_test(known, LABELS).assumptions[1]


def test_estimated_posteriors_are_believed_less():
    probabilities, labels, source = target()
    found = corrected_posteriors(np.arange(150), probabilities, source)
    sure = label_residual_test(found.posteriors, labels[:150])
    unsure = label_residual_test(found, labels[:150])
    assert unsure.minimum_detectable > sure.minimum_detectable
    assert unsure.p > sure.p


def test_labels_needed_against_the_exact_binomial():
    # 0.5 against 0.9: the ratio is a function of the number of 0s, and the power of either test
    # that of a binomial one.
    found = labels_needed(
        np.tile([0.5, 0.5], (9, 1)), np.tile([0.9, 0.1], (9, 1)), max_labels=40, simulations=20_000
    )

    def power(count):
        numbers = np.arange(count + 1)
        above = next(k for k in numbers if binom.sf(k - 1, count, 0.5) <= 0.05 or k == count)
        below = next(k for k in numbers[::-1] if binom.cdf(k, count, 0.9) <= 0.05 or k == 0)
        return min(binom.sf(above - 1, count, 0.9), binom.cdf(below, count, 0.5))

    for count in (10, 15, 20, 30):
        assert found.powers[count - 1] == pytest.approx(power(count), abs=0.02)
    assert found.powers[found.count - 1 :].min() >= 0.8
    assert found.powers[found.count - 2] < 0.8


def test_nearer_hypotheses_need_more_labels():
    raw = np.random.default_rng(0).dirichlet(np.ones(3), size=200)

    def needed(share):
        weighted = raw * np.array([1 + share, 1, 1 - share])
        return labels_needed(raw, weighted / weighted.sum(1, keepdims=True), max_labels=300)

    counts = [needed(share).count for share in (0.9, 0.6)]
    assert counts[0] < counts[1]
    few = needed(0.1)
    assert few.count is None
    assert "300 labels have a power of" in few.reason
