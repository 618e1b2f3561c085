"""Distances and scores beside POT and scikit-learn, on many samples."""

import numpy as np
import ot
import ot.gmm
import pytest
from sklearn.covariance import LedoitWolf

from flaxtransfer.analysis.distances import (
    bures_wasserstein,
    class_distance,
    frechet_distance,
    random_directions,
    wasserstein_on_lines,
)
from flaxtransfer.analysis.transferability import h_score

pytestmark = pytest.mark.parity_shift


def pair(seed, n, m, width):
    random = np.random.default_rng(seed)
    mix = random.normal(size=(width, width))
    return random.normal(size=(n, width)) @ mix, random.standard_t(4, size=(m, width)) + 0.3


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", [(50, 40, 8), (300, 200, 64)])
def test_bures_wasserstein(seed, shape):
    first, second = pair(seed, *shape)
    moments = (first.mean(0), second.mean(0), np.cov(first.T), np.cov(second.T))
    expected = float(ot.gaussian.bures_wasserstein_distance(*moments))
    found = bures_wasserstein(moments[0], moments[2], moments[1], moments[3])
    assert found == pytest.approx(expected, abs=1e-6)
    distance = frechet_distance(first, second, permutations=19)
    assert distance.value == pytest.approx(expected**2, rel=1e-7)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", [(50, 50, 3), (31, 47, 10), (200, 64, 128)])
def test_sliced_wasserstein(seed, shape):
    first, second = pair(seed, *shape)
    lines = random_directions(shape[2], 30, seed)
    expected = float(ot.sliced_wasserstein_distance(first, second, projections=lines))
    assert wasserstein_on_lines(first, second, lines) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_h_score_of_a_covariance_of_scikit_learn(seed):
    features, other = pair(seed, 40, 20, 100)
    features = np.concatenate([features, other])
    labels = np.arange(60) % 4
    means = np.stack([features[labels == label].mean(0) for label in labels])
    fitted = LedoitWolf().fit(features)
    between = np.cov(means.T, bias=True)
    expected = (1 - fitted.shrinkage_) * np.trace(np.linalg.inv(fitted.covariance_) @ between)
    assert h_score(features, labels, permutations=19).value == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_class_distance(seed):
    first, second = pair(seed, 60, 45, 6)
    labels, others = np.arange(60) % 4, np.arange(45) % 3
    mixtures = [
        (
            np.stack([x[y == k].mean(0) for k in np.unique(y)]),
            np.stack([np.cov(x[y == k].T) for k in np.unique(y)]),
            np.array([(y == k).mean() for k in np.unique(y)]),
        )
        for x, y in ((first, labels), (second, others))
    ]
    terms = [term for both in zip(*mixtures, strict=True) for term in both]
    found = class_distance(first, labels, second, others, permutations=19)
    assert found.value == pytest.approx(float(ot.gmm.gmm_ot_loss(*terms)), rel=1e-7)
