"""Intervals of prevalence: Wilson's where there is nothing else, and what a validation adds."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import binom, binomtest, norm

from flaxtransfer.shift import uncertainty
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.likelihood import maximize_likelihood
from flaxtransfer.shift.prevalence import estimate_prevalence
from flaxtransfer.shift.prevalence_intervals import critical_values
from flaxtransfer.shift.uncertainty import (
    Sample,
    influence_functions,
    likelihood_replicates,
    observed_information,
    percentiles,
    precision,
    resampled_weights,
    scale_response,
    weakest_direction,
)

CENTERS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
PRIOR = np.full(3, 1 / 3)
Z = norm.ppf(0.975)


def logits(prevalence, count, seed):
    random = np.random.default_rng(seed)
    labels = random.choice(3, size=count, p=prevalence)
    inputs = CENTERS[labels] + random.normal(size=(count, 2))
    found = 1.5 * (inputs @ CENTERS.T - np.square(CENTERS).sum(1) / 2)
    return found - found.mean(1, keepdims=True), labels


def fit(given, labels, method, weights):
    """Weighted calibration, to many digits: (scale, bias)."""
    one_hot = np.eye(3)[labels]

    def unpack(values):
        scale = values[:3] if method == "vector" else np.full(3, values[0])
        free = values[3:] if method == "vector" else values[1:]
        bias = np.append(free, -free.sum()) if len(free) else np.zeros(3)
        return scale, bias

    def loss(values):
        scale, bias = unpack(values)
        return -(weights[:, None] * one_hot * log_softmax(given * scale + bias, axis=1)).sum()

    start = {"temperature": np.ones(1), "bias_corrected": np.array([1.0, 0, 0])}.get(
        method, np.array([1.0, 1, 1, 0, 0])
    )
    found = minimize(loss, start, method="BFGS", options={"gtol": 1e-8}).x
    return unpack(found)


def source_of(method="none", count=200, seed=0, weights=None):
    given, labels = logits(PRIOR, count, seed)
    weights = np.ones(count) if weights is None else weights
    scale, bias = np.full(3, 1 / 1.5), np.zeros(3)
    if method != "none":
        scale, bias = fit(given, labels, method, weights)
    return Calibration(method, scale, bias, softmax(given * scale + bias, axis=1), labels)


def sample_of(source, prevalence, count, seed=1):
    given, _ = logits(prevalence, count, seed)
    target = softmax(given * source.scale + source.bias, axis=1)
    return Sample(target, source, np.zeros(3), np.zeros(3))


def kept(own, total, classes):
    """Ends of the binomial shares that are kept, on a grid.

    By a score corrected for skewness in the short tail, and in the long tail by the likelihood
    ratio's root and a sixth of the skewness.
    """
    at = np.linspace(1e-6, 1 - 1e-6, 400_001)
    error = np.sqrt(at * (1 - at) / total)
    skewness = (1 - 2 * at) / np.sqrt(total * at * (1 - at))
    score = (own - at) / error
    short = score - skewness * np.maximum(score**2 - 1, 0) / 6
    root = np.sqrt(2 * total * np.maximum(rel_entr(own, at) + rel_entr(1 - own, 1 - at), 0))
    inside = (total * own + 0.5) / (total + classes / 2)
    long = np.sign(own - at) * root + (1 - 2 * inside) / np.sqrt(total * inside * (1 - inside)) / 6
    score = np.where(score * skewness < 0, short, long)
    from_zero, from_one = (critical_values(np.minimum(d / error, 9), 0.95) for d in (at, 1 - at))
    above = from_zero[0] + from_one[1] - Z
    below = from_zero[1] + from_one[0] - Z
    held = np.where(at < own, score <= above, -score <= below)
    return at[held][0], at[held][-1]


@pytest.mark.parametrize("counts", [(30, 25, 45), (0, 3, 97), (12, 0, 288), (0, 0, 60)])
def test_certain_posteriors_have_intervals_of_a_binomial_share(counts):
    """Gart and Nam's and Barndorff-Nielsen's, with Feldman and Cousins' tails near a border."""
    total = sum(counts)
    labels = np.arange(300) % 3
    source = Calibration("none", np.ones(3), np.zeros(3), np.eye(3)[labels], labels)
    found = estimate_prevalence(np.repeat(np.eye(3), counts, axis=0), source)
    expected = np.array([kept(count / total, total, len(counts)) for count in counts])
    # Where one class is all there is, it shares its room with one rival at a time.
    slack = 2e-4 if max(counts) < total else 0.02
    np.testing.assert_allclose(found.low, expected[:, 0], atol=slack)
    np.testing.assert_allclose(found.high, expected[:, 1], atol=slack)


def test_far_from_both_borders_the_interval_is_wilsons():
    counts = np.array([3000, 2000, 5000])
    labels = np.arange(300) % 3
    source = Calibration("none", np.ones(3), np.zeros(3), np.eye(3)[labels], labels)
    found = estimate_prevalence(np.repeat(np.eye(3), counts, axis=0), source)
    for k, count in enumerate(counts):
        wilson = binomtest(count, 10_000).proportion_ci(0.95, method="wilson")
        assert (found.low[k], found.high[k]) == pytest.approx((wilson.low, wilson.high), abs=1e-6)


def test_intervals_of_a_rare_share_cover_it():
    """Exactly, by the binomial distribution of 300 certain targets: on average .95 to .96.

    Counts can do no better: an interval of mid-p tests has .952 here, and .918 at its worst.
    """
    labels = np.arange(20_000) % 2
    source = Calibration("none", np.ones(2), np.zeros(2), np.eye(2)[labels], labels)
    counts = np.arange(60)
    ends = [estimate_prevalence(np.repeat(np.eye(2), (300 - n, n), axis=0), source) for n in counts]
    low, high = (np.array([getattr(found, end)[1] for found in ends]) for end in ("low", "high"))
    shares = np.linspace(0.01, 0.1, 600)[:, None]
    held = (binom.pmf(counts, 300, shares) * ((low <= shares) & (shares <= high))).sum(1)
    assert 0.95 < held.mean() < 0.96
    assert held.min() > 0.915
    assert held.max() < 0.99


def test_the_variance_of_the_target_is_the_inverse_of_the_information():
    source = source_of()
    sample = sample_of(source, [0.2, 0.3, 0.5], 2000)
    maximum = maximize_likelihood(sample.probabilities, source.prior, tolerance=1e-10)
    precise = precision(sample, maximum, observed_information(sample, maximum))
    scores = sample.probabilities / source.prior
    scores = scores / (scores @ maximum.estimate)[:, None]
    # On shares that sum to 1: (I^-1 - q q') / m, with the observed information I.
    inverse = np.linalg.inv(scores.T @ scores / 2000)
    observed = np.diag(inverse - np.outer(maximum.estimate, maximum.estimate)) / 2000
    np.testing.assert_allclose(precise.target, observed, rtol=0.08)


@pytest.mark.parametrize("method", ["none", "temperature", "bias_corrected", "vector"])
def test_an_influence_is_a_derivative_of_the_whole_estimate(method):
    # Every validation example gets a little more weight; calibration, prior and prevalence follow.
    source = source_of(method, 60)
    given, _ = logits([0.2, 0.3, 0.5], 400, 1)
    sample = sample_of(source, [0.2, 0.3, 0.5], 400)
    maximum = maximize_likelihood(sample.probabilities, source.prior, tolerance=1e-11)
    precise = precision(sample, maximum, observed_information(sample, maximum))
    validation_logits, labels = logits(PRIOR, 60, 0)

    def estimate(weights):
        scale, bias = source.scale, source.bias
        if method != "none":
            scale, bias = fit(validation_logits, labels, method, weights)
        validation = softmax(validation_logits * scale + bias, axis=1)
        prior = weights @ validation / weights.sum()
        target = softmax(given * scale + bias, axis=1)
        return maximize_likelihood(target, prior, tolerance=1e-11).estimate

    step, squares = 1e-3, np.zeros(3)
    some = range(0, 60, 5)
    for row in some:
        more, less = np.ones(60), np.ones(60)
        more[row], less[row] = 1 + step, 1 - step
        squares += np.square((estimate(more) - estimate(less)) / (2 * step))
    # The same examples by the delta method.
    moved = np.concatenate([np.concatenate(part, 1) for part in influence_functions(source)])
    observed = observed_information(sample, maximum)
    response = np.diag(observed @ maximum.estimate) - observed * maximum.estimate
    scale = scale_response(source, sample.probabilities, maximum.estimate)
    inverse = np.linalg.inv(observed)
    sums = inverse.sum(1)
    tangent = inverse - np.outer(sums, sums) / sums.sum()
    change = moved @ np.concatenate([response, scale], 1).T @ tangent / 60
    np.testing.assert_allclose(squares, np.square(change[list(some)]).sum(0), rtol=0.02)
    # And all of them in the variance, with the expected information for the observed one.
    np.testing.assert_allclose(precise.validation, np.square(change).sum(0), rtol=0.25)


def test_a_larger_validation_adds_less():
    widths = []
    for count in (50, 500, 50_000):
        source = source_of(count=count)
        target = sample_of(source, [0.2, 0.3, 0.5], 2000).probabilities
        found = estimate_prevalence(target, source)
        widths.append((found.high - found.low).max())
    assert widths[0] > 1.5 * widths[2]
    assert widths[0] > widths[1] > widths[2]


def test_what_cannot_be_told_apart_is_the_weakest_direction():
    source = source_of()
    sample = sample_of(source, [0.3, 0.3, 0.4], 500)
    halves = sample.probabilities[:, [0, 1, 2, 2]] * [1, 1, 0.5, 0.5]
    validation = source.probabilities[:, [0, 1, 2, 2]] * [1, 1, 0.5, 0.5]
    twins = Calibration("none", np.ones(4), np.zeros(4), validation, source.labels)
    sample = Sample(halves, twins, np.zeros(4), np.zeros(4))
    error, way = weakest_direction(
        sample, maximize_likelihood(halves, twins.prior, tolerance=1e-10)
    )
    assert error > 1e3
    np.testing.assert_allclose(np.abs(way), [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-6)


def test_rows_are_drawn_again_as_often_as_there_are_rows():
    random = np.random.default_rng(0)
    weights = np.concatenate(list(resampled_weights([70, 30, 1], 400, random)), 1)
    assert (weights.sum(1) == 101).all()
    # Binomial with mean 1 and variance 1 - 1/101, over 40400 numbers.
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(1, abs=0.05)
    assert np.corrcoef(weights[:, 0], weights[:, 100])[0, 1] == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("labeled", [(0, 0, 0), (3, 0, 9)])
def test_a_bootstrap_replicate_is_the_maximum_of_its_rows(labeled, monkeypatch):
    source = source_of()
    sample = sample_of(source, [0.05, 0.15, 0.8], 150)
    sample = Sample(sample.probabilities, source, np.array(labeled, float), np.zeros(3))
    maximum = maximize_likelihood(
        sample.probabilities, source.prior, counts=sample.counts, tolerance=1e-10
    )
    kept = {}

    def remember(*given):
        kept["given"] = given
        return original(*given)

    original = uncertainty._solve
    monkeypatch.setattr(uncertainty, "_solve", remember)
    found = likelihood_replicates(sample, maximum, 40, np.random.default_rng(3))
    _, _, weights, factors, pushes, counts = kept["given"]
    assert not pushes.any()
    for number in range(40):
        best = maximize_likelihood(
            sample.probabilities,
            source.prior / factors[number],
            counts=counts[number],
            weights=weights[number].astype(float),
            tolerance=1e-10,
        )
        # Within 0.15 standard errors, which are about 0.03 here.
        np.testing.assert_allclose(found[number], best.estimate, atol=5e-3)


def test_inside_the_simplex_the_bootstrap_is_the_asymptotic_interval():
    source = source_of("bias_corrected", 400)
    target = sample_of(source, [0.3, 0.3, 0.4], 600).probabilities
    found = estimate_prevalence(target, source)
    again = estimate_prevalence(target, source, interval="bootstrap", replicates=500)
    np.testing.assert_allclose(again.high - again.low, found.high - found.low, rtol=0.15)
    same = estimate_prevalence(target, source, interval="bootstrap", replicates=500)
    np.testing.assert_array_equal(again.low, same.low)


def test_percentiles_are_of_each_class():
    low, high = percentiles(np.stack([np.arange(101.0), np.zeros(101)], 1), 0.5)
    np.testing.assert_array_equal([low, high], [[25, 0], [75, 0]])


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["none", "temperature", "bias_corrected"])
def test_intervals_hold_what_they_promise(calibration):
    # 300 draws: 0.95 shows as 0.925 to 0.975 in 95 of 100 numbers; 4 standard errors are 0.05.
    covered, total = np.zeros(3), 300
    for seed in range(total):
        source = source_of(calibration, 300, seed=2 * seed + 10)
        truth = np.array([0.03, 0.27, 0.7])
        target = sample_of(source, truth, 300, seed=2 * seed + 11).probabilities
        found = estimate_prevalence(target, source)
        covered += (found.low <= truth) & (truth <= found.high)
    assert (np.abs(covered / total - 0.95) <= 0.05).all(), covered / total
