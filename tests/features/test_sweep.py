"""Strengths by cross-validation, against scikit-learn's folds done one by one."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss

from flaxtransfer.features import ridge_path, standardization, stratified_folds, sweep_head
from flaxtransfer.features.inputs import class_weights
from tests.support.peers import logistic_regression

STRENGTHS = (0.1, 1.0, 10.0, 1000.0)


def sample(count: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes)] * 3 + [random.integers(0, classes, count)])
    features = random.normal(size=(classes, width))[labels] / 2
    features += random.normal(size=features.shape)
    return features * random.gamma(2.0, 2.0, width) + 5, labels


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.data())
def test_folds_are_of_equal_size_in_all_and_by_class(counts, data):
    labels = np.repeat(np.arange(len(counts)), counts)
    folds = data.draw(st.integers(2, min(counts)))
    dealt = stratified_folds(np.random.default_rng(0).permutation(labels), folds)
    labels = np.random.default_rng(0).permutation(labels)
    sizes = np.bincount(dealt, minlength=folds)
    assert np.ptp(sizes) <= 1
    for c in range(len(counts)):
        assert np.ptp(np.bincount(dealt[labels == c], minlength=folds)) <= 1


def test_folds_depend_on_the_seed_alone():
    labels = np.arange(40) % 4
    np.testing.assert_array_equal(stratified_folds(labels, 5, 3), stratified_folds(labels, 5, 3))
    assert (stratified_folds(labels, 5, 3) != stratified_folds(labels, 5, 4)).any()


@pytest.mark.parametrize("width", [5, 80])
def test_every_cell_is_a_fit_of_scikit_learn(width):
    """In float64: where in the last millionth of its loss a fit in float32 ends is chance."""
    features, labels = sample(50, width, 3)
    with jax.enable_x64(True):
        found = sweep_head(features, labels, strengths=STRENGTHS, folds=3, seeds=(0, 7))
    assert found.accuracies.shape == found.losses.shape == (4, 6)
    scaled = standardization(features)(features)
    for n, strength in enumerate(STRENGTHS):
        for split, (seed, fold) in enumerate((s, f) for s in (0, 7) for f in range(3)):
            out = stratified_folds(labels, 3, seed) == fold
            weights = class_weights(labels, ~out)[~out]
            fit = logistic_regression(scaled[~out], labels[~out], 1 / strength, weights)
            loss = log_loss(labels[out], fit.predict_proba(scaled[out]))
            np.testing.assert_allclose(found.losses[n, split], loss, rtol=1e-5)
            np.testing.assert_allclose(
                found.accuracies[n, split], fit.score(scaled[out], labels[out]), atol=1e-12
            )


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_the_head_is_a_refit_on_everything_for_features_as_given(kind, standardize):
    features, labels = sample(60, 8, 3)
    found = sweep_head(features, labels, kind, strengths=STRENGTHS, standardize=standardize)
    inputs = standardization(features)(features) if standardize else features
    if kind == "logistic":
        fit = logistic_regression(inputs, labels, 1 / found.strength)
        expected = fit.decision_function(inputs)
    else:
        expected = ridge_path(inputs, labels, [found.strength]).scores(inputs)
    scores = found.scores(features)
    np.testing.assert_allclose(
        scores - scores.mean(axis=1, keepdims=True),
        expected - expected.mean(axis=1, keepdims=True),
        atol=0.01,
    )
    np.testing.assert_array_equal(found.predict(features), scores.argmax(axis=1))


def test_ridge_is_scikit_learns_on_the_same_folds():
    features, labels = sample(60, 8, 3)
    found = sweep_head(features, labels, "ridge", strengths=(100.0, 0.1, 10.0), standardize=False)
    folds, targets = stratified_folds(labels, 5), np.where(labels[:, None] == np.arange(3), 1.0, -1)
    for k, strength in enumerate((0.1, 10.0, 100.0)):
        for n in range(5):
            out = folds == n
            weights = class_weights(labels, ~out)[~out]
            fit = Ridge(strength).fit(features[~out], targets[~out], sample_weight=weights)
            scores = fit.predict(features[out])
            assert found.losses[k, n] == pytest.approx(np.square(scores - targets[out]).mean())
            assert found.accuracies[k, n] == (scores.argmax(axis=1) == labels[out]).mean()


@pytest.mark.parametrize("rule", ["loss", "accuracy", "one_standard_error"])
def test_rules(rule):
    found = sweep_head(*sample(60, 20, 3), strengths=STRENGTHS, rule=rule)
    mean, sign = found.losses.mean(axis=1), 1
    if rule == "accuracy":
        mean, sign = -found.accuracies.mean(axis=1), -1
    bound = mean.min()
    if rule == "one_standard_error":
        bound += found.losses[mean.argmin()].std(ddof=1) / np.sqrt(5)
    assert found.best == max(n for n in range(4) if mean[n] <= bound)
    assert (
        sign * mean[found.best]
        == (found.losses if sign > 0 else found.accuracies)[found.best].mean()
    )


def test_a_rare_class_is_held_out_as_often_as_it_has_examples():
    features, labels = sample(40, 5, 3)
    kept = np.flatnonzero(labels < 2).tolist() + np.flatnonzero(labels == 2)[:2].tolist()
    found = sweep_head(features[kept], labels[kept], strengths=STRENGTHS)
    assert found.accuracies.shape == (4, 5)


def test_more_classes_than_features_and_few_examples():
    found = sweep_head(np.random.default_rng(0).normal(size=(24, 2)), np.arange(24) % 12, folds=2)
    assert found.kernel.shape == (2, 12)


def test_a_single_example_is_always_learned_from():
    """By scikit-learn's fit to what was not held out, the single example included."""
    features, labels = sample(20, 5, 2)
    labels[0], labels[1:3] = 2, 1
    found = sweep_head(features, labels, strengths=[1.0], folds=2)
    assert found.notes[0] == "Classes [2] have one example, which is never held out."
    scaled = standardization(features)(features)
    out = np.append(False, stratified_folds(labels[1:], 2) == 0)
    fit = logistic_regression(scaled[~out], labels[~out], 1.0, class_weights(labels, ~out)[~out])
    loss = log_loss(labels[out], fit.predict_proba(scaled[out]), labels=range(3))
    np.testing.assert_allclose(found.losses[0, 0], loss, rtol=5e-3)
    ridge = sweep_head(features, labels, "ridge")
    assert ridge.notes[0] == found.notes[0]


def test_one_example_of_every_class_leaves_nothing_to_hold_out():
    with pytest.raises(ValueError, match="one example, so that none can be held out"):
        sweep_head(np.eye(4), np.arange(4))


def test_the_table_says_what_was_found():
    features, labels = sample(40, 5, 3)
    found = sweep_head(
        np.hstack([features, np.ones_like(features)]), labels, strengths=(100.0, 1e6)
    )
    lines = str(found).splitlines()
    assert lines[1].startswith("*        100  ")
    assert "±" in lines[2]
    assert "5 of 10 features are constant." in lines
    assert "The best strength is at the end of the range; try smaller ones." in lines


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kind": "svm", "folds": 1}, r"kind must .*got 'svm'; folds must .*got 1"),
        ({"rule": "best"}, "rule must .*, got 'best'"),
        ({"seeds": ()}, r"seeds must .*, got \[\]"),
        ({"labels": np.zeros(10, int)}, "at least 2 classes, got only class 0"),
        ({"strengths": (0.0, 1.0)}, "strengths must be > 0"),
        ({"classes": 7}, r"classes \[5, 6\] have no example"),
        ({"labels": np.arange(8) % 4}, r"and \(8,\)"),
    ],
)
def test_what_cannot_be_swept_is_said(changes, text):
    settings = {"features": np.eye(10), "labels": np.arange(10) % 5} | changes
    with pytest.raises(ValueError, match=text):
        sweep_head(**settings)


def test_folds_want_labels_that_fit():
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        stratified_folds(np.ones(4), 2)
    with pytest.raises(ValueError, match=r"\{1: 1\}"):
        stratified_folds([0, 0, 1], 2)
