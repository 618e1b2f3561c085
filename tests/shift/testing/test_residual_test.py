"""The over-identification test: its statistic by definition, what it finds, what it refuses."""

import dataclasses

import numpy as np
import pytest

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.label_shift import (
    class_kernel,
    mixture_residual,
    residual_test,
    simulated_residuals,
)

MEANS = 2.0 * np.eye(3, 6)


def world(n=300, m=150, prevalence=(1 / 3, 1 / 3, 1 / 3), step=0.0, seed=0):
    rng = np.random.default_rng(seed)

    def sample(count, shares):
        labels = rng.choice(3, size=count, p=shares)
        return MEANS[labels] + rng.normal(size=(count, 6)), labels

    def posteriors(features):
        weights = np.exp(features @ MEANS.T)
        return weights / weights.sum(1, keepdims=True)

    features, labels = sample(n, np.full(3, 1 / 3))
    target, _ = sample(m, prevalence)
    target = target + step
    source = Calibration("none", np.ones(3), np.zeros(3), posteriors(features), labels)
    return features, target, posteriors(target), source


def test_the_statistic_by_definition_over_pairs_of_different_examples():
    features, target, _, source = world(40, 20)
    shares = np.array([0.5, 0.2, 0.3])
    classes = class_kernel(features.astype(np.float32), source.labels, source.probabilities)

    def kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2) / 2)

    def between(first, second):
        values = kernel(first, second)
        if first is second:
            return (values.sum() - len(first)) / (len(first) * (len(first) - 1))
        return values.mean()

    groups = [features[source.labels == k] for k in range(3)]
    wanted = between(target, target) + sum(
        shares[k] * shares[j] * between(groups[k], groups[j]) for k in range(3) for j in range(3)
    )
    wanted -= 2 * sum(shares[k] * between(groups[k], target) for k in range(3))
    found = mixture_residual(classes, target.astype(np.float32), shares)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_it_is_unbiased_and_the_bootstrap_scatters_as_reality_does():
    # Few rows of 64 dimensions: with ones on its diagonal the bootstrap would scatter further.
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.5])
    real, simulated = [], []
    for number in range(60):
        labels = np.arange(80) % 2
        features = (rng.normal(size=(80, 64)) / 11).astype(np.float32)
        target = (rng.normal(size=(40, 64)) / 11).astype(np.float32)
        classes = class_kernel(features, labels, np.eye(2)[labels])
        real.append(mixture_residual(classes, target, shares))
        if number < 10:
            draws = simulated_residuals(classes, shares, 40, 50, np.random.default_rng(number))
            simulated.append(draws)
    scatter = np.std(real)
    assert abs(np.mean(real)) < 3 * scatter / np.sqrt(60)
    assert abs(np.mean(simulated)) < scatter / 2
    assert 0.75 < np.std(simulated) / scatter < 1.5


@pytest.mark.parametrize(
    ("case", "rejected"),
    [
        ({}, False),
        ({"prevalence": (0.7, 0.2, 0.1)}, False),
        ({"prevalence": (1.0, 0.0, 0.0)}, False),
        ({"step": np.array([0, 0, 0, 1.0, 0, 0])}, True),
        ({"step": np.array([0, 0, 0, 1.0, 0, 0]), "prevalence": (0.7, 0.2, 0.1)}, True),
    ],
)
def test_what_it_finds(case, rejected):
    found = residual_test(*world(**case), simulations=99)
    assert found.rejected() == rejected
    assert found.effect == found.statistic
    assert found.minimum_detectable > 0


def test_what_cannot_be_tested():
    features, target, probabilities, source = world()
    assert "9 rows" in residual_test(features, target[:9], probabilities[:9], source).not_testable
    # No example of a class that half of the target seems to be.
    lacking = source.labels != 2
    poor = dataclasses.replace(
        source, labels=source.labels[lacking], probabilities=source.probabilities[lacking]
    )
    found = residual_test(features[lacking], target, probabilities, poor)
    assert "class 2 has 0 source examples" in found.not_testable
    constant = residual_test(np.ones((300, 2)), np.ones((150, 2)), probabilities, source)
    assert "constant" in constant.not_testable


def test_a_class_that_neither_side_has_is_no_obstacle():
    features, target, probabilities, source = world()
    wider = Calibration(
        "none",
        np.ones(4),
        np.zeros(4),
        np.pad(source.probabilities, ((0, 0), (0, 1))),
        source.labels,
    )
    found = residual_test(
        features, target, np.pad(probabilities, ((0, 0), (0, 1))), wider, simulations=99
    )
    assert found.p == residual_test(features, target, probabilities, source, simulations=99).p


def test_rows_that_do_not_belong_together():
    features, target, probabilities, source = world()
    with pytest.raises(
        ValueError,
        match=r"source features and source prob.*, got 299 and 300 rows",
    ):
        residual_test(features[1:], target, probabilities, source)
    with pytest.raises(
        ValueError,
        match=r"target features and target prob.*, got 149 and 150 rows",
    ):
        residual_test(features, target[1:], probabilities, source)


def test_many_rows_are_subsampled_and_shared_ones_noticed():
    features, target, probabilities, source = world()
    found = residual_test(features, target, probabilities, source, simulations=19, max_rows=120)
    assert found.notes == ("at most 120 rows of either side were used",)
    assert found.counts == (300, 150)
    # Rows keep their probabilities: the first 120 of a sorted target are of two classes alone.
    order = np.argsort(probabilities.argmax(1))
    ordered = (features, target[order], probabilities[order], source)
    assert not residual_test(*ordered, simulations=99, max_rows=120).rejected()
    target[0] = features[0]
    shared = (features, target, probabilities, source)
    assert "1 of 150" in residual_test(*shared, simulations=19).notes[0]


def test_classes_without_a_spread_have_the_residual_of_their_numbers():
    # All examples of a class at one point, and told for certain. Mixed by what was drawn, a target
    # differs in its pairs of different examples alone, by -2 q0 q1 (1 - k) / m with shares q.
    labels = np.repeat([0, 1], [30, 20])
    places = 1.5 * labels[:, None].astype(np.float32)
    classes = class_kernel(places, labels, np.eye(2)[labels])
    drawn = simulated_residuals(classes, np.array([0.7, 0.3]), 40, 20, np.random.default_rng(0))
    wanted = -2 * 0.7 * 0.3 * (1 - np.exp(-(1.5**2) / 2)) / 40
    np.testing.assert_allclose(drawn, wanted, atol=1e-6)


def test_a_class_of_one_example_is_that_example():
    labels = np.array([0, 0, 0, 1])
    features = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    assert class_kernel(features, labels, np.eye(2)[labels]).means[1, 1] == 1
