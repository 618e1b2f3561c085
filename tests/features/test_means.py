"""Heads from class means, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid

from flaxtransfer.features import linear_discriminant, nearest_class_mean


def sample(count: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, count - classes)])
    features = random.normal(size=(classes, width))[labels] + random.normal(size=(count, width))
    return features @ random.normal(size=(width, width)) / np.sqrt(width) + 2, labels


def within(features, labels):
    return features - np.stack([features[labels == c].mean(axis=0) for c in labels])


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_nearest_mean_is_the_nearest_centroid(classes, normalize):
    features, labels = sample(60, 10, classes)
    new, _ = sample(200, 10, classes, seed=1)
    head = nearest_class_mean(features, labels, normalize=normalize)
    if normalize:
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        means = np.stack([unit[labels == c].mean(axis=0) for c in range(classes)])
        expected = (new @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
    else:
        expected = NearestCentroid().fit(features, labels).predict(new)
    np.testing.assert_array_equal(head.predict(new), expected)


def test_scores_are_half_the_squared_distances():
    features, labels = sample(30, 4, 3)
    means = np.stack([features[labels == c].mean(axis=0) for c in range(3)])
    distances = np.square(features[:, None] - means).sum(axis=2)
    scores = nearest_class_mean(features, labels).scores(features)
    np.testing.assert_allclose(
        scores - scores[:, :1], (distances[:, :1] - distances) / 2, atol=1e-9
    )


@pytest.mark.parametrize(
    ("count", "width", "shrinkage"),
    [(80, 6, 0.0), (80, 6, 0.3), (80, 6, 1.0), (30, 100, 0.05), (30, 100, 1.0), (40, 40, 0.2)],
)
def test_the_discriminant_is_scikit_learns(count, width, shrinkage):
    features, labels = sample(count, width, 4)
    head = linear_discriminant(features, labels, shrinkage=shrinkage)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features, labels)
    np.testing.assert_allclose(head.kernel, peer.coef_.T, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(head.bias, peer.intercept_, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("count", "width"), [(80, 6), (30, 100)])
def test_by_default_the_shrinkage_is_ledoit_and_wolfs(count, width):
    features, labels = sample(count, width, 3)
    expected = ledoit_wolf_shrinkage(within(features, labels), assume_centered=True)
    head = linear_discriminant(features, labels)
    np.testing.assert_allclose(head.shrinkage, expected, rtol=1e-9)
    explicit = linear_discriminant(features, labels, shrinkage=expected)
    np.testing.assert_allclose(head.kernel, explicit.kernel, rtol=1e-6)


@given(st.integers(0, 1000), st.integers(2, 30), st.floats(0.01, 1))
def test_both_ways_to_invert_agree(seed, width, shrinkage):
    """Columns of zeros take the one by examples and change nothing but the trace's share."""
    features, labels = sample(20, width, 3, seed)
    more = np.hstack([features, np.zeros((20, 40))])
    # The multiple of the identity is the mean variance, which the zeros dilute.
    ours = linear_discriminant(features, labels, shrinkage=shrinkage)
    diluted = shrinkage * (width + 40) / (width + shrinkage * 40)
    other = linear_discriminant(more, labels, shrinkage=min(diluted, 1.0))
    scale = (1 - shrinkage) / (1 - diluted) if shrinkage < 0.999 else None
    if scale is not None:
        np.testing.assert_allclose(
            other.kernel[:width], ours.kernel * scale, rtol=1e-5, atol=1e-6 * scale
        )
    np.testing.assert_allclose(other.kernel[width:], 0, atol=1e-9)


@pytest.mark.parametrize("fit", [nearest_class_mean, linear_discriminant])
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"labels": np.zeros(9, int)}, ValueError, "at least 2 classes, got only class 0"),
        ({"labels": np.arange(9) - 1}, ValueError, r"labels must be in 0 \.\. 7 .*, got -1 \.\. 7"),
        ({"labels": np.arange(9.0)}, TypeError, "labels must be integers, got float64"),
        ({"classes": 4}, ValueError, r"labels must be in 0 \.\. 3 \(4 classes\), got 0 \.\. 8"),
        ({"classes": 11}, ValueError, r"must have an example, classes \[9, 10\] have none"),
        ({"labels": np.arange(8)}, ValueError, r"got \(9, 4\) and \(8,\)"),
        (
            {"features": np.full((9, 4), np.nan)},
            ValueError,
            "features must be finite; 9 of 9 examples",
        ),
    ],
)
def test_what_cannot_be_fitted_is_said(fit, changes, error, text):
    settings = {"features": np.eye(9)[:, :4], "labels": np.arange(9)} | changes
    with pytest.raises(error, match=text):
        fit(**settings)


@pytest.mark.parametrize(("count", "width"), [(20, 40), (42, 41)])
def test_a_singular_covariance_wants_shrinkage(count, width):
    features, labels = sample(count, width, 2)
    with pytest.raises(ValueError, match=r"singular .*shrinkage must be > 0, .*got 0"):
        linear_discriminant(features, labels, shrinkage=0)
    features, labels = sample(50, 5, 2)
    with pytest.raises(ValueError, match="singular"):
        linear_discriminant(np.hstack([features, features]), labels, shrinkage=0.0)


def test_no_variance_within_classes_is_said():
    with pytest.raises(ValueError, match="nearest_class_mean needs none"):
        linear_discriminant([[0.1, 0.3]] * 3 + [[0.7, 0.9]] * 3, [0, 0, 0, 1, 1, 1])


def test_shrinkage_is_a_share():
    with pytest.raises(ValueError, match=r"shrinkage must be 0 to 1, got 1\.5"):
        linear_discriminant(*sample(20, 3, 2), shrinkage=1.5)


def test_a_zero_has_no_direction():
    head = nearest_class_mean([[1.0, 0.0], [0.0, 2.0]], [0, 1], normalize=True)
    with pytest.raises(ValueError, match=r"examples \[1\] have length 0"):
        head.predict([[1.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match=r"class means \[0\] have length 0"):
        nearest_class_mean([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [0, 0, 1], normalize=True)


def test_new_features_have_the_same_width():
    with pytest.raises(ValueError, match=r"must have shape \[examples, 3\]"):
        nearest_class_mean(*sample(20, 3, 2)).predict(np.ones((2, 5)))
