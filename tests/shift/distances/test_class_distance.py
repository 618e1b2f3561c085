"""Classes carried onto classes: by hand, by a peer, and where labels alone differ."""

from itertools import permutations as arrangements

import numpy as np
import pytest

from flaxtransfer.analysis.distances import bures_wasserstein, class_distance, frechet_distance

I = np.arange(12.0)  # noqa: E741
SOURCE = np.stack([np.sin(I), np.cos(1.3 * I), 2 * np.sin(0.7 * I)], 1)
TARGET = np.stack([np.cos(I), np.sin(2.1 * I) + 0.5, I / 6], 1)


def test_a_number_of_pot():
    """ot.gmm.gmm_ot_loss(means, means, covariances, covariances, weights, weights), 0.9.7.post1."""
    labels, others = np.arange(12) % 3, np.arange(12) // 6
    found = class_distance(SOURCE, labels, TARGET, others, permutations=19)
    assert found.value == pytest.approx(2.949114638995644, abs=1e-9)


def test_one_class_each_is_the_frechet_distance():
    found = class_distance(SOURCE, np.ones(12), TARGET, np.ones(12), permutations=19)
    plain = frechet_distance(SOURCE, TARGET, permutations=19)
    assert found.value == pytest.approx(plain.value, rel=1e-9)
    assert found.null_mean == pytest.approx(plain.null_mean, rel=1e-9)
    assert found.notes == ()


def test_equal_classes_are_carried_whole_by_the_best_arrangement():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 5)
    source, target = random.normal(size=(2, 20, 3))
    moments = [
        [(x[labels == k].mean(0), np.cov(x[labels == k].T)) for k in range(4)]
        for x in (source, target)
    ]
    costs = [[bures_wasserstein(*one, *other) ** 2 for other in moments[1]] for one in moments[0]]
    best = min(np.mean([costs[k][to[k]] for k in range(4)]) for to in arrangements(range(4)))
    found = class_distance(source, labels, target, labels, permutations=19)
    assert found.value == pytest.approx(best, rel=1e-9)


def test_numbers_of_classes_do_not_matter_and_their_places_do():
    random = np.random.default_rng(0)
    labels, others = random.integers(0, 4, size=(2, 80))
    centers = 6 * random.normal(size=(4, 5))
    source, target = (random.normal(size=(80, 5)) + centers[own] for own in (labels, others))
    same = class_distance(source, labels, target, others, permutations=39)
    mixed = class_distance(source, labels, target, random.permutation(others), permutations=39)
    renamed = class_distance(source, labels, target, (others + 1) % 4 + 7, permutations=39)
    assert same.p > 0.05
    assert mixed.p == 1 / 40
    assert mixed.excess > 3 * abs(same.excess)
    assert renamed.value == pytest.approx(same.value, rel=1e-9)
    assert renamed.notes == (
        "the domains have different classes: the null has those of both in each",
    )
    # Features alone are the same in both.
    assert frechet_distance(source, target, permutations=39).p > 0.05


def test_a_class_of_one_example_is_a_point_and_said():
    labels = np.array([0] * 9 + [1, 2, 2])
    found = class_distance(SOURCE, labels, TARGET, np.zeros(12), permutations=19)
    assert "1 classes have one example, and no covariance" in found.notes


def test_labels_of_another_count():
    with pytest.raises(ValueError, match=r"target labels must have shape \[12\], got \[3\]"):
        class_distance(SOURCE, np.zeros(12), TARGET, [0, 1, 2])
