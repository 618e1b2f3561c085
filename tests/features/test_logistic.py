"""Logistic regression to the optimum, against scikit-learn in float64 and by its own laws."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from flaxtransfer.features import logistic, logistic_path
from tests.support.peers import logistic_regression

STRENGTHS = (0.01, 1.0, 100.0)


@pytest.fixture
def float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def sample(count: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of unequal size, off center; classes of unequal size."""
    random = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.arange(classes)] * 2 + [random.integers(0, classes, count - 2 * classes)]
    )
    labels[-count // 4 :] = 0
    centers = random.normal(size=(classes, width))
    mixed = centers[labels] + 2 * random.normal(size=(count, width))
    return mixed @ random.normal(size=(width, width)) / np.sqrt(width) + 3, labels


def peer(features, labels, strength) -> LogisticRegression:
    # With two classes scikit-learn keeps one column, whose penalty counts twice.
    return logistic_regression(features, labels, (1 if labels.max() > 1 else 2) / strength)


def peer_log_probs(fit: LogisticRegression, features) -> np.ndarray:
    # Its own are the logarithm of what may be 0.
    scores = fit.decision_function(features)
    scores = np.stack([0 * scores, scores], axis=1) if scores.ndim == 1 else scores
    return scipy.special.log_softmax(scores, axis=1)


@pytest.mark.parametrize(("count", "width"), [(80, 6), (40, 100)])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_coefficients_are_scikit_learns(float64, count, width, classes):
    features, labels = sample(count, width, classes)
    path = logistic_path(features, labels, STRENGTHS)
    assert path.converged.all()
    new, _ = sample(50, width, classes, seed=1)
    for n, strength in enumerate(STRENGTHS):
        fit = peer(features, labels, strength)
        if classes > 2:
            np.testing.assert_allclose(path.kernels[n], fit.coef_.T, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(
                path.biases[n], fit.intercept_ - fit.intercept_.mean(), rtol=1e-4, atol=1e-5
            )
        np.testing.assert_allclose(
            path.log_probs(new)[n], peer_log_probs(fit, new), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("count", "width"), [(80, 6), (40, 100)])
def test_folds_by_weight_are_fits_on_the_rest(float64, count, width):
    features, labels = sample(count, width, 3)
    weights = np.ones((4, count))
    for n in range(4):
        weights[n, 6 + n :: 4] = 0
    path = logistic_path(features, labels, 2.0, weights=weights)
    for n, chosen in enumerate(weights > 0):
        fit = peer(features[chosen], labels[chosen], 2.0)
        np.testing.assert_allclose(path.kernels[n], fit.coef_.T, rtol=1e-4, atol=1e-6)
        held_out = path.logits[n] - path.logits[n].mean(axis=1, keepdims=True)
        expected = fit.decision_function(features)
        expected -= expected.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(held_out, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_repetitions(float64):
    features, labels = sample(50, 8, 3)
    times = np.random.default_rng(0).integers(1, 4, 50)
    weighted = logistic_path(features, labels, weights=times)
    repeated = logistic_path(np.repeat(features, times, axis=0), np.repeat(labels, times))
    np.testing.assert_allclose(weighted.kernels, repeated.kernels, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(weighted.losses, repeated.losses, rtol=1e-10)


@pytest.mark.parametrize("strength", [1e-4, 0.1, 1e4])
@pytest.mark.parametrize(("count", "width"), [(300, 20), (60, 300)])
def test_float32_reaches_the_loss_of_float64(count, width, strength):
    """Weak strengths included, where all examples have a probability of nearly 1."""
    features, labels = sample(count, width, 4)
    path = logistic_path(features, labels, strength)
    assert path.kernels.dtype == np.float32
    fit = peer(features, labels, strength)
    objective = -peer_log_probs(fit, features)[np.arange(count), labels].sum()
    objective += strength / 2 * np.square(fit.coef_).sum()
    np.testing.assert_allclose(path.losses, objective / count, rtol=1e-4)
    # At the margin of separable classes, logits are in the hundreds, and their rounding shows.
    assert path.gaps.max() < (1e-7 if strength > 0.01 else 1e-5)


def test_the_loss_and_its_gradient_are_what_they_are_called(float64):
    """Against automatic differentiation of the definition."""
    features, labels = sample(60, 5, 3)
    path = logistic_path(features, labels, 3.0, max_iterations=3)
    assert not path.converged.any()
    assert path.iterations.tolist() == [3]

    def objective(kernel, bias):
        log_probs = jax.nn.log_softmax(features @ kernel + bias)
        loss = -log_probs[np.arange(60), labels].sum() + 1.5 * (kernel**2).sum()
        return loss / 60

    loss, gradient = jax.value_and_grad(objective, (0, 1))(path.kernels[0], path.biases[0])
    np.testing.assert_allclose(path.losses, [loss], rtol=1e-10)
    # Ours is by the bias of centered features: the norm is that of centered features, too.
    middle = features.mean(axis=0)
    by_kernel = gradient[0] - middle[:, None] * gradient[1]
    norm = np.sqrt(np.square(by_kernel).sum() + np.square(gradient[1]).sum())
    np.testing.assert_allclose(path.gradient_norms, [norm], rtol=1e-8)


@effort(max_examples=15)
@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(-50, 50))
def test_a_rotation_and_a_shift_of_features_change_no_prediction(seed, power, shift):
    features, labels = sample(40, 6, 3, seed)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    plain = logistic_path(features, labels, 10**power)
    turned = logistic_path(features @ turn + shift, labels, 10**power)
    np.testing.assert_allclose(plain.losses, turned.losses, rtol=1e-4)
    np.testing.assert_allclose(
        jax.nn.softmax(plain.logits), jax.nn.softmax(turned.logits), atol=0.01
    )


def test_constant_and_repeated_features_are_harmless():
    """A constant column gets no weight; a repeated one is that column, scaled by sqrt(2)."""
    features, labels = sample(50, 8, 3)
    more = np.hstack([features, features, np.full((50, 2), 7.0)])
    path = logistic_path(more, labels, STRENGTHS)
    np.testing.assert_allclose(path.kernels[:, 16:], 0, atol=1e-6)
    scaled = logistic_path(features * np.sqrt(2), labels, STRENGTHS)
    np.testing.assert_allclose(path.losses, scaled.losses, rtol=1e-5)


def test_features_that_say_nothing_give_the_frequencies():
    labels = np.array([0, 0, 0, 1, 2, 2])
    path = logistic_path(np.ones((6, 4)), labels)
    np.testing.assert_allclose(
        np.exp(path.log_probs(np.ones((1, 4))))[0, 0], [0.5, 1 / 6, 1 / 3], rtol=1e-3
    )


def test_batches_of_fits_are_the_same_fits(monkeypatch):
    features, labels = sample(40, 5, 3)
    strengths = np.logspace(-2, 2, 7)
    whole = logistic_path(features, labels, strengths)
    monkeypatch.setattr(logistic, "_BATCH_LOGITS", 0)
    monkeypatch.setattr(logistic, "_LEAST_BATCH", 3)
    parts = logistic_path(features, labels, strengths)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-6)
    assert parts.logits.shape == (7, 40, 3)


@pytest.mark.parametrize(("count", "width"), [(60, 8), (30, 80)])
@pytest.mark.parametrize("strength", [0.01, 1.0, 1000.0])
def test_one_fit_alone_is_the_same_fit(float64, count, width, strength):
    """By the inverse of a matrix, and on shared principal axes."""
    features, labels = sample(count, width, 3)
    weights = np.random.default_rng(0).integers(0, 3, count) + (np.arange(count) < 6)
    alone = logistic_path(features, labels, strength, weights=weights)
    both = logistic_path(features, labels, [strength, 1.0], weights=weights)
    assert alone.converged.all()
    np.testing.assert_allclose(alone.losses, both.losses[:1], rtol=1e-12)
    np.testing.assert_allclose(alone.kernels[0], both.kernels[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(alone.biases[0], both.biases[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"labels": np.zeros(9, int)}, ValueError, "at least 2 classes, got only class 0"),
        ({"labels": np.arange(9) - 1}, ValueError, r"labels must be in 0 \.\. 7 .*, got -1 \.\. 7"),
        ({"labels": np.arange(9.0)}, TypeError, "labels must be integers, got float64"),
        ({"classes": 4}, ValueError, r"labels must be in 0 \.\. 3 \(4 classes\), got 0 \.\. 8"),
        ({"classes": 11}, ValueError, r"must have an example.*classes \[9, 10\] have no"),
        ({"labels": np.arange(8)}, ValueError, r"got \(9, 4\) and \(8,\)"),
        (
            {"features": np.full((9, 4), np.inf)},
            ValueError,
            "features must be finite; 9 of 9 examples",
        ),
        ({"strengths": 0.0}, ValueError, "strengths must be > 0"),
        (
            {"strengths": [1, 2, 3], "weights": np.ones((2, 9))},
            ValueError,
            r"one per row of weights \(2\), got 3",
        ),
        ({"weights": np.ones(8)}, ValueError, r"must have shape \[fits, 9\]"),
        ({"weights": -np.ones(9)}, ValueError, "must be finite and >= 0"),
        ({"weights": np.arange(9)}, ValueError, r"classes \[0\] have no example"),
    ],
)
def test_what_cannot_be_fitted_is_said(changes, error, text):
    settings = {"features": np.eye(9)[:, :4], "labels": np.arange(9)} | changes
    with pytest.raises(error, match=text):
        logistic_path(**settings)


def test_new_features_have_the_same_width():
    with pytest.raises(ValueError, match=r"must have shape \[examples, 4\]"):
        logistic_path(np.eye(4), np.arange(4)).predict(np.ones((2, 3)))
