"""Heads from class means, and the instant baseline of heads on frozen features.

Heads from class means alone: nearest class mean and linear discriminant analysis.

What heads on frozen features reach, in seconds and from training labels alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from flaxtransfer.features.checks import examples, matching, singles, standardization
from flaxtransfer.features.ridge import ridge_path
from flaxtransfer.features.sweep import deal, rarest, sweep_head

__all__ = [
    "Baseline",
    "MeansHead",
    "baseline",
    "linear_discriminant",
    "nearest_class_mean",
    "nearest_mean_left_out",
]


@dataclass(frozen=True)
class MeansHead:
    """A linear classifier made of class means.

    Args:
      kernel: float64 ``[features, classes]``.
      bias: float64 ``[classes]``.
      normalized: whether every example is scaled to length 1 first.
      shrinkage: of the covariance, 0 .. 1; None without a covariance.
    """

    kernel: np.ndarray
    bias: np.ndarray
    normalized: bool = False
    shrinkage: float | None = None

    def scores(self, features: Any) -> np.ndarray:
        """``[examples, classes]``, the largest of which is the prediction.

        With ``linear_discriminant`` they are logits: log-probabilities up to a shift. With
        ``nearest_class_mean`` they are half the squared distances, negative and up to a shift.

        Raises:
          ValueError: another number of features, or an example of length 0 to be normalized.
        """
        matrix = matching(features, len(self.kernel))
        return (_normalized(matrix) if self.normalized else matrix) @ self.kernel + self.bias

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        return self.scores(features).argmax(axis=1)


def nearest_class_mean(
    features: Any, labels: Any, *, normalize: bool = False, classes: int | None = None
) -> MeansHead:
    """The class whose mean is nearest, by Euclidean distance.

    Use it with one to ten examples a class, where there is nothing to fit, and as the least that
    any other head has to beat. It takes all features as equally telling and independent.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1.
      normalize: scale each example to length 1 first, and each mean after averaging: the class of
        the largest cosine.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, one class, a class without
        examples, an example or mean of length 0 to be normalized.
      TypeError: labels that are no integers.

    References:
      T. Mensink, J. Verbeek, F. Perronnin, G. Csurka, "Distance-Based Image Classification:
      Generalizing to New Classes at Near-Zero Cost", 2013.

    >>> head = nearest_class_mean([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]], [0, 0, 1])
    >>> head.predict([[1.0, 4.0], [1.0, 5.0]]).tolist()
    [0, 1]
    """
    matrix, label, counts = _checked(features, labels, classes)
    if normalize:
        matrix = _normalized(matrix)
    means = _means(matrix, label, counts)
    if normalize:
        means = _normalized(means, "class means")
    return MeansHead(means.T, -np.square(means).sum(axis=1) / 2, normalized=normalize)


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
      ValueError: as ``nearest_class_mean``; a shrinkage outside 0 .. 1, a singular covariance, or
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
            "nearest_class_mean needs none"
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


def _normalized(matrix: np.ndarray, what: str = "examples") -> np.ndarray:
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if zero := np.flatnonzero(lengths == 0).tolist():
        raise ValueError(
            f"{what} {zero[:5]} have length 0 and no direction; normalize=False takes them"
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


_FOLDS = 5

LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)
"""Of logistic regression; on standardized features a finer grid gains little."""

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
    nearest_class_mean: float
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


def baseline(
    features: Any, labels: Any, classes: int | None = None, *, logistic: bool = False
) -> Baseline:
    """Several heads on standardized features, judged on examples that were held out.

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
    >>> found = baseline(random.normal(size=(40, 8)) + 4 * labels[:, None], labels)
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
    matrix = standardization(matrix)(matrix)
    path = ridge_path(matrix, label)
    work = matrix.size * min(matrix.shape)
    discriminant = _discriminant(matrix, label, folds) if work <= _DISCRIMINANT_WORK else None
    swept = None
    if logistic:
        found = sweep_head(
            matrix, label, strengths=LOGISTIC_STRENGTHS, folds=folds, standardize=False
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
