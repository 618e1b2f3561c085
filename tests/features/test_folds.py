"""Stratified folds, and ridge heads judged on them, against scikit-learn fold by fold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.linear_model import Ridge
from sklearn.metrics import log_loss

from flaxtransfer.features import baseline, cross_validate, fit_linear_probe, standardization
from flaxtransfer.features.inputs import class_weights, folds_with_singletons

STRENGTHS = (0.1, 3.0, 100.0)


def sample(counts, width: int, seed: int = 0, gap: float = 1.5):
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    features = random.normal(size=(len(labels), width))
    features[:, : len(counts)] += gap * np.eye(len(counts))[labels][:, :width]
    return standardization(features)(features), labels


def by_folds(features, labels, strength, seed):
    """Held-out scores of scikit-learn's ridge, with weights that keep the class shares."""
    fold_of = folds_with_singletons(labels, 5, seed)
    number = labels.max() + 1
    targets = np.where(labels[:, None] == np.arange(number), 1.0, -1.0)
    scores = np.zeros((len(labels), number))
    for fold in range(fold_of.max() + 1):
        rest, out = fold_of != fold, fold_of == fold
        shares, kept = np.bincount(labels) / len(labels), np.bincount(labels[rest])
        weights = (shares / kept)[labels[rest]] * rest.sum()
        fit = Ridge(strength).fit(features[rest], targets[rest], sample_weight=weights)
        if out.any():
            scores[out] = fit.predict(features[out])
    return scores, targets, fold_of >= 0


@pytest.mark.parametrize("counts", [[20, 20, 20], [31, 9, 4], [6, 5, 1, 3]])
def test_scores_are_those_of_scikit_learn_fitted_without_them(counts):
    features, labels = sample(counts, 6)
    found = cross_validate(features, labels, strengths=STRENGTHS, repeats=2, seed=7)
    errors, right = np.zeros(3), np.zeros((3, len(labels)))
    for seed in (7, 8):
        for n, strength in enumerate(STRENGTHS):
            scores, targets, out = by_folds(features, labels, strength, seed)
            errors[n] += np.square(scores - targets)[out].mean() / 2
            right[n] += (scores.argmax(axis=1) == labels) * out / 2
    np.testing.assert_allclose(found.errors, errors, rtol=1e-9)
    assert found.best == errors.argmin()
    np.testing.assert_array_equal(found.right, right[found.best])
    scores, _, out = by_folds(features, labels, found.strength, 7)
    np.testing.assert_allclose(found.scores[out], scores[out], rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(found.held_out, out)


def test_logits_have_the_scale_that_fits_best():
    features, labels = sample([20, 30, 25], 8)
    found = cross_validate(features, labels, repeats=1)

    def probs(scale):
        powers = np.exp(scale * found.scores)
        return powers / powers.sum(axis=1, keepdims=True)

    def smoothed(scale):
        """One example in n + 2 is of each other class in turn."""
        log_probs = np.log(probs(scale))
        targets = np.full_like(log_probs, 1 / 77 / 2)
        targets[np.arange(75), labels] = 1 - 1 / 77
        return -(targets * log_probs).sum(axis=1).mean()

    best = minimize_scalar(smoothed, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-8})
    assert found.scale == pytest.approx(best.x, rel=1e-4)
    assert found.loss == pytest.approx(log_loss(labels, probs(best.x)), rel=1e-4)
    found = cross_validate(features, labels)
    head = fit_linear_probe(features, labels, 3, kind="ridge")
    assert head.text == (
        f"ridge regression on 75 examples, strength {found.strength:.3g}; held-out accuracy "
        f"{100 * found.accuracy:.1f} %"
    )
    targets = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    peer = Ridge(found.strength).fit(features, targets)
    np.testing.assert_allclose(head.kernel, found.scale * peer.coef_.T, rtol=1e-8)
    np.testing.assert_allclose(head.bias, found.scale * peer.intercept_, rtol=1e-8)


def test_examples_that_are_all_right_do_not_make_a_head_too_sure():
    """Without doubt the factor has no optimum, and one wrong image would cost a hundred nats."""
    features, labels = sample([20, 20, 20], 8, gap=30)
    found = cross_validate(features, labels)
    assert found.accuracy == 1
    top = np.sort(found.scale * found.scores[found.held_out], axis=1)
    assert (top[:, -1] - top[:, -2]).max() < 12


@pytest.mark.parametrize("counts", [[5] * 10, [7] * 10, [13] * 4, [30, 10, 5], [3] * 20])
def test_features_without_information_are_worth_a_guess(counts):
    """Leave-one-out has 0 % on some of these; a guess is right as often as the largest class."""
    accuracies = []
    for seed in range(40):
        features, labels = sample(counts, 32, seed, gap=0)
        accuracies.append(cross_validate(features, labels, seed=seed).accuracy)
    error = np.std(accuracies) / np.sqrt(len(accuracies))
    assert abs(np.mean(accuracies) - max(counts) / sum(counts)) < 3 * error + 0.002


def test_heads_can_be_judged_on_the_examples_in_another_state():
    features, labels = sample([20, 20, 20], 6)
    found = cross_validate(features, labels, strengths=[3.0], repeats=1, seed=7)
    same = cross_validate(features, labels, strengths=[3.0], repeats=1, seed=7, judged=features)
    np.testing.assert_array_equal(found.right, same.right)
    turned = features[:, [1, 2, 0, 3, 4, 5]]
    fold_of, scores = folds_with_singletons(labels, 5, 7), np.zeros((60, 3))
    targets = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    for fold in range(5):
        fit = Ridge(3.0).fit(features[fold_of != fold], targets[fold_of != fold])
        scores[fold_of == fold] = fit.predict(turned[fold_of == fold])
    other = cross_validate(features, labels, strengths=[3.0], repeats=1, seed=7, judged=turned)
    np.testing.assert_allclose(other.scores, scores, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"shape of features, \(60, 6\), got \(60, 5\)"):
        cross_validate(features, labels, judged=features[:, :5])


def test_degrees_of_freedom_are_the_trace_of_the_hat_matrix():
    features, labels = sample([10, 10], 30, gap=0.5)
    found = cross_validate(features, labels, strengths=[5.0], folds=2, repeats=1)
    traces = []
    for fold in range(2):
        rest = features[folds_with_singletons(labels, 2, 0) != fold]
        centered = rest - rest.mean(axis=0)
        hat = centered @ np.linalg.solve(centered.T @ centered + 5 * np.eye(30), centered.T)
        traces.append(np.trace(hat))
    assert found.degrees_of_freedom == pytest.approx(np.mean(traces))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(2, 6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_folds_hold_each_example_out_once_and_share_classes_evenly(counts, folds, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    fold_of = folds_with_singletons(labels, folds, seed)
    for label, count in enumerate(counts):
        held = np.bincount(fold_of[labels == label] + 1, minlength=folds + 1)
        assert held[0] == (count == 1)
        assert held[1:].max() - held[1:].min() <= 1
    used = fold_of != 0
    weights = class_weights(labels, used)
    whole = np.bincount(labels, minlength=len(counts)) / len(labels)
    kept = np.bincount(labels, weights, minlength=len(counts)) / used.sum()
    learned = np.bincount(labels[used], minlength=len(counts)) > 0
    np.testing.assert_allclose(kept[learned], whole[learned])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"folds": 1}, "folds must be >= 2, got 1"),
        ({"classes": 4}, r"every class must have an example, classes \[3\] have none"),
        ({"labels": np.arange(9)}, "every class has one example"),
        ({"features": np.full((9, 2), np.nan)}, "features must be finite"),
        ({"strengths": [0.0]}, "strengths must be > 0"),
    ],
)
def test_what_cannot_be_cross_validated(changes, text):
    settings = {"features": np.eye(9), "labels": np.arange(9) % 3} | changes
    with pytest.raises(ValueError, match=text):
        cross_validate(**settings)


def test_other_kinds_of_probes():
    with pytest.raises(ValueError, match="kind must be 'logistic' or 'ridge', got 'svm'"):
        fit_linear_probe(np.eye(4), np.arange(4) % 2, 2, kind="svm")


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=2, max_size=60),
    st.integers(2, 5),
)
def test_groups_are_held_out_whole_and_leave_every_class(pairs, folds):
    label, groups = (np.array(column) for column in zip(*pairs, strict=True))
    found = folds_with_singletons(label, folds, 1, groups.tolist())
    assert all(len(set(found[groups == each].tolist())) == 1 for each in groups)
    for fold in set(found.tolist()) - {-1}:
        assert set(label[found != fold]) == set(label)


def test_what_a_head_knows_of_patients_is_no_knowledge_of_classes():
    """40 patients with five images each, known by their features; their classes are drawn."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 5)
    features = np.eye(40)[groups] + 0.1 * random.normal(size=(200, 40))
    label = random.permutation(np.arange(40) % 2)[groups]
    assert cross_validate(features, label).accuracy > 0.8
    # Two standard errors of 40 drawn patients around chance.
    assert abs(cross_validate(features, label, groups=groups.tolist()).accuracy - 0.5) < 0.16
    with pytest.raises(ValueError, match="there must be 2 groups or more"):
        cross_validate(features, label, groups=[0] * 200)
    held_out = baseline(features, label, groups=groups.tolist())
    assert held_out.ridge < 0.66
    assert held_out.nearest_class_mean < 0.66
