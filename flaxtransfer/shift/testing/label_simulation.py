"""Labels drawn from posteriors: what the tests on a few labels compare the real ones with."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_labels, as_probabilities
from flaxtransfer.shift.hypotheses import HypothesisTest, enough_repetitions, untestable
from flaxtransfer.shift.testing.estimated_posteriors import EstimatedPosteriors

__all__ = [
    "CHOICE",
    "FEWEST",
    "KNOWN",
    "checked_labels",
    "drawn_labels",
    "excesses",
    "is_certain",
    "nothing_varies",
    "picked",
    "surprise",
    "too_few",
    "worlds",
]

FEWEST = 3

_SMALLEST = 1e-300
"""A class of probability 0 that is seen costs 691 nats, and not infinitely many."""

_AT_ONCE = 20_000_000
"""Comparisons with cumulated posteriors that are made at once; as many bytes."""

CHOICE = "labels are of a random choice of target examples"

KNOWN = "posteriors are known: what they were estimated from is much more than the labels"

_ESTIMATED = "estimates of a bootstrap vary about the posteriors as these do about the truth"


def checked_labels(
    probabilities: Any, labels: Any, simulations: int
) -> tuple[EstimatedPosteriors, np.ndarray, str]:
    """Posteriors, labels `[l]`, and what is assumed of the posteriors."""
    enough_repetitions(simulations, "simulations")
    given, assumption = probabilities, _ESTIMATED
    if not isinstance(given, EstimatedPosteriors):
        given = EstimatedPosteriors.known(as_probabilities(given, "probabilities"))
        assumption = KNOWN
    count, classes = given.posteriors.shape
    return given, as_labels(labels, "labels", count=count, classes=classes), assumption


def picked(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Entries `[..., l]` of a table `[l, K]` for labels `[..., l]`."""
    return table[np.arange(len(table)), labels]


def surprise(posteriors: np.ndarray) -> np.ndarray:
    """What each class would cost in nats."""
    return -np.log(np.maximum(posteriors, _SMALLEST))


def worlds(
    given: EstimatedPosteriors, simulations: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """True posteriors `[l, K]`, estimates of them `[l, K]`, and a share of the simulations."""
    parts = np.array_split(np.arange(simulations), len(given.rows))
    for rows, estimate, part in zip(given.rows, given.estimates, parts, strict=True):
        yield given.posteriors[rows], estimate, len(part)


def drawn_labels(posteriors: np.ndarray, simulations: int, rng: np.random.Generator) -> np.ndarray:
    """Classes `[simulations, l]` that the examples are drawn to be."""
    cumulated = np.cumsum(posteriors, axis=1)
    cumulated /= cumulated[:, -1:]
    uniform = rng.random((simulations, len(posteriors)))
    # The first class that exceeds, and one of probability 0 never is.
    if simulations * posteriors.size <= _AT_ONCE:
        return (uniform[:, :, None] >= cumulated).sum(2)
    columns = zip(cumulated, uniform.T, strict=True)
    return np.stack([np.searchsorted(chances, u, side="right") for chances, u in columns], 1)


def excesses(
    given: EstimatedPosteriors, scores: np.ndarray, simulations: int, seed: int
) -> np.ndarray:
    """Sums of scores of labels, less what the estimates expect, `[simulations]`, under H0.

    Labels are drawn from the posteriors, and scored by `scores` `[S, l, K]`, which belong to the
    estimates. Without the expectation the entropy of an estimate would enter, which is biased:
    estimates are more extreme than the truth.
    """
    rng = np.random.default_rng(seed)
    found = []
    for (truth, estimate, part), table in zip(worlds(given, simulations), scores, strict=True):
        sums = picked(table, drawn_labels(truth, part, rng)).sum(1)
        found.append(sums - (estimate * table).sum())
    return np.concatenate(found)


def is_certain(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether no draw can differ from another and the labels are that draw."""
    return bool((probabilities.max(1) >= 1).all() and (picked(probabilities, labels) >= 1).all())


def too_few(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    """The test of fewer labels than can be tested."""
    reason = f"{count} labels; a test needs {FEWEST}"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))


def nothing_varies(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    """The test of labels that could not have been others."""
    reason = "every posterior is certain, and every label is as it says: nothing varies under H0"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))
