"""Stratified folds, and what a ridge head says of examples that it was not fitted on.

``stratified_folds`` is the one assignment of examples to folds. ``cross_validate`` scores ridge
heads of every penalty on it, in closed form. Leave-one-out serves to rank penalties, not to say
how good a head is: to leave an example out makes its class the rarer one, so that on features
without information it is right less often than a guess. Folds have a trace of the same fault,
where a class does not divide by their number; weights that give each fold's training part the
class shares of the whole take it away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special

from flaxtransfer.features.checks import (
    blas_threads,
    checked_examples,
    class_labels,
    singleton_classes,
)
from flaxtransfer.features.logistic import left_singular_vectors
from flaxtransfer.features.ridge import STRENGTHS, checked_strengths

__all__ = [
    "FOLDS",
    "CrossValidation",
    "Split",
    "class_weights",
    "cross_validate",
    "folds_with_singletons",
    "ridge_splits",
    "smallest_class",
    "stratified_folds",
]

FOLDS = 5
"""Folds of every cross-validation, unless something else is asked for."""

FEW = 200
"""With fewer examples the folds are drawn twice: one draw moves the accuracy by a point or two."""


def stratified_folds(labels: Any, folds: int, seed: int = 0) -> np.ndarray:
    """Stratified k-fold cross-validation: the fold of each example.

    Folds differ by at most one example, in total and within every class.

    Args:
        labels: integers ``[examples]``.
        folds: number of folds.
        seed: of the assignment.

    Returns:
        The fold in which each example is held out, int64 ``[examples]``.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels of another shape; a class with fewer examples than folds.

    >>> np.bincount(stratified_folds([0, 0, 0, 1, 1, 1, 1], 3)).tolist()
    [3, 2, 2]
    """
    label = class_labels(labels)
    if label.ndim != 1 or not label.size:
        raise ValueError(f"labels must have shape [examples], one or more, got {label.shape}")
    names, counts = np.unique(label, return_counts=True)
    if small := {int(c): int(n) for c, n in zip(names, counts, strict=True) if n < folds}:
        raise ValueError(
            f"every class must have at least {folds} examples for {folds} folds, got {small}"
        )
    return _assigned(label, folds, seed)


def _assigned(label: np.ndarray, folds: int, seed: int) -> np.ndarray:
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(label))
    # Class after class is assigned in turn; each starts at the fold where the last one ended.
    assigned = np.empty(len(label), np.int64)
    assigned[np.lexsort([keys, label])] = np.arange(len(label)) % folds
    return assigned


def folds_with_singletons(label: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """The fold of each example, with -1 for the only example of a class, which is never held out.

    A class with fewer examples than folds is held out in as many folds as it has examples.

    >>> folds_with_singletons(np.array([0, 0, 1, 2, 2]), 2).tolist().count(-1)
    1
    """
    several = ~np.isin(label, singleton_classes(label))
    assigned = np.full(len(label), -1)
    assigned[several] = _assigned(label[several], folds, seed)
    return assigned


def smallest_class(label: np.ndarray) -> tuple[int, int]:
    """The smallest class with at least two examples, and its size.

    Raises:
        ValueError: every class has one example.

    >>> smallest_class(np.array([0, 0, 0, 1, 1, 2]))
    (1, 2)
    """
    names, counts = np.unique(label, return_counts=True)
    if (counts == 1).all():
        raise ValueError(
            "every class has one example, so that none can be held out; give at least 2 of a "
            "class, or use nearest_class_mean, which needs only one"
        )
    n = np.where(counts > 1, counts, counts.max() + 1).argmin()
    return int(names[n]), int(counts[n])


def class_weights(label: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Weights with which a part of the examples has the class shares of the whole.

    Args:
        label: integers ``[examples]``, 0 .. classes - 1.
        used: bool ``[examples]``, the part; it has an example of each class.

    Returns:
        Float64 ``[examples]``, 0 outside the part, in sum as many as there are in it.

    >>> class_weights(np.array([0, 0, 1, 1]), np.array([True, False, True, True])).tolist()
    [1.5, 0.0, 0.75, 0.75]
    """
    shares = np.bincount(label) / len(label)
    counts = np.maximum(np.bincount(label[used], minlength=len(shares)), 1)
    weights: np.ndarray = np.where(used, (shares * used.sum() / counts)[label], 0.0)
    return weights


class Split(NamedTuple):
    """Ridge heads of every penalty, fitted without one fold.

    Args:
        out: bool ``[examples]``, which are held out.
        coordinates: float64 ``[held out, rank]``, of the held-out examples in the span of the rest.
        values: float64 ``[rank]``, eigenvalues of the Gram matrix of the rest.
        projected: float64 ``[rank, classes]``, of the targets.
        prior: float64 ``[classes]``, what a head without features says.
    """

    out: np.ndarray
    coordinates: np.ndarray
    values: np.ndarray
    projected: np.ndarray
    prior: np.ndarray

    def scores(self, strength: float) -> np.ndarray:
        """Class scores of the held-out examples, float64 ``[held out, classes]``."""
        shrunk = self.projected / (self.values[:, None] + strength)
        scores: np.ndarray = self.coordinates @ shrunk + self.prior
        return scores


def ridge_splits(
    matrix: np.ndarray, label: np.ndarray, number: int, fold_of: np.ndarray
) -> list[Split]:
    """The heads of each fold: every penalty from one decomposition.

    Args:
        matrix: float64 ``[examples, features]``, standardized.
        label: integers ``[examples]``, 0 .. classes - 1.
        number: of classes.
        fold_of: int ``[examples]``; -1 for an example that is never held out.
    """
    splits = []
    with blas_threads(matrix):
        for fold in range(int(fold_of.max()) + 1):
            out = fold_of == fold
            rest, targets = matrix[~out], np.where(label[~out, None] == np.arange(number), 1.0, -1)
            weights = class_weights(label, ~out)[~out, None]
            mean = (weights * rest).sum(axis=0) / weights.sum()
            prior = (weights * targets).sum(axis=0) / weights.sum()
            root = np.sqrt(weights)
            centered = root * (rest - mean)
            values, left = left_singular_vectors(centered)
            coordinates = ((matrix[out] - mean) @ centered.T) @ left
            splits.append(
                Split(out, coordinates, values, left.T @ (root * (targets - prior)), prior)
            )
    return splits


@dataclass(frozen=True)
class CrossValidation:
    """A ridge head on examples that it was not fitted on.

    Args:
        strengths: penalties that were tried, float64 ``[strengths]``.
        errors: mean squared held-out error against targets of -1 and 1, ``[strengths]``.
        best: index of the strength with the smallest error; of equal ones, the largest strength.
        right: how often each held-out example was classified rightly, float64 ``[examples]``: 0 or
            1, or a share where the folds were drawn more than once. 0 for the only one of a class.
        scores: held-out class scores at the best strength, in the first draw of folds, float64
            ``[examples, classes]``; they are not logits.
        held_out: bool ``[examples]``.
        scale: what makes logits of scores: the factor at which they fit best, with targets a
            little less than sure.
        loss: mean negative log-likelihood of the held-out examples with these logits, in nats.
        degrees_of_freedom: of the head at the best strength, from 0 to the number of features:
            the trace of the matrix that maps targets to fitted values.
        folds: how many there were.
        repeats: how often they were drawn.
    """

    strengths: np.ndarray
    errors: np.ndarray
    best: int
    right: np.ndarray
    scores: np.ndarray
    held_out: np.ndarray
    scale: float
    loss: float
    degrees_of_freedom: float
    folds: int
    repeats: int

    @property
    def strength(self) -> float:
        """The best strength."""
        return float(self.strengths[self.best])

    @property
    def accuracy(self) -> float:
        """Held-out accuracy at the best strength."""
        return float(self.right.mean())

    @property
    def standard_error(self) -> float:
        """Binomial, of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))


def cross_validate(
    features: Any,
    labels: Any,
    *,
    classes: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = FOLDS,
    repeats: int | None = None,
    seed: int = 0,
) -> CrossValidation:
    """Held-out accuracy of a ridge head, its penalty chosen by the held-out error.

    Use it to say what a head on frozen features is worth, and to compare features: with one seed
    all have the same folds, so that ``right`` can be compared example by example.

    Args:
        features: ``[examples, features]``, finite; standardize them, because all have the same
            penalty. Computed in float64.
        labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more.
        classes: number of classes; default: the largest label plus 1.
        strengths: penalties, each above 0.
        folds: 2 or more; a class with fewer examples is held out in as many as it has.
        repeats: how often the folds are drawn; by default twice for fewer than 200 examples.
        seed: of the first draw.

    Raises:
        ValueError: as ``ridge_path``; folds below 2, a class without examples, one example of
            every class.
        TypeError: labels that are not integers.

    References:
        M. Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", 1974.
        J. Platt, "Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized
        Likelihood Methods", 1999 (targets that are less than sure).
        G. I. Austin, I. Pe'er, T. Korem, "Distributional Bias Compromises Leave-One-Out
        Cross-Validation", 2024 (why the training parts keep the shares of the classes).

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> cross_validate(random.normal(size=(40, 8)) + 4 * labels[:, None], labels).accuracy
    1.0
    """
    matrix, label, number = checked_examples(features, labels, classes)
    counts = np.bincount(label, minlength=number)
    if missing := np.flatnonzero(counts == 0).tolist():
        raise ValueError(
            f"every class must have an example, classes {missing} have none; renumber the labels"
        )
    smallest_class(label)
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    folds = min(folds, int(counts.max()))
    repeats = (1 if len(label) >= FEW else 2) if repeats is None else repeats
    tried = checked_strengths(len(label), strengths)
    draws = [
        ridge_splits(matrix, label, number, folds_with_singletons(label, folds, seed + n))
        for n in range(repeats)
    ]
    errors = np.zeros(len(tried))
    for split in (split for draw in draws for split in draw):
        targets = np.where(label[split.out, None] == np.arange(number), 1.0, -1.0)
        errors += [np.square(split.scores(strength) - targets).sum() for strength in tried]
    held_out = np.any([split.out for split in draws[0]], axis=0)
    errors /= repeats * held_out.sum() * number
    best = int(np.flatnonzero(errors == errors.min())[np.argmax(tried[errors == errors.min()])])
    drawn = np.zeros((repeats, len(label), number))
    for scores, draw in zip(drawn, draws, strict=True):
        for split in draw:
            scores[split.out] = split.scores(tried[best])
    right = ((drawn.argmax(axis=2) == label) & held_out).mean(axis=0)
    scale, loss = _scaled(drawn[:, held_out].reshape(-1, number), np.tile(label[held_out], repeats))
    freedom = [float((s.values / (s.values + tried[best])).sum()) for s in draws[0]]
    return CrossValidation(
        tried,
        errors,
        best,
        right,
        drawn[0],
        held_out,
        scale,
        loss,
        float(np.mean(freedom)),
        folds,
        repeats,
    )


def _scaled(scores: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """The factor at which scores are the best logits, and their mean loss in nats.

    Where every example is right, no factor is too large. So an example less than sure is asked
    for: one in n + 2 is taken to be of another class.
    """
    doubt = 1 / (len(label) + 2)
    own = np.arange(len(label)), label

    def losses(power: float) -> tuple[float, float]:
        log_probs = scipy.special.log_softmax(math.exp(power) * scores, axis=1)
        right = -float(log_probs[own].mean())
        wrong = (-float(log_probs.sum(axis=1).mean()) - right) / (scores.shape[1] - 1)
        return (1 - doubt) * right + doubt * wrong, right

    found = scipy.optimize.minimize_scalar(
        lambda power: losses(power)[0], bounds=(-5, 5), method="bounded"
    )
    return math.exp(float(found.x)), losses(float(found.x))[1]
