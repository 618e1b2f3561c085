"""Ridge classification in closed form: every strength at once, with exact leave-one-out errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

__all__ = ["RidgePath", "ridge_path"]

STRENGTHS = tuple(float(value) for value in np.logspace(-3, 6, 19))
"""Strengths that suit standardised features of any number, half a decade apart."""

_NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue below which a direction is rounding, in float64."""


@dataclass(frozen=True)
class RidgePath:
    """A linear classifier for each strength, and what each is worth on examples left out.

    Args:
      strengths: float64 ``[strengths]``.
      errors: mean squared leave-one-out error against targets of -1 and 1, ``[strengths]``.
      accuracies: leave-one-out accuracy, ``[strengths]``.
      best: index of the strength with the smallest error, the largest such strength of equals.
      kernel: float64 ``[features, classes]`` of the best strength, refitted on all examples.
      bias: float64 ``[classes]``.
    """

    strengths: np.ndarray
    errors: np.ndarray
    accuracies: np.ndarray
    best: int
    kernel: np.ndarray
    bias: np.ndarray

    @property
    def strength(self) -> float:
        """The best strength."""
        return float(self.strengths[self.best])

    @property
    def accuracy(self) -> float:
        """Leave-one-out accuracy at the best strength; chosen among all, so slightly too high."""
        return float(self.accuracies[self.best])

    def scores(self, features: Any) -> np.ndarray:
        """``[examples, classes]``, the largest of which is the prediction; not log-probabilities.

        Raises:
          ValueError: another number of features.
        """
        matrix = np.asarray(features, np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != len(self.kernel):
            raise ValueError(
                f"features have shape {matrix.shape}, wanted [examples, {len(self.kernel)}]"
            )
        return matrix @ self.kernel + self.bias

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        return self.scores(features).argmax(axis=1)


def ridge_path(
    features: Any,
    labels: Any,
    strengths: Sequence[float] = STRENGTHS,
    *,
    classes: int | None = None,
) -> RidgePath:
    """Fits every strength from one decomposition.

    Use it as an instant baseline and to start a head: least squares on targets of -1 and 1 with an
    L2 penalty on the kernel and none on the bias. One eigendecomposition, of features by features
    or of examples by examples, whichever is smaller, serves all strengths; the error of an example
    left out follows from its residual and leverage, without fitting again. Constant and repeated
    features are harmless: a direction without variance gets no weight.

    Args:
      features: ``[examples, features]``, finite; standardise them, for the penalty is the same for
        all. Computed in float64.
      labels: integers ``[examples]``, 0 .. classes - 1.
      strengths: penalties, each above 0.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, one class, fewer than three
        examples, strengths that are not above 0.
      TypeError: labels that are no integers.

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
    matrix, targets, penalties = _checked(features, labels, strengths, classes)
    count = len(matrix)
    middle, target_mean = matrix.mean(axis=0), targets.mean(axis=0)
    centred, residual = matrix - middle, targets - target_mean

    values, left = _decompose(centred)
    projected = left.T @ residual
    shrunk = values[:, None] / (values[:, None] + penalties)  # [rank, strengths]
    leverage = 1 / count + np.square(left) @ shrunk  # [examples, strengths]

    label = np.asarray(labels)
    errors, accuracies = np.empty(len(penalties)), np.empty(len(penalties))
    for n in range(len(penalties)):
        fitted = left @ (shrunk[:, n, None] * projected)
        out = (residual - fitted) / (1 - leverage[:, n, None])
        errors[n] = np.square(out).mean()
        accuracies[n] = ((targets - out).argmax(axis=1) == label).mean()
    best = int(np.flatnonzero(errors == errors.min())[np.argmax(penalties[errors == errors.min()])])
    # kernel = X' U (values + strength)^-1 U' Y, in which X' U is V sqrt(values).
    weights = projected / (values[:, None] + penalties[best])
    kernel = centred.T @ (left @ weights)
    return RidgePath(penalties, errors, accuracies, best, kernel, target_mean - middle @ kernel)


def _decompose(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values and left singular vectors, those without variance left out."""
    count, width = centred.shape
    if count <= width:
        values, left = scipy.linalg.eigh(centred @ centred.T)
        kept = values > _NEGLIGIBLE * max(values[-1], 0)
        return values[kept], left[:, kept]
    values, right = scipy.linalg.eigh(centred.T @ centred)
    kept = values > _NEGLIGIBLE * max(values[-1], 0)
    values = values[kept]
    return values, centred @ right[:, kept] / np.sqrt(values)


def _checked(
    features: Any, labels: Any, strengths: Sequence[float], classes: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix, label = np.asarray(features, np.float64), np.asarray(labels)
    penalties = np.asarray(strengths, np.float64)
    if not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"labels are {label.dtype}, wanted integers")
    if matrix.ndim != 2 or label.shape != matrix.shape[:1] or not matrix.size:
        raise ValueError(
            f"features have shape {matrix.shape} and labels {label.shape}; wanted "
            "[examples, features] and [examples]"
        )
    if len(label) < 3:
        raise ValueError(f"{len(label)} examples are too few to leave one out; wanted 3 or more")
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"{wrong} of {len(matrix)} examples have features that are not finite")
    if penalties.ndim != 1 or not penalties.size or not (penalties > 0).all():
        raise ValueError(f"strengths are numbers above 0, one or more, not {penalties.tolist()}")
    most = int(label.max())
    number = most + 1 if classes is None else classes
    if label.min() < 0 or most >= number:
        raise ValueError(f"labels go from {label.min()} to {most}; there are {number} classes")
    if len(np.unique(label)) < 2:
        raise ValueError(f"all examples are of class {most}; a classifier needs two or more")
    return matrix, np.where(label[:, None] == np.arange(number), 1.0, -1.0), penalties
