"""Copies of examples, which tests and distances would count as further ones."""

import numpy as np
import pytest

import flaxtransfer as ft

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(size=(40, 3))
OTHER = RANDOM.normal(size=(30, 3))
LABELS = np.arange(40) % 2

TWO_SAMPLES = {
    "MMD": lambda a, b: ft.shift.mmd_test(a, b, permutations=19),
    "classifier": lambda a, b: ft.shift.classifier_test(a, b, permutations=19),
    "KS": ft.shift.kolmogorov_smirnov_test,
    "Frechet": lambda a, b: ft.analysis.frechet_distance(a, b, permutations=19),
    "proxy A": lambda a, b: ft.analysis.proxy_a_distance(a, b, permutations=19),
    "sliced": lambda a, b: ft.analysis.sliced_wasserstein(a, b, permutations=19),
}


@pytest.mark.parametrize("name", TWO_SAMPLES)
def test_two_samples_with_copies(name):
    compare = TWO_SAMPLES[name]
    assert not any("rows" in note for note in compare(ROWS, OTHER).notes)
    twice = compare(np.concatenate([ROWS, ROWS[:7]]), OTHER).notes
    assert any("7 of 47 source rows repeat an earlier one" in note for note in twice)
    both = compare(ROWS, np.concatenate([OTHER, ROWS[:5]])).notes
    assert any("5 of 35 target rows also occur exactly in the source" in note for note in both)
    assert "note: 5 of 35 target rows" in str(compare(ROWS, np.concatenate([OTHER, ROWS[:5]])))


@pytest.mark.parametrize("score", ["logme", "h_score"])
def test_labeled_examples_with_copies(score):
    found = getattr(ft.analysis, score)
    assert not any("repeat" in note for note in found(ROWS, LABELS, permutations=19).notes)
    rows, labels = np.concatenate([ROWS, ROWS[:9]]), np.concatenate([LABELS, LABELS[:9]])
    notes = found(rows, labels, permutations=19).notes
    assert any("9 of 49 feature rows repeat an earlier one" in note for note in notes)


def test_certain_posteriors_are_no_copies():
    certain = np.eye(2)[LABELS]
    assert ft.analysis.leep(certain, LABELS, permutations=19).notes == ()
    shares = np.repeat(RANDOM.dirichlet([1, 1], 20), 2, axis=0)
    (note,) = ft.analysis.leep(shares, LABELS, permutations=19).notes
    assert note.startswith("20 of 40 uncertain rows repeat")
