"""Ridge classification in closed form: every strength at once, with exact leave-one-out errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.features.checks import examples, matching
from flaxtransfer.features.logistic import left_axes

__all__ = ["RidgePath", "ridge_path"]


STRENGTHS = tuple(float(value) for value in np.logspace(-3, 6, 19))
"""Strengths that suit standardized features of any number, half a decade apart."""

_AT_ONCE = 2**23
"""Scores held at once; strengths that make more go in parts."""


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
      left_out: scores of each example at the best strength by the classifier that was fitted to
        all others, float64 ``[examples, classes]``.
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
        """Leave-one-out accuracy at the best strength; chosen among all, so slightly too high."""
        return float(self.accuracies[self.best])

    def scores(self, features: Any) -> np.ndarray:
        """``[examples, classes]``, the largest of which is the prediction; not log-probabilities.

        Raises:
          ValueError: another number of features.
        """
        return matching(features, len(self.kernel)) @ self.kernel + self.bias

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
      features: ``[examples, features]``, finite; standardize them, for the penalty is the same for
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
    matrix, label, number = examples(features, labels, classes)
    penalties = _checked(len(matrix), strengths)
    targets = np.where(label[:, None] == np.arange(number), 1.0, -1.0)
    middle, target_mean = matrix.mean(axis=0), targets.mean(axis=0)
    centered, residual = matrix - middle, targets - target_mean

    values, left = left_axes(centered)
    projected = left.T @ residual
    shrunk = values[:, None] / (values[:, None] + penalties)  # [rank, strengths]
    kept = 1 - 1 / len(matrix) - np.square(left) @ shrunk  # 1 - leverage, [examples, strengths]

    def out(chosen: slice | list[int]) -> np.ndarray:
        """Errors of the examples left out, [examples, strengths, classes]."""
        shares = (shrunk[:, chosen, None] * projected[:, None]).reshape(len(values), -1)
        fitted = (left @ shares).reshape(len(matrix), -1, number)
        return (residual[:, None] - fitted) / kept[:, chosen, None]

    errors, accuracies = np.empty(len(penalties)), np.empty(len(penalties))
    size = max(1, _AT_ONCE // targets.size)
    for start in range(0, len(penalties), size):
        part = slice(start, start + size)
        wrong = out(part)
        errors[part] = np.square(wrong).mean(axis=(0, 2))
        guesses = (targets[:, None] - wrong).argmax(axis=2)
        accuracies[part] = (guesses == label[:, None]).mean(axis=0)
    best = int(np.flatnonzero(errors == errors.min())[np.argmax(penalties[errors == errors.min()])])
    # kernel = X' U (values + strength)^-1 U' Y, in which X' U is V sqrt(values).
    kernel = centered.T @ (left @ (projected / (values[:, None] + penalties[best])))
    left_out = targets - out([best])[:, 0]
    bias = target_mean - middle @ kernel
    return RidgePath(penalties, errors, accuracies, best, kernel, bias, left_out)


def _checked(count: int, strengths: Sequence[float]) -> np.ndarray:
    penalties = np.asarray(strengths, np.float64)
    if count < 3:
        raise ValueError(f"{count} examples are too few to leave one out; wanted 3 or more")
    if penalties.ndim != 1 or not penalties.size or not (penalties > 0).all():
        raise ValueError(f"strengths are numbers above 0, one or more, not {penalties.tolist()}")
    return penalties
