"""Prevalence from confusion matrices: black-box shift estimation and RLLS.

Black box shift estimation: prevalence from a confusion matrix and the mean prediction.

It asks less than a likelihood: the model need not be calibrated, only be wrong in the same way on
source and target. It also knows less, and with the same data its intervals are wider.

Regularized estimation of label shift: weights that stay near 1 where the data say little.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import brentq

from flaxtransfer.shift.likelihood import blocks
from flaxtransfer.shift.optimize import nonnegative_quadratic, simplex_least_squares

__all__ = [
    "BlackBox",
    "black_box",
    "joint_confusion",
    "mean_prediction",
    "rates",
    "regularization_radius",
    "regularized_weights",
    "shares",
]


@dataclasses.dataclass(frozen=True, eq=False)
class BlackBox:
    """What a confusion matrix says about a target.

    Args:
        estimate: `[K]`, the shares that fit best.
        raw: `[K]`, by the inverse, whatever their signs; NaN where there is no inverse.
        matrix: `[K, K]`, P(predicted i, class j) at the source.
        frequency: `[K]`, of the labels at the source.
        predicted: `[K]`, mean prediction on the target.
        condition: of the matrix.
        smallest: singular value of the matrix.
        confused: the two classes that can be told apart least.
        weakest: standard error of the raw shares along the direction known least.
    """

    estimate: np.ndarray
    raw: np.ndarray
    matrix: np.ndarray
    frequency: np.ndarray
    predicted: np.ndarray
    condition: float
    smallest: float
    confused: tuple[int, int]
    weakest: float


def black_box(
    target: np.ndarray, validation: np.ndarray, labels: np.ndarray, *, hard: bool = False
) -> BlackBox:
    """Solves ``P(predicted) = sum_k P(predicted | class k) q_k`` for the shares q.

    Args:
        target: `[m, K]`, probabilities.
        validation: `[n, K]`, probabilities of the source.
        labels: `[n]`, their classes, int64.
        hard: count the most probable class; else add up probabilities.

    Returns:
        Shares on the simplex by least squares, and the raw solution with its diagnosis.

    >>> found = black_box(np.eye(2)[[0, 0, 0, 1]], np.eye(2), np.array([0, 1]))
    >>> found.estimate
    array([0.75, 0.25])

    References:
        Z. C. Lipton, Y.-X. Wang, A. J. Smola, "Detecting and correcting for label shift with black
        box predictors", 2018.
    """
    matrix = joint_confusion(validation, labels, hard=hard)
    frequency = np.bincount(labels, minlength=matrix.shape[1]) / len(labels)
    predicted = mean_prediction(target, hard=hard)
    conditional = rates(matrix, frequency)
    left, values, right = np.linalg.svd(conditional)
    singular = np.linalg.svd(matrix, compute_uv=False)
    possible = bool(values[-1] > 1e-12 * values[0])
    raw = np.linalg.solve(conditional, predicted) if possible else np.full(len(predicted), np.nan)
    estimate = shares(conditional, predicted, raw)
    noise = _noise(target, left[:, -1], hard) / len(target)
    noise += _validation_noise(validation, labels, left[:, -1], estimate, frequency, hard)
    return BlackBox(
        estimate=estimate,
        raw=raw,
        matrix=matrix,
        frequency=frequency,
        predicted=predicted,
        condition=float(singular[0] / singular[-1]) if singular[-1] > 0 else np.inf,
        smallest=float(singular[-1]),
        confused=_opposites(right[-1]),
        weakest=float(np.sqrt(noise) / values[-1]) if possible else np.inf,
    )


def shares(conditional: np.ndarray, predicted: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The raw solution where it is one, and least squares on the simplex where it is not."""
    # Columns and predictions sum to 1, so the raw shares do too: without negative ones they fit
    # exactly, and nothing fits better.
    if np.isfinite(raw).all() and (raw >= 0).all():
        return raw / raw.sum()
    return simplex_least_squares(conditional, predicted)


def joint_confusion(
    probabilities: np.ndarray, labels: np.ndarray, *, hard: bool = False
) -> np.ndarray:
    """P(predicted i, class j), `[K, K]`, which sums to 1.

    >>> joint_confusion(np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([0, 1]))
    array([[0.375, 0.25 ],
           [0.125, 0.25 ]])
    """
    found = np.zeros((probabilities.shape[1],) * 2)
    for part, rows in blocks(probabilities):
        classes = np.eye(len(found))[labels[rows]]
        found += predictions(part, hard).T @ classes
    return found / len(labels)


def mean_prediction(probabilities: np.ndarray, *, hard: bool = False) -> np.ndarray:
    """Mean probabilities, or shares of the most probable class, `[K]`.

    >>> mean_prediction(np.array([[0.75, 0.25], [1.0, 0.0]]))
    array([0.875, 0.125])
    """
    found = np.zeros(probabilities.shape[1])
    for part, _ in blocks(probabilities):
        found += predictions(part, hard).sum(0)
    return found / len(probabilities)


def rates(matrix: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """P(predicted i | class j); a column of zeros for a class without examples."""
    return matrix / np.where(frequency > 0, frequency, np.inf)


def predictions(part: np.ndarray, hard: bool) -> np.ndarray:
    """Rows that sum to exactly 1, one-hot if `hard`."""
    if hard:
        return np.eye(part.shape[1])[part.argmax(1)]
    return part / part.sum(1, keepdims=True)


def _opposites(vector: np.ndarray) -> tuple[int, int]:
    """The largest entry and the largest of the other sign: what is exchanged unseen."""
    first = int(np.argmax(np.abs(vector)))
    rivals = -vector * np.sign(vector[first])
    rivals[first] = -np.inf
    second = int(np.argmax(rivals))
    return min(first, second), max(first, second)


def _noise(target: np.ndarray, along: np.ndarray, hard: bool) -> float:
    """Variance of a target's prediction along a direction."""
    total = squares = 0.0
    for part, _ in blocks(target):
        projected = predictions(part, hard) @ along
        total += float(projected.sum())
        squares += float(projected @ projected)
    return max(squares / len(target) - (total / len(target)) ** 2, 0.0)


def _validation_noise(
    validation: np.ndarray,
    labels: np.ndarray,
    along: np.ndarray,
    estimate: np.ndarray,
    frequency: np.ndarray,
    hard: bool,
) -> float:
    """What the confusion matrix adds to it: each of its columns is a mean too."""
    projected = np.concatenate([predictions(part, hard) @ along for part, _ in blocks(validation)])
    counts = np.bincount(labels, minlength=len(frequency))
    divisor = np.maximum(counts, 1)
    means = np.bincount(labels, projected, len(frequency)) / divisor
    spread = np.bincount(labels, np.square(projected - means[labels]), len(frequency)) / divisor
    return float((estimate**2 * spread / divisor).sum())


def regularization_radius(classes: int, validation: int, failure: float = 0.05) -> float:
    """How much a confusion matrix of so many examples may be wrong, with probability 1 - failure.

    >>> round(regularization_radius(2, 100), 4)
    0.9758
    """
    size = np.log(2 * classes / failure)
    return float(3 * (2 * size / (3 * validation) + np.sqrt(2 * size / validation)))


def regularized_weights(matrix: np.ndarray, difference: np.ndarray, strength: float) -> np.ndarray:
    """Weights ``w = 1 + t`` with ``t >= -1`` that minimize ``|C t - d| + strength |t|``.

    Without squares: a norm of its own is shrunk to exactly nothing where the difference could be
    chance. The minimum lies on the path of ridge regressions, ``|C t - d|^2 + r |t|^2``, at the
    ridge r that makes ``r |t| = strength |C t - d|``; the quotient of both only grows with r.

    Args:
        matrix: `[K, K]`, C: P(predicted i, class j) at the source.
        difference: `[K]`, d: mean prediction on the target minus that on the source.
        strength: 0 for least squares alone.

    Returns:
        Weights `[K]`, q / p.

    >>> regularized_weights(np.eye(2) / 2, np.array([0.1, -0.1]), 0.0)
    array([1.2, 0.8])
    >>> regularized_weights(np.eye(2) / 2, np.array([0.1, -0.1]), 1.0)
    array([1., 1.])

    References:
        K. Azizzadenesheli, A. Liu, F. Yang, A. Anandkumar, "Regularized learning for domain
        adaptation under label shifts", 2019.
    """
    square = matrix.T @ matrix
    size = float(np.trace(square)) or 1.0

    slope = matrix.T @ difference

    def at(ridge: float) -> tuple[np.ndarray, float]:
        # Where no weight is held at 0, t itself is solved for: it may be far smaller than 1.
        move = np.linalg.solve(square + ridge * np.eye(len(square)), slope) if ridge else None
        if move is None or (move < -1).any():
            # In w, which is not negative: |C w - (C 1 + d)|^2 + ridge |w - 1|^2.
            goal = matrix.T @ matrix.sum(1) + slope + ridge
            move = nonnegative_quadratic(square + ridge * np.eye(len(square)), goal) - 1
        apart = float(np.linalg.norm(matrix @ move - difference))
        return 1 + move, strength * apart - ridge * float(np.linalg.norm(move))

    met = _exact(matrix, difference, strength)
    if met is not None:
        return met
    if strength == 0:
        return at(0.0)[0]
    if np.linalg.norm(slope) <= strength * np.linalg.norm(difference):
        # At w = 1 the slope of the fit does not overcome the penalty.
        return np.ones(len(difference))
    low, high = np.log(1e-12 * size), np.log(1e6 * size)
    if at(np.exp(low))[1] <= 0:
        return at(0.0)[0]
    if at(np.exp(high))[1] >= 0:
        # The slope only just overcomes the penalty.
        return at(np.exp(high))[0]
    ridge = brentq(lambda power: at(np.exp(power))[1], low, high, xtol=1e-12, rtol=1e-12)
    return at(np.exp(ridge))[0]


def _exact(matrix: np.ndarray, difference: np.ndarray, strength: float) -> np.ndarray | None:
    """Weights that meet the difference exactly, where the penalty does not outweigh that."""
    if np.linalg.matrix_rank(matrix) < len(matrix):
        return None
    move = np.linalg.solve(matrix, difference)
    size = float(np.linalg.norm(move))
    if (move < -1).any() or strength * np.linalg.norm(np.linalg.solve(matrix.T, move)) > size:
        return None
    return 1 + move
