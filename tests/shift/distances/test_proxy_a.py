"""The proxy A-distance: bounds, balance, and what it is a cross-validated error of."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from flaxtransfer.analysis.similarity import proxy_a_distance
from flaxtransfer.shift.statistics import random_folds


def draw(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(40, 3), (15, 60)])
def test_domains_that_lie_apart_are_at_2(rows, columns):
    found = proxy_a_distance(draw(rows, columns, 1), draw(rows, columns, 2) + 9)
    assert (found.value, found.p) == (2.0, 1 / 200)


def test_examples_that_were_learned_from_would_show_2_for_one_distribution():
    """100 against 100 of 512 features: 2.00 on what was learned from, near 0 on what was not."""
    source, target = draw(100, 512, 1), draw(100, 512, 2)
    pooled, domain = np.concatenate([source, target]), np.repeat([0, 1], 100)
    learned = np.linalg.lstsq(pooled, 2.0 * domain - 1, rcond=None)[0]
    assert 2 * (1 - 2 * ((pooled @ learned > 0) != domain).mean()) == 2
    found = proxy_a_distance(source, target)
    assert abs(found.value) < 0.45
    assert abs(found.null_mean) < 0.1


@pytest.mark.parametrize(("first", "second", "columns"), [(400, 400, 4), (600, 150, 4)])
def test_its_error_is_that_of_the_optimal_discriminant(first, second, columns):
    """Gaussians at distance 2 with equal weights: the error of Bayes' rule is Phi(-1) = 0.1587."""
    step = np.array([2.0] + [0.0] * (columns - 1))
    found = proxy_a_distance(draw(first, columns, 1), draw(second, columns, 2) + step)
    assert found.value == pytest.approx(2 * (1 - 2 * 0.1587), abs=0.15)


def test_it_agrees_with_the_discriminant_of_scikit_learn_in_the_same_folds():
    """Without shrinkage both are Fisher's discriminant, but for the threshold's last digits."""
    source, target = draw(300, 3, 1), draw(300, 3, 2) + np.eye(3)[0]
    pooled, domain = np.concatenate([source, target]), np.repeat([0, 1], 300)
    fold = random_folds(600, 5, 0)
    wrong = np.zeros(2)
    for number in range(5):
        held = fold == number
        fitted = LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(pooled[~held], domain[~held])
        missed = fitted.predict(pooled[held]) != domain[held]
        wrong += np.bincount(domain[held], missed, 2)
    expected = 2 * (1 - 2 * (wrong / 300).mean())
    found = proxy_a_distance(source, target, permutations=19)
    assert found.value == pytest.approx(expected, abs=0.03)


def test_a_large_sample_gains_nothing_by_being_large():
    """With few target examples and many features the threshold still lies in the middle."""
    found = proxy_a_distance(draw(120, 300, 1), draw(12, 300, 2) + 0.6)
    assert found.value > 1
    assert found.p == 1 / 200


def test_the_error_is_the_mean_of_both_domains():
    # A quarter of the larger domain lies on the far side of the other: 2 (1 - 2 (0 + 1 / 4) / 2).
    source, target = np.zeros((10, 1)), np.repeat([1.0, -1.0], [30, 10])[:, None]
    assert proxy_a_distance(source, target, permutations=19).value == pytest.approx(1.5)


def test_scales_of_features_and_dead_ones_do_not_matter():
    source, target = draw(40, 5, 1), draw(50, 5, 2) + 0.3
    plain = proxy_a_distance(source, target)
    scale = 10.0 ** np.arange(-6, 4, 2)
    scaled = proxy_a_distance(
        np.c_[source * scale + 1, np.full(40, 7.3)], np.c_[target * scale + 1, np.full(50, 7.3)]
    )
    assert scaled.value == plain.value
    assert scaled.p == plain.p
    assert scaled.notes == ("1 features are constant and were left out",)


def test_the_smallest_samples_have_an_answer():
    """Folds of 4 and 4: some see one domain alone, and count as guesses."""
    found = proxy_a_distance(draw(4, 2, 1), draw(4, 2, 2) + 50, folds=2)
    assert -2 <= found.value <= 2
    assert found.null_mean < 1


def test_folds_that_there_cannot_be():
    with pytest.raises(ValueError, match="number of examples, 8, got 1"):
        proxy_a_distance(draw(4, 2), draw(4, 2), folds=1)
