"""LEEP by its definition, and with source classes that nothing was taken for."""

import numpy as np
import pytest

from flaxtransfer.analysis.transferability import leep


def by_definition(probabilities, labels):
    joint = {
        (y, z): sum(p[z] for p, own in zip(probabilities, labels, strict=True) if own == y)
        for y in set(labels)
        for z in range(len(probabilities[0]))
    }
    mass = [sum(p[z] for p in probabilities) for z in range(len(probabilities[0]))]
    total = 0.0
    for p, own in zip(probabilities, labels, strict=True):
        total += np.log(sum(joint[own, z] / mass[z] * p[z] for z in range(len(p)) if mass[z]))
    return total / len(labels)


@pytest.mark.parametrize("empty", [0, 2])
def test_it_is_its_definition(empty):
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(4) * 0.3, size=15)
    probabilities = np.c_[probabilities, np.zeros((15, empty))]
    labels = (np.arange(15) % 3).tolist()
    found = leep(probabilities, labels)
    assert found.value == pytest.approx(by_definition(probabilities.tolist(), labels), rel=1e-12)
    left_out = (f"{empty} source classes have no mass and were left out",)
    assert found.notes == (left_out if empty else ())
    assert found.counts == (15, 4 + empty, 3)


def test_a_source_that_says_nothing_leaves_the_entropy_of_the_labels():
    labels = [0, 0, 0, 1]
    found = leep(np.full((4, 5), 0.2), labels)
    assert found.value == pytest.approx(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert found.p == 1


def test_a_source_that_knows_the_classes_says_so():
    labels = np.arange(30) % 3
    probabilities = np.full((30, 6), 0.02)
    probabilities[np.arange(30), labels + 3] = 0.9
    found = leep(probabilities, labels)
    assert found.p == 1 / 200
    assert -0.5 < found.value <= 0


@pytest.mark.parametrize("seed", range(10))
def test_rounding_does_not_lift_it_above_0(seed):
    # No source class is shared by two classes: each label is told for certain, but for rounding,
    # which goes up for a third of the seeds.
    shares = np.random.default_rng(seed).dirichlet(np.ones(3), size=9)
    labels = np.arange(9) % 2
    probabilities = np.zeros((9, 2, 3))
    probabilities[np.arange(9), labels] = shares
    assert -1e-15 < leep(probabilities.reshape(9, 6), labels).value <= 0


def test_half_precision_and_certain_predictions_stay_finite():
    probabilities = np.eye(5)[np.arange(20) % 5].astype(np.float16)
    assert leep(probabilities, np.arange(20) % 4 > 0).value <= 0
    with pytest.raises(ValueError, match="must sum to 1 per row"):
        leep(np.ones((6, 3)), [0, 1] * 3)
