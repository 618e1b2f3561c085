"""Ridge classification.

Least squares on targets of -1 and 1, in closed form: every penalty from one decomposition, with
exact leave-one-out errors. What a head is worth is for ``features.folds`` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.features.checks import blas_threads, checked_examples, checked_features
from flaxtransfer.features.logistic import left_singular_vectors

__all__ = ["STRENGTHS", "RidgePath", "checked_strengths", "ridge_path"]


STRENGTHS = tuple(float(value) for value in np.logspace(-3, 6, 19))
"""Penalties for any number of standardized features, half a decade apart."""

_BATCH_SCORES = 2**23
"""Scores held in memory; penalties that make more are computed in batches."""


@dataclass(frozen=True)
class RidgePath:
    """Ridge classifiers of several penalties, with their leave-one-out errors.

    Args:
        strengths: float64 ``[strengths]``.
        errors: mean squared leave-one-out error against targets of -1 and 1, ``[strengths]``.
        accuracies: leave-one-out accuracy, ``[strengths]``. It ranks; as a number it is too low
            where features say little, down to 0 for balanced classes and features of no use:
            ``cross_validate`` has the number.
        best: index of the strength with the smallest error; of equal ones, the largest strength.
        kernel: float64 ``[features, classes]`` of the best strength, refitted on all examples.
        bias: float64 ``[classes]``.
        left_out: leave-one-out scores at the best strength, float64 ``[examples, classes]``.
    """

    strengths: np.ndarray
    errors: np.ndarray
    accuracies: np.ndarray
    best: int
    kernel: np.ndarray
    bias: np.ndarray
    left_out: np.ndarray

    @property
    def strength(self) -> float:
        """The best strength."""
        return float(self.strengths[self.best])

    @property
    def accuracy(self) -> float:
        """Leave-one-out accuracy at the best strength; see ``accuracies``."""
        return float(self.accuracies[self.best])

    def scores(self, features: Any) -> np.ndarray:
        """Class scores ``[examples, classes]``; the largest is the prediction. They are not logits.

        Raises:
            ValueError: another number of features.
        """
        scores: np.ndarray = checked_features(features, len(self.kernel)) @ self.kernel + self.bias
        return scores

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        predicted: np.ndarray = self.scores(features).argmax(axis=1)
        return predicted


def ridge_path(
    features: Any,
    labels: Any,
    strengths: Sequence[float] = STRENGTHS,
    *,
    classes: int | None = None,
) -> RidgePath:
    """Ridge classification, for every penalty at once.

    Use it as a fast baseline and to initialize a head: least squares on targets of -1 and 1 with an
    L2 penalty on the kernel and none on the bias. One eigendecomposition of the smaller Gram matrix
    serves all penalties; leave-one-out errors follow from residuals and leverages, without fitting
    again. Constant and repeated features are harmless: a direction without variance gets no weight.

    Args:
        features: ``[examples, features]``, finite; standardize them, because all have
            the same penalty. Computed in float64.
        labels: integers ``[examples]``, 0 .. classes - 1.
        strengths: penalties, each above 0.
        classes: number of classes; default: the largest label plus 1.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, one class, fewer than three
            examples, strengths that are not above 0.
        TypeError: labels that are not integers.

    References:
        R. Rifkin, R. Lippert, "Notes on Regularized Least Squares", 2007 (all strengths from one
        decomposition). D. M. Allen, "The Relationship Between Variable Selection and Data
        Augmentation and a Method for Prediction", 1974 (leave-one-out by leverage).

    >>> random = np.random.default_rng(0)
    >>> labels = np.arange(40) % 2
    >>> path = ridge_path(random.normal(size=(40, 200)) + 2 * labels[:, None], labels)
    >>> path.accuracy
    1.0
    """
    matrix, label, number = checked_examples(features, labels, classes)
    penalties = checked_strengths(len(matrix), strengths)
    with blas_threads(matrix):
        return _ridge_path(matrix, label, number, penalties)


def _ridge_path(
    matrix: np.ndarray, label: np.ndarray, number: int, penalties: np.ndarray
) -> RidgePath:
    targets = np.where(label[:, None] == np.arange(number), 1.0, -1.0)
    mean, target_mean = matrix.mean(axis=0), targets.mean(axis=0)
    centered, residual = matrix - mean, targets - target_mean

    values, left = left_singular_vectors(centered)
    projected = left.T @ residual
    shrunk = values[:, None] / (values[:, None] + penalties)  # [rank, strengths]
    complement = 1 - 1 / len(matrix) - np.square(left) @ shrunk  # 1 - leverage, same shape

    def loo_errors(chosen: slice | list[int]) -> np.ndarray:
        """Leave-one-out errors, ``[examples, strengths, classes]``."""
        coordinates = (shrunk[:, chosen, None] * projected[:, None]).reshape(len(values), -1)
        fitted = (left @ coordinates).reshape(len(matrix), -1, number)
        found: np.ndarray = (residual[:, None] - fitted) / complement[:, chosen, None]
        return found

    errors, accuracies = np.empty(len(penalties)), np.empty(len(penalties))
    size = max(1, _BATCH_SCORES // targets.size)
    for start in range(0, len(penalties), size):
        part = slice(start, start + size)
        batch_errors = loo_errors(part)
        errors[part] = np.square(batch_errors).mean(axis=(0, 2))
        predicted = (targets[:, None] - batch_errors).argmax(axis=2)
        accuracies[part] = (predicted == label[:, None]).mean(axis=0)
    best = int(np.flatnonzero(errors == errors.min())[np.argmax(penalties[errors == errors.min()])])
    # kernel = X' U (values + strength)^-1 U' Y, in which X' U is V sqrt(values).
    kernel = centered.T @ (left @ (projected / (values[:, None] + penalties[best])))
    left_out = targets - loo_errors([best])[:, 0]
    bias = target_mean - mean @ kernel
    return RidgePath(penalties, errors, accuracies, best, kernel, bias, left_out)


def checked_strengths(count: int, strengths: Sequence[float]) -> np.ndarray:
    """Penalties above 0, float64 ``[strengths]``."""
    penalties = np.asarray(strengths, np.float64)
    if count < 3:
        raise ValueError(f"leave-one-out must have at least 3 examples, got {count}")
    if penalties.ndim != 1 or not penalties.size or not (penalties > 0).all():
        raise ValueError(f"strengths must be > 0, one or more, got {penalties.tolist()}")
    return penalties
