"""What a baseline says of examples that are held out, against scikit-learn fitted without them."""

import jax
import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import NearestCentroid

from flaxtransfer.features import class_means as module
from flaxtransfer.features import cross_validate, stratified_folds
from flaxtransfer.features.class_means import (
    LOGISTIC_STRENGTHS,
    Baseline,
    baseline,
)
from tests.support.peers import logistic_regression


def sample(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return random.normal(size=(count, width)) + 1.5 * np.eye(width)[labels], labels


def test_each_head_is_scikit_learns_on_what_was_held_out():
    features, labels = sample(45, 6)
    # In float64, for an example next to a border may be of either side in float32.
    with jax.enable_x64(True):
        found = baseline(features, labels, logistic=True)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    folds = stratified_folds(labels, 5)
    splits = [(np.flatnonzero(folds != n), np.flatnonzero(folds == n)) for n in range(5)]

    def accuracy(peer, splits) -> float:
        return float((cross_val_predict(peer, scaled, labels, cv=splits) == labels).mean())

    assert found.nearest_class_mean == accuracy(NearestCentroid(), splits)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    # scikit-learn estimates its shrinkage class by class, which may turn an example or two.
    assert found.discriminant == pytest.approx(accuracy(peer, splits), abs=2.5 / 45)
    proba = np.empty((len(LOGISTIC_STRENGTHS), 45, 3))
    for probs, strength in zip(proba, LOGISTIC_STRENGTHS, strict=True):
        for rest, out in splits:
            fit = logistic_regression(scaled[rest], labels[rest], 1 / strength)
            probs[out] = fit.predict_proba(scaled[out])
    least = min(proba, key=lambda probs: log_loss(labels, probs))
    assert found.logistic == pytest.approx((least.argmax(axis=1) == labels).mean(), abs=1e-9)
    targets = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    by_strength = [
        cross_val_predict(Ridge(10.0**power), scaled, targets, cv=splits)
        for power in np.linspace(-3, 6, 19)
    ]
    best = min(by_strength, key=lambda scores: np.square(scores - targets).mean())
    once = cross_validate(scaled, labels, repeats=1)
    assert once.accuracy == (best.argmax(axis=1) == labels).mean()
    # Few examples: the folds are drawn a second time.
    twice = cross_validate(scaled, labels, repeats=2)
    assert found.ridge == twice.accuracy
    assert found.best == max(
        found.ridge, found.nearest_class_mean, found.discriminant, found.logistic
    )


def test_what_would_take_long_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "_DISCRIMINANT_WORK", 0)
    found = baseline(*sample(30, 4))
    assert found.discriminant is None
    assert found.logistic is None
    assert "logistic" not in str(found)
    assert "linear" not in str(found)


def test_it_reads_in_one_line():
    assert str(Baseline(50, 0.1, 0.9, 0.94, None, 0.925, 0.26)) == (
        "heads on the frozen features of 50 training images, each held out once: ridge 94.0 %, "
        "logistic regression 92.5 %, nearest class mean 90.0 % (largest class 10.0 %); 0.3 s"
    )


def test_classes_with_one_example_or_none_are_said():
    features, labels = sample(31, 6)
    labels[labels == 2] = 3
    labels[0] = 2
    found = baseline(features * 100, labels, classes=6, logistic=True)
    assert found.notes == (
        "2 of 6 classes have no example.",
        "1 classes have one example, which counts as wrong.",
    )
    for accuracy in (found.ridge, found.nearest_class_mean, found.discriminant, found.logistic):
        assert accuracy <= 30 / 31


def test_more_classes_than_features_and_no_variance_within_them():
    labels = np.arange(24) % 12
    found = baseline(np.stack([labels, labels**2], axis=1), labels)
    assert found.nearest_class_mean == 1
    assert found.discriminant is None


@pytest.mark.parametrize(
    ("features", "labels", "text"),
    [
        (np.ones((5, 2)), np.zeros(5, int), "at least 2 classes, got only class 0"),
        (np.eye(4), np.arange(4), "every class has one example"),
        (np.full((5, 2), np.nan), np.arange(5), "must be finite"),
        (np.ones((5, 2)), np.arange(4), r"got \(5, 2\) and \(4,\)"),
    ],
)
def test_what_has_no_baseline(features, labels, text):
    with pytest.raises(ValueError, match=text):
        baseline(features, labels)
