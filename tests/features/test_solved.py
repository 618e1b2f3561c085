"""The head for raw features is scikit-learn's on standardized ones."""

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

import flaxtransfer as ft
from flaxtransfer.features import fit_linear_probe, logistic_path, standardization, sweep_head
from tests.support.peers import logistic_regression
from tests.support.small import PREPROCESSING, batch, network

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
FEATURES = (10 * RANDOM.normal(size=(60, 12)) + 3 + 15 * np.eye(12)[LABELS]).astype(np.float32)


def strength(text: str) -> float:
    return float(text.split("strength ")[1].split(";")[0].split(",")[0])


def test_it_is_scikit_learns_at_the_same_strength():
    head = fit_linear_probe(FEATURES, LABELS, 3)
    scaled = StandardScaler().fit_transform(FEATURES.astype(np.float64))
    peer = logistic_regression(scaled, LABELS, 1 / strength(head.text))
    logits = FEATURES @ head.kernel + head.bias
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    # The strength is printed with three digits, and the fit is in float32.
    np.testing.assert_allclose(probs, peer.predict_proba(scaled), atol=5e-3)


def test_a_network_with_it_gives_the_fitted_heads_logits():
    model, variables = network()
    batches = [batch(n) for n in range(6)]
    features, labels = ft.features.pooled_features(
        ft.Classifier(model, variables, PREPROCESSING), batches
    )
    head = fit_linear_probe(features, labels, 3)
    new = {"kernel": head.kernel.astype(np.float32), "bias": head.bias.astype(np.float32)}
    params = variables["params"] | {"fc": new}
    logits = ft.predict(
        ft.Classifier(model, variables | {"params": params}, PREPROCESSING), batches
    ).logits
    fitted = logistic_path(standardization(features)(features), labels, strength(head.text))
    # Both fits end within a millionth of the optimal loss, and the strength was printed.
    np.testing.assert_allclose(logits, fitted.logits[0], rtol=0.02, atol=0.1)
    np.testing.assert_allclose(
        logits, sweep_head(features, labels).scores(features), rtol=1e-4, atol=1e-4
    )


def test_one_example_a_class():
    head = fit_linear_probe(FEATURES[:3], LABELS[:3], 3)
    assert "because each class has one example" in head.text
    assert ((FEATURES[:3] @ head.kernel + head.bias).argmax(axis=1) == LABELS[:3]).all()


def test_the_only_example_of_a_class_is_learned_from():
    labels = np.where(np.arange(20) == 7, 2, LABELS[:20] % 2)
    head = fit_linear_probe(FEATURES[:20], labels, 3)
    assert "held-out accuracy" in head.text
    assert (FEATURES[7] @ head.kernel + head.bias).argmax() == 2


def test_two_examples_of_one_class_are_enough_for_two_folds():
    labels = np.array([0] * 10 + [1] * 2)
    assert "held-out accuracy" in fit_linear_probe(FEATURES[:12], labels, 2).text


def test_a_class_without_examples():
    with pytest.raises(ValueError, match="class"):
        fit_linear_probe(FEATURES, LABELS, 4)
