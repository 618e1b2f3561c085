"""Claims about tasks: what a label is, and that one loss is trained and reported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from flaxtransfer.losses import CrossEntropy, cross_entropy
from flaxtransfer.task import (
    SINGLE_LABEL,
    Task,
    mean_loss,
    task_named,
)

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(50, 4)).astype(np.float32)
LABELS = RANDOM.integers(0, 4, 50)


def test_probabilities_score_and_loss_are_scikit_learns():
    probabilities = SINGLE_LABEL.probabilities(LOGITS)
    found = SINGLE_LABEL.evaluate(LOGITS, LABELS)
    assert list(found) == ["accuracy", "loss"]
    assert found["accuracy"] == accuracy_score(LABELS, LOGITS.argmax(1))
    # The mean over 50 float32 losses: an error of one rounding in each.
    np.testing.assert_allclose(found["loss"], log_loss(LABELS, probabilities), rtol=1e-6)


def test_the_score_is_the_same_on_the_device():
    on_device = SINGLE_LABEL.score(jnp.asarray(LOGITS), jnp.asarray(LABELS))
    np.testing.assert_array_equal(on_device, SINGLE_LABEL.score(LOGITS, LABELS))


@pytest.mark.parametrize("loss", [CrossEntropy(0.2), lambda z, y, key: 100 + 0 * z[:, 0]])
def test_the_reported_loss_is_the_one_that_was_asked_for(loss):
    expected = float(np.mean(loss(jnp.asarray(LOGITS), jnp.asarray(LABELS), jax.random.key(0))))
    assert SINGLE_LABEL.evaluate(LOGITS, LABELS, loss)["loss"] == pytest.approx(expected, rel=1e-6)
    assert mean_loss(cross_entropy, LOGITS, LABELS) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 4], r"labels must be 0 \.\. 3 for a network of 4 classes, got 4"),
        ([0, -1], r"labels must be 0 \.\. 3 .* got -1"),
        ([0.5, 1.0], r"labels must be integers \[examples\] .* got float64 of shape \(2,\)"),
        ([[0, 1]], r"labels must be integers \[examples\] .* got int64 of shape \(1, 2\)"),
    ],
)
def test_labels_that_are_not_classes_are_refused(labels, said):
    with pytest.raises(ValueError, match=said):
        SINGLE_LABEL.check(labels, 4)


def test_labels_that_are_classes_are_taken():
    np.testing.assert_array_equal(SINGLE_LABEL.check([3, 0], 4), [3, 0])
    assert len(SINGLE_LABEL.check(np.empty(0, np.int64), 4)) == 0


def test_a_task_is_found_by_the_name_that_files_record():
    assert task_named("single_label") is SINGLE_LABEL
    with pytest.raises(ValueError, match=r"task must be one of .*, got 'single'; did you"):
        task_named("single")
    for damaged in ("single_l" + "[]," * 1000 + "abel", ["single_label"], None):
        with pytest.raises(ValueError, match=r"task must be one of single_label, .* got") as caught:
            task_named(damaged)
        assert len(str(caught.value)) < 200


def test_another_task_is_a_value_of_the_same_class():
    """What multi-label needs: its own loss, score and metrics, and no other file."""
    sigmoid = Task(
        name="findings",
        check=lambda labels, outputs: np.asarray(labels, np.float32),
        loss=lambda z, y, key: jnp.mean(jnp.logaddexp(0.0, z) - y * z, axis=-1),
        probabilities=lambda z: 1 / (1 + np.exp(-z)),
        score=lambda z, y: ((z > 0) == (y > 0.5)).mean(-1),
        ranking="label_accuracy",
        metrics=lambda z, y: {"positives": float(y.mean())},
    )
    targets = (LOGITS > 0).astype(np.float32)
    found = sigmoid.evaluate(LOGITS, targets)
    assert list(found) == ["label_accuracy", "loss", "positives"]
    assert found["label_accuracy"] == 1
    assert found["positives"] == pytest.approx(targets.mean())
