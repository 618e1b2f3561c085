"""The head for raw features is scikit-learn's on standardised ones."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from flaxtransfer.features import solved_head

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
FEATURES = (10 * RANDOM.normal(size=(60, 12)) + 3 + 15 * np.eye(12)[LABELS]).astype(np.float32)


def strength(text: str) -> float:
    return float(text.split("strength ")[1].split(";")[0].split(",")[0])


def test_it_is_scikit_learns_at_the_same_strength():
    head = solved_head(FEATURES, LABELS, 3)
    peer = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / strength(head.text), tol=1e-10, max_iter=10_000)
    ).fit(FEATURES.astype(np.float64), LABELS)
    logits = FEATURES @ head.kernel + head.bias
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    # The strength is printed with three digits, and the fit is in float32.
    np.testing.assert_allclose(probs, peer.predict_proba(FEATURES.astype(np.float64)), atol=5e-3)


def test_one_example_a_class():
    head = solved_head(FEATURES[:3], LABELS[:3], 3)
    assert "has but one example" in head.text
    assert ((FEATURES[:3] @ head.kernel + head.bias).argmax(axis=1) == LABELS[:3]).all()


def test_two_examples_of_one_class_are_enough_for_two_folds():
    labels = np.array([0] * 10 + [1] * 2)
    assert "held out are right" in solved_head(FEATURES[:12], labels, 2).text


def test_a_class_without_examples():
    with pytest.raises(ValueError, match="class"):
        solved_head(FEATURES, LABELS, 4)
