"""Losses as values: what they compute, how they are bound to a training set, and what is refused.

Equality with torch is in ``tests/parity/test_tasks.py``.
"""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from sklearn.utils.class_weight import compute_class_weight

import flaxtransfer as ft
from flaxtransfer.losses import (
    LOSSES,
    BinaryCrossEntropy,
    CrossEntropy,
    Huber,
    SquaredError,
    bound,
    cross_entropy,
    settings_of,
)

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(30, 3)).astype(np.float32)
CLASSES = np.r_[0, 1, 2, RANDOM.integers(0, 3, 27)]
LABELS = RANDOM.integers(0, 2, (30, 3)).astype(np.float32)
NAMES = ("a", "b", "c")


def value(loss, labels=CLASSES):
    return np.asarray(loss(LOGITS, labels, jax.random.key(0)))


def test_balanced_weights_are_scikit_learns():
    loss = bound(CrossEntropy(class_weights="balanced"), "single_label", NAMES, CLASSES)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=CLASSES)
    np.testing.assert_allclose(loss.weights, expected, rtol=1e-12)
    np.testing.assert_allclose(value(loss), expected[CLASSES] * value(cross_entropy), rtol=1e-5)


def test_balanced_positives_weigh_as_much_as_negatives():
    hidden = LABELS.copy()
    hidden[:5] = np.nan
    loss = bound(BinaryCrossEntropy(positive_weights="balanced"), "multi_label", NAMES, hidden)
    positives, negatives = (hidden == 1).sum(0), (hidden == 0).sum(0)
    np.testing.assert_allclose(np.array(loss.weights) * positives, negatives)


def test_logit_adjustment_is_the_papers():
    """Equation 10 of Menon et al.: log(1 + sum over others of (pi_j / pi_y)^tau exp(f_j - f_y))."""
    loss = bound(CrossEntropy(logit_adjustment=1.5), "single_label", NAMES, CLASSES)
    share = np.bincount(CLASSES) / len(CLASSES)
    own = LOGITS[np.arange(30), CLASSES]
    ratios = (share[None] / share[CLASSES][:, None]) ** 1.5
    expected = np.log((ratios * np.exp(LOGITS - own[:, None])).sum(axis=1))
    np.testing.assert_allclose(value(loss), expected, rtol=1e-5)


def test_focal_loss_is_the_papers():
    """Equation 4 of Lin et al.: -(1 - p)^gamma log p."""
    plain = value(cross_entropy)
    expected = (1 - np.exp(-plain)) ** 2 * plain
    np.testing.assert_allclose(value(CrossEntropy(focal=2.0)), expected, rtol=1e-5)


def test_a_focal_loss_has_a_gradient_where_it_is_sure():
    sure = np.array([[60.0, -60.0, -60.0]], np.float32)
    for loss, labels in (
        (CrossEntropy(focal=0.5), np.array([0])),
        (BinaryCrossEntropy(focal=0.5), 1 * (sure > 0)),
    ):
        gradient = jax.grad(lambda z, of=loss, y=labels: of(z, y, jax.random.key(0)).sum())(sure)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CrossEntropy(0.1), CrossEntropy(0, {"a": 2}), Huber()]
)
def test_equal_losses_are_one_loss(loss):
    again = type(loss)(**settings_of(loss))
    assert again == loss
    assert hash(again) == hash(loss)


@pytest.mark.parametrize(
    ("loss", "task", "labels", "said"),
    [
        (
            CrossEntropy(class_weights={"d": 2.0}),
            "single_label",
            CLASSES,
            "class_weights must name",
        ),
        (CrossEntropy(), "regression", LABELS, r"must be one for the task regression \(squared"),
        (Huber(), "multi_label", LABELS, r"must be one for the task multi_label \(binary"),
        (CrossEntropy(logit_adjustment=1), "single_label", CLASSES % 2, "got none of 'c'"),
        (
            BinaryCrossEntropy(positive_weights="balanced"),
            "multi_label",
            LABELS * 0,
            "every label must have a positive training example",
        ),
        (CrossEntropy(class_weights="balanced"), "single_label", None, "needs the labels of the"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(loss, task, labels, said):
    with pytest.raises(ValueError, match=said):
        bound(loss, task, NAMES, labels)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CrossEntropy(1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: CrossEntropy(focal=-1), "focal must be >= 0, got -1"),
        (lambda: CrossEntropy(class_weights="even"), "class_weights must be 'balanced' or numbers"),
        (lambda: CrossEntropy(class_weights={"a": 0}), "class_weights must be numbers > 0"),
        (lambda: BinaryCrossEntropy(label_smoothing=True), "label_smoothing must be in"),
        (lambda: Huber(0), "delta must be > 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_unbound_loss_is_not_computed():
    with pytest.raises(ValueError, match="must be bound to the training set first"):
        value(CrossEntropy(class_weights="balanced"))


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(0.1, {"a": 2.0}, 2.0, 1.0),
        CrossEntropy(class_weights="balanced"),
        BinaryCrossEntropy(0.1, "balanced", 2.0),
        SquaredError(),
        Huber(0.5),
        None,
    ],
)
def test_a_loss_comes_back_from_a_plan_file(loss):
    groups = {"all": ft.Group(optax.adam, 1e-3)}
    plan = ft.Plan([ft.Phase({"all": ft.everything()}, groups, steps=2, loss=loss)])
    assert ft.training.plan_from_yaml(ft.training.plan_to_yaml(plan)) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{cross_entropi: {}}", "did you mean 'cross_entropy'"),
        ("{cross_entropy: {label_smooth: 0.1}}", "did you mean 'label_smoothing'"),
        ("{cross_entropy: {weights: [1]}}", "has no setting 'weights'"),
        ("{huber: {delta: -1}}", "delta must be > 0"),
        ("{huber: {}, squared_error: {}}", "loss must be one loss, got 2"),
        ("0.1", "loss must be a mapping with cross_entropy"),
    ],
)
def test_a_plan_file_with_another_loss_is_refused(text, said):
    written = "phases:\n- steps: 1\n  labels: {a: everything()}\n  groups: {a: {optimizer: sgd, "
    written += f"learning_rate: 1.0}}}}\n  loss: {text}\n"
    with pytest.raises(ValueError, match=said):
        ft.training.plan_from_yaml(written)


def test_a_loss_is_shown_by_its_settings():
    loss = bound(CrossEntropy(0.1, "balanced"), "single_label", NAMES, CLASSES)
    assert repr(loss) == "CrossEntropy(label_smoothing=0.1, class_weights='balanced')"
    assert repr(SquaredError()) == "SquaredError()"


def test_every_loss_has_a_name_and_a_task():
    assert {each.task for each in LOSSES.values()} == set(ft.task.TASKS)
