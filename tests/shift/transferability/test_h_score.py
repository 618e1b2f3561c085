"""The H-score by its definition, saturated and regularized."""

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from flaxtransfer.analysis.transferability import h_score


def draw(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def class_means(features, labels):
    return np.stack([features[labels == label].mean(0) for label in labels])


@pytest.mark.parametrize(("rows", "columns"), [(40, 6), (20, 50)])
def test_it_is_its_definition(rows, columns):
    labels = np.arange(rows) % 3
    features = draw(rows, columns) * np.linspace(0.3, 2, columns) + np.eye(3)[labels] @ draw(
        3, columns, seed=1
    )
    between = np.cov(class_means(features, labels).T, bias=True)
    inverse = np.linalg.pinv(np.cov(features.T, bias=True), rcond=1e-12)
    plain = h_score(features, labels, regularized=False, permutations=19)
    assert plain.value == pytest.approx(np.trace(inverse @ between), rel=1e-8)
    shrunk, intensity = ledoit_wolf(features)
    expected = (1 - intensity) * np.trace(np.linalg.inv(shrunk) @ between)
    found = h_score(features, labels, permutations=19)
    assert 0 < found.value < plain.value
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.notes == (f"shrinkage {intensity:.3g}",)


def test_without_shrinkage_noise_is_as_good_as_signal():
    """C - 1 = 4 for both at N = 200, D = 512; shrunk, some 0.1 against almost 4."""
    labels = np.arange(200) % 5
    noise = draw(200, 512)
    signal = noise + 3 * np.eye(5)[labels] @ draw(5, 512, seed=1)
    for features in (noise, signal):
        plain = h_score(features, labels, regularized=False, permutations=19)
        assert plain.value == pytest.approx(4)
    assert h_score(noise, labels, regularized=False, permutations=19).p == 1
    assert h_score(noise, labels, permutations=19).value < 0.3
    assert h_score(signal, labels, permutations=19).value > 3


@pytest.mark.parametrize(("rows", "saturated"), [(12, True), (13, True), (14, False)])
def test_one_example_more_than_features_is_saturated_still(rows, saturated):
    # Centered, 13 examples of 12 features span all that can be said of 13 examples.
    found = h_score(draw(rows, 12), np.arange(rows) % 3, regularized=False, permutations=19)
    assert (found.value == pytest.approx(2)) == (found.null_mean == pytest.approx(2)) == saturated
    assert found.notes == (f"{rows} examples of 12 features: C - 1 for any labels",) * saturated


def test_one_feature_has_its_correlation_ratio():
    features = np.array([[1.0], [2], [3], [7], [8], [9]])
    # Between classes 9, within 2 / 3.
    found = h_score(features, [0, 0, 0, 1, 1, 1], regularized=False)
    assert found.value == pytest.approx(9 / (9 + 2 / 3), rel=1e-12)
    # One feature is a sphere: there is nothing to shrink to.
    assert h_score(features, [0, 0, 0, 1, 1, 1]).value == pytest.approx(found.value, rel=1e-12)
