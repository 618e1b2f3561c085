"""Heads from class means alone: nearest class mean and linear discriminant analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from flaxtransfer.features.checks import examples, matching

__all__ = ["MeansHead", "linear_discriminant", "nearest_mean"]


@dataclass(frozen=True)
class MeansHead:
    """A linear classifier made of class means.

    Args:
      kernel: float64 ``[features, classes]``.
      bias: float64 ``[classes]``.
      normalised: whether every example is scaled to length 1 first.
      shrinkage: of the covariance, 0 .. 1; None without a covariance.
    """

    kernel: np.ndarray
    bias: np.ndarray
    normalised: bool = False
    shrinkage: float | None = None

    def scores(self, features: Any) -> np.ndarray:
        """``[examples, classes]``, the largest of which is the prediction.

        With ``linear_discriminant`` they are logits: log-probabilities up to a shift. With
        ``nearest_mean`` they are half the squared distances, negative and up to a shift.

        Raises:
          ValueError: another number of features, or an example of length 0 to be normalised.
        """
        matrix = matching(features, len(self.kernel))
        return (_normalised(matrix) if self.normalised else matrix) @ self.kernel + self.bias

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        return self.scores(features).argmax(axis=1)


def nearest_mean(
    features: Any, labels: Any, *, normalise: bool = False, classes: int | None = None
) -> MeansHead:
    """The class whose mean is nearest, by Euclidean distance.

    Use it with one to ten examples a class, where there is nothing to fit, and as the least that
    any other head has to beat. It takes all features as equally telling and independent.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1.
      normalise: scale each example to length 1 first, and each mean after averaging: the class of
        the largest cosine.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, one class, a class without
        examples, an example or mean of length 0 to be normalised.
      TypeError: labels that are no integers.

    References:
      T. Mensink, J. Verbeek, F. Perronnin, G. Csurka, "Distance-Based Image Classification:
      Generalizing to New Classes at Near-Zero Cost", 2013.

    >>> head = nearest_mean([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]], [0, 0, 1])
    >>> head.predict([[1.0, 4.0], [1.0, 5.0]]).tolist()
    [0, 1]
    """
    matrix, label, counts = _checked(features, labels, classes)
    if normalise:
        matrix = _normalised(matrix)
    means = _means(matrix, label, counts)
    if normalise:
        means = _normalised(means, "class means")
    return MeansHead(means.T, -np.square(means).sum(axis=1) / 2, normalised=normalise)


def linear_discriminant(
    features: Any,
    labels: Any,
    *,
    shrinkage: float | None = None,
    classes: int | None = None,
) -> MeansHead:
    """Linear discriminant analysis: nearest class mean by the covariance within the classes.

    Use it from about ten examples a class. Its scores are logits, whose prior is the frequency of
    the classes among the examples. Without shrinkage the covariance has to be of full rank; with
    fewer examples than features it cannot be, and the shrunk covariance is inverted by way of the
    examples instead, which is exact.

    Args:
      features: ``[examples, features]``, finite. Computed in float64.
      labels: integers ``[examples]``, 0 .. classes - 1.
      shrinkage: how far the covariance is moved to a multiple of the identity of equal trace, 0 to
        1. Default: by Ledoit and Wolf, from all examples less the mean of their class.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: as ``nearest_mean``; a shrinkage outside 0 .. 1, a covariance that is singular, or
        no variance within the classes.
      TypeError: labels that are no integers.

    References:
      R. A. Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936. O. Ledoit,
      M. Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", 2004.

    >>> head = linear_discriminant([[0.0, 0], [2, 2], [5, 0], [7, 2.1]], [0, 0, 1, 1], shrinkage=0)
    >>> head.predict([[3.0, 1.9], [3.0, 0.0]]).tolist()
    [0, 1]
    """
    matrix, label, counts = _checked(features, labels, classes)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage}, wanted 0 to 1")
    means = _means(matrix, label, counts)
    within = matrix - means[label]
    variance = np.square(within).sum() / within.size
    # What is left of a constant after its mean was taken off is rounding, not variance.
    if variance <= (10 * np.finfo(np.float64).eps) ** 2 * np.square(matrix).sum() / matrix.size:
        raise ValueError(
            "the features do not vary within the classes, so there is no covariance to go by; "
            "nearest_mean needs none"
        )
    # Of both Gram matrices the smaller one; their Frobenius norms are the same.
    few = len(matrix) < matrix.shape[1]
    gram = (within @ within.T if few else within.T @ within) / len(matrix)
    if shrinkage is None:
        shrinkage = _ledoit_wolf(within, gram, variance)
    kernel = _solve(within, gram, means.T, shrinkage, variance, few=few)
    bias = np.log(counts / counts.sum()) - (means.T * kernel).sum(axis=0) / 2
    return MeansHead(kernel, bias, shrinkage=shrinkage)


def _ledoit_wolf(within: np.ndarray, gram: np.ndarray, variance: float) -> float:
    count, width = within.shape
    squared = np.square(gram).sum()
    fourth = np.square(np.square(within).sum(axis=1)).mean()
    distance = squared / width - variance**2
    noise = (fourth - squared) / (width * count)
    return float(min(noise / distance, 1.0)) if distance > 0 else 1.0


def _solve(
    within: np.ndarray,
    gram: np.ndarray,
    means: np.ndarray,
    shrinkage: float,
    variance: float,
    *,
    few: bool,
) -> np.ndarray:
    """The shrunk covariance's inverse times the means ``[features, classes]``."""
    ridge = shrinkage * variance
    system = (1 - shrinkage) * gram + ridge * np.eye(len(gram))
    largest = (1 - shrinkage) * np.trace(gram) + ridge
    if not ridge > 1e-13 * largest:
        values = scipy.linalg.eigvalsh(gram) if not few else np.zeros(1)
        if values[0] <= 1e-12 * values[-1]:
            raise ValueError(
                f"the covariance of {means.shape[0]} features within {means.shape[1]} classes is "
                f"singular with {len(within)} examples (or repeated features): shrinkage is "
                f"{shrinkage}, wanted above 0, or None to have it estimated"
            )
    if not few:
        return scipy.linalg.solve(system, means, assume_a="pos")
    # (a C'C/n + b I)^-1 = (I - a/n C' (a CC'/n + b I)^-1 C) / b
    inner = scipy.linalg.solve(system, within @ means, assume_a="pos")
    return (means - (1 - shrinkage) / len(within) * within.T @ inner) / ridge


def _means(matrix: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return (np.eye(len(counts))[label].T @ matrix) / counts[:, None]


def _normalised(matrix: np.ndarray, what: str = "examples") -> np.ndarray:
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if zero := np.flatnonzero(lengths == 0).tolist():
        raise ValueError(
            f"{what} {zero[:5]} have length 0 and no direction; normalise=False takes them"
        )
    return matrix / lengths


def _checked(
    features: Any, labels: Any, classes: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in float64, labels, and how many there are of each."""
    matrix, label, number = examples(features, labels, classes)
    counts = np.bincount(label, minlength=number)
    if missing := np.flatnonzero(counts == 0).tolist():
        raise ValueError(f"classes {missing} have no examples, so no mean; number the labels anew")
    return matrix, label, counts
