"""What heads on frozen features reach, in seconds and from training labels alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.features.checks import examples, singles
from flaxtransfer.features.folds import deal, rarest
from flaxtransfer.features.means import linear_discriminant
from flaxtransfer.features.ridge import ridge_path
from flaxtransfer.features.standardise import standardisation
from flaxtransfer.features.sweep import sweep_head

__all__ = ["Baseline", "instant_baseline", "nearest_mean_left_out"]

_FOLDS = 5

LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)
"""Of logistic regression; on standardised features a finer grid gains little."""

_DISCRIMINANT_WORK = 5e9
"""Products, examples times features times the fewer of both, that are done within a second."""


@dataclass(frozen=True)
class Baseline:
    """Accuracies on examples that were held out; one for each kind of head.

    Args:
      examples: how many there were.
      majority: share of the largest class.
      nearest_mean: of the nearest class mean, each example left out once.
      ridge: of the best of several ridge classifiers, each example left out once; chosen among
        them, so slightly too high.
      discriminant: of linear discriminant analysis, by folds; None where it was left out.
      logistic: of the best of several logistic regressions, by folds; None where nobody asked.
      seconds: it took, features not included.
      notes: what a reader should know, in sentences.
    """

    examples: int
    majority: float
    nearest_mean: float
    ridge: float
    discriminant: float | None
    logistic: float | None
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> float:
        """The largest of the accuracies."""
        found = (self.nearest_mean, self.ridge, self.discriminant, self.logistic)
        return max(accuracy for accuracy in found if accuracy is not None)

    def __str__(self) -> str:
        heads = {
            "ridge": self.ridge,
            "logistic regression": self.logistic,
            "linear discriminant": self.discriminant,
            "nearest class mean": self.nearest_mean,
        }
        found = ", ".join(
            f"{name} {100 * accuracy:.1f} %"
            for name, accuracy in heads.items()
            if accuracy is not None
        )
        line = (
            f"heads on the frozen features of {self.examples} training images, each held out once: "
            f"{found} (largest class {100 * self.majority:.1f} %); {self.seconds:.1f} s"
        )
        return "\n".join([line, *self.notes])


def instant_baseline(
    features: Any, labels: Any, classes: int | None = None, *, logistic: bool = False
) -> Baseline:
    """Several heads on standardised features, judged on examples that were held out.

    Use it before any training: what a fine-tuned network does not beat was not worth the time.
    Nearest class mean and ridge leave out examples one by one, in closed form. Discriminant
    analysis goes by five folds, and is left out where it would take more than about a second. No
    test image is needed, nor should one be given.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1. Classes without examples have no say; the
        only example of a class counts as wrong.
      classes: how many there are; by default as many as the labels say.
      logistic: also try logistic regression by five folds; it has to be compiled, for seconds.

    Raises:
      ValueError: fewer than three examples, one class, one example of every class, values that are
        not finite, shapes that do not fit.
      TypeError: labels that are no integers.

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> found = instant_baseline(random.normal(size=(40, 8)) + 4 * labels[:, None], labels)
    >>> found.ridge, found.nearest_mean, found.majority
    (1.0, 1.0, 0.5)
    """
    began = time.perf_counter()
    matrix, label, number = examples(features, labels, classes)
    present, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    folds = min(_FOLDS, rarest(label)[1])
    notes = []
    if len(present) < number:
        notes.append(f"{number - len(present)} of {number} classes have no example.")
    if single := singles(label):
        notes.append(f"{len(single)} classes have one example, which counts as wrong.")
    matrix = standardisation(matrix)(matrix)
    path = ridge_path(matrix, label)
    work = matrix.size * min(matrix.shape)
    discriminant = _discriminant(matrix, label, folds) if work <= _DISCRIMINANT_WORK else None
    swept = None
    if logistic:
        found = sweep_head(
            matrix, label, strengths=LOGISTIC_STRENGTHS, folds=folds, standardise=False
        )
        swept = found.accuracy * (1 - len(single) / len(label))
    return Baseline(
        len(label),
        float(counts.max() / len(label)),
        float((nearest_mean_left_out(matrix, label) == label).mean()),
        path.accuracy,
        discriminant,
        swept,
        time.perf_counter() - began,
        tuple(notes),
    )


def nearest_mean_left_out(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each example the class whose mean is nearest, its own computed without it.

    The only example of a class leaves no mean behind and is taken for another class.

    Args:
      features: floating ``[examples, features]``.
      labels: integers ``[examples]``.

    Returns:
      Classes, int64 ``[examples]``.

    >>> nearest_mean_left_out(np.array([[0.0], [1.0], [9.0], [10.0], [4.0]]), [0, 0, 1, 1, 2])
    array([0, 0, 1, 1, 0])
    """
    matrix = np.asarray(features, np.float64)
    present, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(present), matrix.shape[1]))
    np.add.at(means, label, matrix)
    means /= counts[:, None]
    squares = np.square(matrix).sum(axis=1)[:, None] + np.square(means).sum(axis=1)
    distances = squares - 2 * matrix @ means.T
    # Without the example its class's mean is m + (m - x) / (n - 1), and n / (n - 1) as far from x.
    own = np.arange(len(matrix)), label
    count = counts[label]
    others = np.maximum(count - 1, 1)
    distances[own] = np.where(count > 1, distances[own] * np.square(count / others), np.inf)
    return present[distances.argmin(axis=1)]


def _discriminant(matrix: np.ndarray, label: np.ndarray, folds: int) -> float | None:
    """Accuracy by folds; None where features do not vary within the classes."""
    dealt = deal(label, folds)
    right = 0
    for fold in range(folds):
        out = dealt == fold
        try:
            head = linear_discriminant(matrix[~out], label[~out])
        except ValueError:
            # Then nearest_mean is what discriminant analysis would come to.
            return None
        right += int((head.predict(matrix[out]) == label[out]).sum())
    return right / len(label)
