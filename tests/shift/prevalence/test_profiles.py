"""A likelihood along a share: its slope, and its score's moments, by hand and by quadrature."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import softmax
from scipy.stats import norm

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.likelihood import maximize_likelihood
from flaxtransfer.shift.prevalence_intervals import profile_likelihood
from flaxtransfer.shift.uncertainty import Sample

UP = np.array([[1.0], [-1.0]])
"""The first share grows as the second shrinks."""


def sample_of(target, validation, labeled=(0.0, 0.0), weights=None):
    labels = np.arange(len(validation)) % 2
    source = Calibration("none", np.ones(2), np.zeros(2), validation, labels)
    return Sample(target, source, np.array(labeled), np.zeros(2), weights)


def along(sample):
    maximum = maximize_likelihood(
        sample.probabilities, sample.source.prior, counts=sample.counts, weights=sample.weights
    )
    return maximum, profile_likelihood(sample, maximum, UP)


def gaussian(share, count, seed):
    """Posteriors, at even priors, of unit normals at -1 and 1."""
    random = np.random.default_rng(seed)
    inputs = np.where(np.arange(count) < share * count, -1, 1) + random.normal(size=count)
    return softmax(np.stack([-inputs, inputs], 1), axis=1)


@pytest.mark.parametrize("share", [0.003, 0.2, 0.9])
@pytest.mark.parametrize("seen", [2, 50])
def test_certain_rows_have_the_moments_of_a_binomial_share(share, seen):
    """Also far from where the estimate is, and for labels instead of rows."""
    rows = np.repeat(np.eye(2), (seen, 100 - seen), axis=0)
    validation = np.tile(np.eye(2), (50, 1))
    for sample in (
        sample_of(rows, validation),
        sample_of(rows[seen - 1 : seen + 1], validation, (seen - 1, 99 - seen)),
    ):
        maximum, found = along(sample)
        point = found.at(share - maximum.estimate[:1])
        assert point.score[0] == pytest.approx(seen / share - (100 - seen) / (1 - share))
        if not sample.counts.any():
            assert point.information[0] == pytest.approx(100 / share + 100 / (1 - share))
            assert point.third[0] == pytest.approx(100 / share**2 - 100 / (1 - share) ** 2)
            assert point.variance[0] == pytest.approx(share * (1 - share) / 100)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_moments_of_a_score_are_those_of_the_share_it_is_taken_at(share):
    """By quadrature; the target, of another share, and the validation are sampled."""

    def moment(power):
        def density(x):
            return share * norm.pdf(x, -1) + (1 - share) * norm.pdf(x, 1)

        def integrand(x):
            return ((norm.pdf(x, -1) - norm.pdf(x, 1)) / density(x)) ** power * density(x)

        return quad(integrand, -9, 9, limit=200)[0]

    sample = sample_of(gaussian(0.1, 20_000, 0), gaussian(0.5, 20_000, 1))
    maximum, found = along(sample)
    point = found.at(share - maximum.estimate[:1])
    assert point.information[0] == pytest.approx(20_000 * moment(2), rel=0.04)
    assert point.third[0] == pytest.approx(20_000 * moment(3), rel=0.08)


def test_the_score_is_the_slope_of_the_log_likelihood():
    weights = np.repeat([1.0, 0.0], (300, 100))
    sample = sample_of(gaussian(0.3, 400, 2), gaussian(0.5, 200, 3), (2.0, 5.0), weights)
    _, found = along(sample)
    step, by = np.array([-0.05]), 1e-5
    slope = (found.at(step - by).decrease - found.at(step + by).decrease) / (2 * by)
    np.testing.assert_allclose(found.at(step).score, slope, rtol=1e-6)
    assert found.at(np.zeros(1)).decrease == 0


def test_a_share_at_which_a_row_could_not_be_is_impossible():
    sample = sample_of(np.repeat(np.eye(2), (3, 7), axis=0), np.tile(np.eye(2), (5, 1)))
    maximum, found = along(sample)
    assert not found.at(-maximum.estimate[:1]).possible[0]
    assert found.at(-0.99 * maximum.estimate[:1]).possible[0]
