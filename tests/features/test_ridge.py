"""Ridge in closed form, against scikit-learn and against leaving examples out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeClassifierCV

from flaxtransfer.features import ridge, ridge_path

STRENGTHS = (0.01, 1.0, 30.0, 1e4)


def sample(count: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), random.integers(0, classes, count - classes)])
    centers = random.normal(size=(classes, width))
    return centers[labels] + 2 * random.normal(size=(count, width)) + 3, labels


@pytest.mark.parametrize(("count", "width"), [(60, 8), (60, 59), (60, 60), (30, 100)])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_every_strength_is_scikit_learns(count, width, classes):
    features, labels = sample(count, width, classes)
    path = ridge_path(features, labels, STRENGTHS)
    peer = RidgeClassifierCV(STRENGTHS, store_cv_results=True).fit(features, labels)
    errors = peer.cv_results_.reshape(count, -1, len(STRENGTHS)).mean(axis=(0, 1))
    np.testing.assert_allclose(path.errors, errors, rtol=1e-8)
    assert path.strength == peer.alpha_
    new, _ = sample(200, width, classes, seed=1)
    np.testing.assert_array_equal(path.predict(new), peer.predict(new))
    if classes > 2:  # With two classes scikit-learn keeps one column.
        np.testing.assert_allclose(path.kernel, peer.coef_.T, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(path.bias, peer.intercept_, rtol=1e-6, atol=1e-9)


@given(st.integers(4, 14), st.integers(1, 20), st.integers(2, 4), st.floats(0.1, 100))
def test_leaving_out_is_fitting_without(count, width, classes, strength):
    features, labels = sample(max(count, classes + 2), width, classes)
    path = ridge_path(features, labels, [strength])
    targets = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    wrong, correct, left_out = [], [], []
    for n in range(len(labels)):
        others = np.arange(len(labels)) != n
        fit = Ridge(strength).fit(features[others], targets[others])
        scores = fit.predict(features[n : n + 1])[0]
        left_out.append(scores)
        wrong.append(np.square(scores - targets[n]).mean())
        correct.append(scores.argmax() == labels[n])
    np.testing.assert_allclose(path.errors, [np.mean(wrong)], rtol=1e-6)
    np.testing.assert_allclose(path.accuracies, [np.mean(correct)])
    np.testing.assert_allclose(path.left_out, left_out, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("count", "width"), [(50, 10), (20, 40)])
def test_constant_and_repeated_features_are_harmless(count, width):
    """A constant column changes nothing; a repeated one is that column, scaled by sqrt(2)."""
    features, labels = sample(count, width, 3)
    plain = ridge_path(features, labels, STRENGTHS)
    constant = ridge_path(np.hstack([features, np.full((count, 3), 7.0)]), labels, STRENGTHS)
    np.testing.assert_allclose(constant.errors, plain.errors, rtol=1e-9)
    np.testing.assert_allclose(constant.kernel[width:], 0, atol=1e-12)
    repeated = ridge_path(np.hstack([features, features]), labels, STRENGTHS)
    scaled = ridge_path(features * np.sqrt(2), labels, STRENGTHS)
    np.testing.assert_allclose(repeated.errors, scaled.errors, rtol=1e-8)


def test_strengths_in_parts_are_the_same(monkeypatch):
    features, labels = sample(30, 6, 3)
    whole = ridge_path(features, labels, STRENGTHS)
    monkeypatch.setattr(ridge, "_BATCH_SCORES", 200)
    parts = ridge_path(features, labels, STRENGTHS)
    np.testing.assert_allclose(parts.errors, whole.errors, rtol=1e-12)
    np.testing.assert_array_equal(parts.accuracies, whole.accuracies)


def test_a_class_without_examples_is_never_predicted():
    features, labels = sample(40, 5, 3)
    path = ridge_path(features, labels, classes=5)
    assert path.kernel.shape == (5, 5)
    assert set(path.predict(features)) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": np.zeros(9, int)}, "at least 2 classes, got only class 0"),
        ({"labels": np.arange(9) - 1}, r"labels must be in 0 \.\. 7 .*, got -1 \.\. 7"),
        ({"classes": 4}, r"labels must be in 0 \.\. 3 \(4 classes\), got 0 \.\. 8"),
        ({"labels": np.arange(8)}, r"got \(9, 4\) and \(8,\)"),
        ({"features": np.full((9, 4), np.nan)}, "features must be finite; 9 of 9 examples"),
        ({"strengths": [1.0, 0.0]}, "strengths must be > 0"),
        (
            {"features": np.ones((2, 4)), "labels": np.arange(2)},
            "must have at least 3 examples, got 2",
        ),
    ],
)
def test_what_cannot_be_fitted_is_said(changes, text):
    settings = {"features": np.eye(9)[:, :4], "labels": np.arange(9)} | changes
    with pytest.raises(ValueError, match=text):
        ridge_path(**settings)


def test_labels_are_integers_and_new_features_of_the_same_width():
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        ridge_path(np.eye(4), np.arange(4.0))
    with pytest.raises(ValueError, match=r"must have shape \[examples, 4\]"):
        ridge_path(np.eye(4), np.arange(4)).predict(np.ones((2, 3)))
