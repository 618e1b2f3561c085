"""Class-mean classifiers and the feature baseline.

Nearest class mean and linear discriminant analysis on features of a frozen network, and
``baseline``, which says within seconds what accuracy such heads reach. Use the baseline before any
training.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg

from flaxtransfer.features.inputs import (
    blas_threads,
    checked_examples,
    checked_features,
    folds_with_singletons,
    singleton_classes,
    standardization,
)
from flaxtransfer.features.ridge import cross_validate
from flaxtransfer.features.sweep import sweep_head
from flaxtransfer.paths import listing
from flaxtransfer.shift.two_sample import ledoit_wolf

__all__ = [
    "Baseline",
    "MeansHead",
    "baseline",
    "linear_discriminant",
    "nearest_class_mean",
]


LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)
"""Strengths for logistic regression; on standardized features a finer grid gains little."""

_DISCRIMINANT_WORK = 5e9
"""Multiplications that take about a second: examples x features x the smaller of both."""


@dataclass(frozen=True)
class MeansHead:
    """A linear classifier computed from class means.

    Args:
        kernel: float64 ``[features, classes]``.
        bias: float64 ``[classes]``.
        normalized: whether each example is first scaled to length 1.
        shrinkage: intensity of the covariance shrinkage, 0 .. 1; None without a covariance.
    """

    kernel: np.ndarray
    bias: np.ndarray
    normalized: bool = False
    shrinkage: float | None = None

    def scores(self, features: Any) -> np.ndarray:
        """Class scores ``[examples, classes]``; the largest is the prediction.

        With ``linear_discriminant`` they are logits: log-probabilities up to a constant. With
        ``nearest_class_mean`` they are minus half the squared distances, up to a constant.

        Raises:
            ValueError: another number of features, or an example of length 0 to be normalized.
        """
        matrix = checked_features(features, len(self.kernel))
        if self.normalized:
            matrix = _unit_rows(matrix)
        scores: np.ndarray = matrix @ self.kernel + self.bias
        return scores

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        predicted: np.ndarray = self.scores(features).argmax(axis=1)
        return predicted


def nearest_class_mean(
    features: Any, labels: Any, *, normalize: bool = False, classes: int | None = None
) -> MeansHead:
    """Nearest class mean classifier, by Euclidean distance.

    Use it with one to ten examples per class, where there is nothing to fit, and as a lower bound
    for other heads. It assumes that all features are independent and equally informative.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1.
        normalize: scale each example to length 1 first, and each mean after averaging; this
            predicts the class with the largest cosine similarity.
        classes: number of classes; default: the largest label plus 1.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, one class, a class without
            examples, an example or mean of length 0 to be normalized.
        TypeError: labels that are not integers.

    References:
        T. Mensink, J. Verbeek, F. Perronnin, G. Csurka, "Distance-Based Image Classification:
        Generalizing to New Classes at Near-Zero Cost", 2013.

    >>> head = nearest_class_mean([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]], [0, 0, 1])
    >>> head.predict([[1.0, 4.0], [1.0, 5.0]]).tolist()
    [0, 1]
    """
    matrix, label, counts = _checked_counts(features, labels, classes)
    if normalize:
        matrix = _unit_rows(matrix)
    means = _means(matrix, label, counts)
    if normalize:
        means = _unit_rows(means, "class means")
    return MeansHead(means.T, -np.square(means).sum(axis=1) / 2, normalized=normalize)


def linear_discriminant(
    features: Any,
    labels: Any,
    *,
    shrinkage: float | None = None,
    classes: int | None = None,
) -> MeansHead:
    """Linear discriminant analysis with a shared, shrunk within-class covariance.

    Use it from about ten examples per class. Its scores are logits, whose prior is the class
    frequencies of the examples. Without shrinkage the covariance must have full rank, which is
    impossible with fewer examples than features; there the shrunk covariance is inverted through
    the Gram matrix of the examples, which is exact.

    Args:
        features: ``[examples, features]``, finite. Computed in float64.
        labels: integers ``[examples]``, 0 .. classes - 1.
        shrinkage: how far the covariance is moved to a multiple of the identity of equal trace, 0
            to 1. Default: by Ledoit and Wolf, from all examples minus the mean of their class.
        classes: number of classes; default: the largest label plus 1.

    Raises:
        ValueError: as ``nearest_class_mean``; a shrinkage outside 0 .. 1, a singular covariance, or
            no variance within the classes.
        TypeError: labels that are not integers.

    References:
        R. A. Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936. O. Ledoit, M.
        Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices", 2004.

    >>> head = linear_discriminant([[0.0, 0], [2, 2], [5, 0], [7, 2.1]], [0, 0, 1, 1], shrinkage=0)
    >>> head.predict([[3.0, 1.9], [3.0, 0.0]]).tolist()
    [0, 1]
    """
    matrix, label, counts = _checked_counts(features, labels, classes)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be 0 to 1, got {shrinkage}")
    means = _means(matrix, label, counts)
    within = matrix - means[label]
    variance = np.square(within).sum() / within.size
    # A constant minus its mean leaves rounding, not variance.
    if variance <= (10 * np.finfo(np.float64).eps) ** 2 * np.square(matrix).sum() / matrix.size:
        raise ValueError(
            "the features are constant within the classes, so that there is no covariance; "
            "nearest_class_mean needs none"
        )
    # Use the smaller of the two Gram matrices.
    few = len(matrix) < matrix.shape[1]
    gram = (within @ within.T if few else within.T @ within) / len(matrix)
    if shrinkage is None:
        shrinkage, _ = ledoit_wolf(within)
    kernel = _solve(within, gram, means.T, shrinkage, variance, few=few)
    bias = np.log(counts / counts.sum()) - (means.T * kernel).sum(axis=0) / 2
    return MeansHead(kernel, bias, shrinkage=shrinkage)


def expected_error(accuracy: float, examples: int) -> float:
    """The share of new examples that will be wrong, expected after a held-out accuracy.

    The posterior mean after Jeffreys' prior, so that ten right ones of ten do not promise
    perfection: below one point takes 50 examples, all of them right.

    References:
        H. Jeffreys, "An Invariant Form for the Prior Probability in Estimation Problems", 1946.

    >>> expected_error(1.0, 9), round(expected_error(357 / 360, 360), 4)
    (0.05, 0.0097)
    """
    return (round((1 - accuracy) * examples) + 0.5) / (examples + 1)


def leaves_nothing(accuracy: float, examples: int, majority: float) -> bool:
    """Whether training could gain less than a point over a held-out accuracy.

    Where one class has more than half of the examples, less than its share of a point: to name
    nothing else is right nearly always there.

    Args:
        accuracy: held out.
        examples: that it was judged on.
        majority: share of the largest class.

    >>> leaves_nothing(0.995, 1000, 0.1), leaves_nothing(0.995, 1000, 0.95)
    (True, False)
    """
    return expected_error(accuracy, examples) < 0.01 * min(1.0, 2 * (1 - majority))


@dataclass(frozen=True)
class Baseline:
    """Accuracies of heads on held-out examples.

    Args:
        examples: number of examples.
        majority: fraction of the largest class.
        nearest_class_mean: of the nearest class mean.
        ridge: of the ridge classifier with the smallest held-out error of several.
        discriminant: of linear discriminant analysis; None if left out.
        logistic: of the best of several logistic regressions; None unless it was asked for.
        seconds: time taken, without that for the features.
        notes: remarks on the data, in sentences.
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
    def left(self) -> float:
        """Share of new images that a ridge head is expected to get wrong: all there is to gain."""
        return expected_error(self.ridge, self.examples)

    @property
    def best(self) -> float:
        """The largest accuracy."""
        found = (self.nearest_class_mean, self.ridge, self.discriminant, self.logistic)
        return max(accuracy for accuracy in found if accuracy is not None)

    def __str__(self) -> str:
        heads = {
            "ridge": self.ridge,
            "logistic regression": self.logistic,
            "linear discriminant": self.discriminant,
            "nearest class mean": self.nearest_class_mean,
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
    features: Any,
    labels: Any,
    classes: int | None = None,
    *,
    logistic: bool = False,
    groups: Sequence[Any] | None = None,
) -> Baseline:
    """Feature baseline: accuracy of several heads on held-out examples.

    Use it before any training: a fine-tuned network that does not beat it was not worth the time.
    Features are standardized, and all heads are judged on the same five stratified folds.
    Discriminant analysis is left out if it would take more than about a second. Give training
    examples only: no test image is needed.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1. Classes without examples are ignored;
            the only example of a class counts as wrong.
        classes: number of classes; default: the largest label plus 1.
        logistic: also try logistic regression with five folds; compiling it takes seconds.
        groups: ``[examples]``, such as patients, each of which is held out as a whole; not by
            logistic regression.

    Raises:
        ValueError: fewer than three examples, one class, one example of every class, values that
            are not finite, shapes that do not fit.
        TypeError: labels that are not integers.

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> found = baseline(random.normal(size=(40, 8)) + 4 * labels[:, None], labels)
    >>> found.ridge, found.nearest_class_mean, found.majority
    (1.0, 1.0, 0.5)
    """
    began = time.perf_counter()
    matrix, label, number = checked_examples(features, labels, classes)
    present, label, counts = np.unique(label, return_inverse=True, return_counts=True)
    notes = []
    if len(present) < number:
        notes.append(f"{number - len(present)} of {number} classes have no example.")
    if single := singleton_classes(label):
        notes.append(f"{len(single)} classes have one example, which counts as wrong.")
    matrix = standardization(matrix)(matrix)
    ridge = cross_validate(matrix, label, groups=groups)
    fold_of = folds_with_singletons(label, ridge.folds, groups=groups)
    work = matrix.size * min(matrix.shape)
    discriminant = None
    if work <= _DISCRIMINANT_WORK:
        # Where features are constant within the classes it would be the nearest class mean.
        with contextlib.suppress(ValueError), blas_threads(matrix):
            discriminant = _held_out(linear_discriminant, matrix, label, fold_of)
    logistic_accuracy = None
    if logistic:
        found = sweep_head(matrix, label, strengths=LOGISTIC_STRENGTHS, standardize=False)
        logistic_accuracy = found.accuracy * (1 - len(single) / len(label))
    return Baseline(
        len(label),
        float(counts.max() / len(label)),
        _held_out(partial(nearest_class_mean, normalize=False), matrix, label, fold_of),
        ridge.accuracy,
        discriminant,
        logistic_accuracy,
        time.perf_counter() - began,
        tuple(notes),
    )


def _solve(
    within: np.ndarray,
    gram: np.ndarray,
    means: np.ndarray,
    shrinkage: float,
    variance: float,
    *,
    few: bool,
) -> np.ndarray:
    """The inverse of the shrunk covariance times the means ``[features, classes]``."""
    ridge = shrinkage * variance
    system = (1 - shrinkage) * gram + ridge * np.eye(len(gram))
    largest = (1 - shrinkage) * np.trace(gram) + ridge
    if not ridge > 1e-13 * largest:
        values = scipy.linalg.eigvalsh(gram) if not few else np.zeros(1)
        if values[0] <= 1e-12 * values[-1]:
            raise ValueError(
                f"the covariance of {means.shape[0]} features within {means.shape[1]} classes is "
                f"singular with {len(within)} examples (or repeated features): shrinkage must be "
                f"> 0, or None to estimate it, got {shrinkage}"
            )
    if not few:
        direct: np.ndarray = scipy.linalg.solve(system, means, assume_a="pos")
        return direct
    # (a C'C/n + b I)^-1 = (I - a/n C' (a CC'/n + b I)^-1 C) / b
    inner = scipy.linalg.solve(system, within @ means, assume_a="pos")
    solved: np.ndarray = (means - (1 - shrinkage) / len(within) * within.T @ inner) / ridge
    return solved


def _means(matrix: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    means: np.ndarray = (np.eye(len(counts))[label].T @ matrix) / counts[:, None]
    return means


def _unit_rows(matrix: np.ndarray, what: str = "examples") -> np.ndarray:
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if zero := np.flatnonzero(lengths == 0).tolist():
        raise ValueError(
            f"{what} [{listing(map(str, zero))}] have length 0, so that they have no direction; "
            "use normalize=False"
        )
    unit: np.ndarray = matrix / lengths
    return unit


def _checked_counts(
    features: Any, labels: Any, classes: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features in float64, labels, and the number of examples per class."""
    matrix, label, number = checked_examples(features, labels, classes)
    counts = np.bincount(label, minlength=number)
    if missing := np.flatnonzero(counts == 0).tolist():
        raise ValueError(
            f"every class must have an example, classes {missing} have none; renumber the labels"
        )
    return matrix, label, counts


def _held_out(
    fit: Callable[[np.ndarray, np.ndarray], MeansHead],
    matrix: np.ndarray,
    label: np.ndarray,
    fold_of: np.ndarray,
) -> float:
    """The accuracy of a head on the examples of each fold, fitted without them."""
    right = 0
    for fold in range(int(fold_of.max()) + 1):
        out = fold_of == fold
        right += int((fit(matrix[~out], label[~out]).predict(matrix[out]) == label[out]).sum())
    return right / len(label)
