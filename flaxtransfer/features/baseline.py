"""What heads on frozen features reach, in a second and from training labels alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.features.ridge import ridge_path
from flaxtransfer.features.standardise import standardisation

__all__ = ["Baseline", "instant_baseline", "nearest_mean_left_out"]


@dataclass(frozen=True)
class Baseline:
    """Accuracies on examples that were left out one by one.

    Args:
      examples: how many there were.
      majority: share of the largest class.
      nearest_mean: of the nearest class mean.
      ridge: of the best of several ridge classifiers; chosen among them, so slightly too high.
      seconds: it took, features not included.
    """

    examples: int
    majority: float
    nearest_mean: float
    ridge: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"heads on the frozen features of {self.examples} training images, each left out once: "
            f"ridge {100 * self.ridge:.1f} %, nearest class mean {100 * self.nearest_mean:.1f} % "
            f"(largest class {100 * self.majority:.1f} %)"
        )


def instant_baseline(features: Any, labels: Any, classes: int | None = None) -> Baseline:
    """Nearest class mean and ridge on standardised features, both with exact leave-one-out.

    Use it before any training: what a fine-tuned network does not beat was not worth the time.
    Nothing is fitted twice and no test image is needed.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: fewer than three examples, one class, values that are not finite, shapes that do
        not fit.
      TypeError: labels that are no integers.

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> found = instant_baseline(random.normal(size=(40, 8)) + 4 * labels[:, None], labels)
    >>> found.ridge, found.nearest_mean, found.majority
    (1.0, 1.0, 0.5)
    """
    began = time.perf_counter()
    matrix = standardisation(features)(features)
    path = ridge_path(matrix, labels, classes=classes)
    label = np.asarray(labels)
    right = nearest_mean_left_out(matrix, label) == label
    return Baseline(
        len(label),
        float(np.bincount(label).max() / len(label)),
        float(right.mean()),
        path.accuracy,
        time.perf_counter() - began,
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
