"""Prevalence from confusion matrices: black-box shift estimation (BBSE) and RLLS.

These methods need less than a likelihood: the model need not be calibrated, only make the same
errors on source and target. They also use less of the data, so that their intervals are wider.
``estimate_prevalence`` is the public entry point.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.optimize import brentq

from flaxtransfer.shift.likelihood import row_blocks
from flaxtransfer.shift.optimize import nonnegative_quadratic, simplex_least_squares

__all__ = [
    "ConfusionSolution",
    "conditional_confusion",
    "joint_confusion",
    "mean_prediction",
    "prediction_rows",
    "regularization_radius",
    "regularized_weights",
    "solve_confusion",
    "solve_proportions",
]


def solve_confusion(
    target: np.ndarray, validation: np.ndarray, labels: np.ndarray, *, hard: bool = False
) -> ConfusionSolution:
    """Black-box shift estimation: solves ``P(predicted) = sum_k P(predicted | class k) q_k`` for q.

    Args:
        target: ``[m, K]``, probabilities.
        validation: ``[n, K]``, probabilities of the source.
        labels: ``[n]``, their classes, int64.
        hard: Count the most probable class; otherwise add up probabilities.

    Returns:
        Least-squares proportions on the simplex, and the raw solution with its diagnosis.

    >>> found = solve_confusion(np.eye(2)[[0, 0, 0, 1]], np.eye(2), np.array([0, 1]))
    >>> found.estimate
    array([0.75, 0.25])

    References:
        Z. C. Lipton, Y.-X. Wang, A. J. Smola, "Detecting and correcting for label shift with black
        box predictors", 2018.
    """
    matrix = joint_confusion(validation, labels, hard=hard)
    frequency = np.bincount(labels, minlength=matrix.shape[1]) / len(labels)
    predicted = mean_prediction(target, hard=hard)
    conditional = conditional_confusion(matrix, frequency)
    left, values, right = np.linalg.svd(conditional)
    singular = np.linalg.svd(matrix, compute_uv=False)
    invertible = bool(values[-1] > 1e-12 * values[0])
    raw = np.linalg.solve(conditional, predicted) if invertible else np.full(len(predicted), np.nan)
    estimate = solve_proportions(conditional, predicted, raw)
    noise = _projected_variance(target, left[:, -1], hard) / len(target)
    noise += _validation_variance(validation, labels, left[:, -1], estimate, frequency, hard)
    return ConfusionSolution(
        estimate=estimate,
        raw=raw,
        matrix=matrix,
        frequency=frequency,
        predicted=predicted,
        condition=float(singular[0] / singular[-1]) if singular[-1] > 0 else np.inf,
        smallest=float(singular[-1]),
        confused=_most_confused(right[-1]),
        largest_error=float(np.sqrt(noise) / values[-1]) if invertible else np.inf,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ConfusionSolution:
    """Prevalence from a confusion matrix, with its diagnosis.

    Args:
        estimate: ``[K]``, proportions on the simplex that fit best.
        raw: ``[K]``, proportions by the inverse, negative ones included; NaN where there is no
            inverse.
        matrix: ``[K, K]``, P(predicted i, class j) at the source.
        frequency: ``[K]``, label frequencies at the source.
        predicted: ``[K]``, mean prediction on the target.
        condition: Condition number of the matrix.
        smallest: Smallest singular value of the matrix.
        confused: The two classes that are hardest to tell apart.
        largest_error: Standard error of the raw proportions along the least determined direction.
    """

    estimate: np.ndarray
    raw: np.ndarray
    matrix: np.ndarray
    frequency: np.ndarray
    predicted: np.ndarray
    condition: float
    smallest: float
    confused: tuple[int, int]
    largest_error: float


def regularized_weights(matrix: np.ndarray, difference: np.ndarray, strength: float) -> np.ndarray:
    """Regularized learning of label-shift weights (RLLS).

    The weights ``w = 1 + t`` with ``t >= -1`` minimize ``|C t - d| + strength |t|``. The norms are
    not squared, so that t is exactly 0 where the difference could be chance. The minimum lies on
    the path of ridge regressions, ``|C t - d|^2 + r |t|^2``, at the ridge r with ``r |t| = strength
    |C t - d|``; the ratio of both sides is monotone in r.

    Args:
        matrix: ``[K, K]``, C: P(predicted i, class j) at the source.
        difference: ``[K]``, d: mean prediction on the target minus that on the source.
        strength: Regularization; 0 for least squares.

    Returns:
        Importance weights ``[K]``, q / p.

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
        # Where no weight is at its bound 0, solve for t itself, which may be far smaller than 1.
        change = np.linalg.solve(square + ridge * np.eye(len(square)), slope) if ridge else None
        if change is None or (change < -1).any():
            # Otherwise for w >= 0: |C w - (C 1 + d)|^2 + ridge |w - 1|^2.
            target = matrix.T @ matrix.sum(1) + slope + ridge
            change = nonnegative_quadratic(square + ridge * np.eye(len(square)), target) - 1
        misfit = float(np.linalg.norm(matrix @ change - difference))
        return 1 + change, strength * misfit - ridge * float(np.linalg.norm(change))

    exact = _exact_weights(matrix, difference, strength)
    if exact is not None:
        return exact
    if strength == 0:
        return at(0.0)[0]
    if np.linalg.norm(slope) <= strength * np.linalg.norm(difference):
        # At w = 1 the slope of the fit is below the penalty.
        return np.ones(len(difference))
    low, high = np.log(1e-12 * size), np.log(1e6 * size)
    if at(np.exp(low))[1] <= 0:
        return at(0.0)[0]
    if at(np.exp(high))[1] >= 0:
        # The slope is barely above the penalty.
        return at(np.exp(high))[0]
    ridge = brentq(lambda power: at(np.exp(power))[1], low, high, xtol=1e-12, rtol=1e-12)
    return at(np.exp(ridge))[0]


def regularization_radius(classes: int, validation: int, failure: float = 0.05) -> float:
    """Error bound of a confusion matrix, valid with probability 1 - failure.

    Args:
        classes: K.
        validation: Number of validation examples.
        failure: Probability that the bound does not hold.

    >>> round(regularization_radius(2, 100), 4)
    0.9758
    """
    size = np.log(2 * classes / failure)
    return float(3 * (2 * size / (3 * validation) + np.sqrt(2 * size / validation)))


def solve_proportions(
    conditional: np.ndarray, predicted: np.ndarray, raw: np.ndarray
) -> np.ndarray:
    """The raw solution if it is non-negative, otherwise least squares on the simplex."""
    # Columns and predictions sum to 1, so the raw proportions do too: without negative ones they
    # fit exactly, and nothing fits better.
    if np.isfinite(raw).all() and (raw >= 0).all():
        proportions: np.ndarray = raw / raw.sum()
        return proportions
    return simplex_least_squares(conditional, predicted)


def joint_confusion(
    probabilities: np.ndarray, labels: np.ndarray, *, hard: bool = False
) -> np.ndarray:
    """Joint confusion matrix ``[K, K]``: P(predicted i, class j), which sums to 1.

    >>> joint_confusion(np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([0, 1]))
    array([[0.375, 0.25 ],
           [0.125, 0.25 ]])
    """
    found = np.zeros((probabilities.shape[1],) * 2)
    for part, rows in row_blocks(probabilities):
        classes = np.eye(len(found))[labels[rows]]
        found += prediction_rows(part, hard).T @ classes
    return found / len(labels)


def conditional_confusion(matrix: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """P(predicted i | class j); a column of zeros for a class without examples."""
    return matrix / np.where(frequency > 0, frequency, np.inf)


def mean_prediction(probabilities: np.ndarray, *, hard: bool = False) -> np.ndarray:
    """Mean probabilities, or frequencies of the most probable class, ``[K]``.

    >>> mean_prediction(np.array([[0.75, 0.25], [1.0, 0.0]]))
    array([0.875, 0.125])
    """
    found = np.zeros(probabilities.shape[1])
    for part, _ in row_blocks(probabilities):
        found += prediction_rows(part, hard).sum(0)
    return found / len(probabilities)


def prediction_rows(part: np.ndarray, hard: bool) -> np.ndarray:
    """Rows normalized to sum to 1, one-hot if ``hard``."""
    if hard:
        result: np.ndarray = np.eye(part.shape[1])[part.argmax(1)]
        return result
    normalized: np.ndarray = part / part.sum(1, keepdims=True)
    return normalized


def _most_confused(vector: np.ndarray) -> tuple[int, int]:
    """The largest entry and the largest of the opposite sign: classes exchangeable unnoticed."""
    first = int(np.argmax(np.abs(vector)))
    rivals = -vector * np.sign(vector[first])
    rivals[first] = -np.inf
    second = int(np.argmax(rivals))
    return min(first, second), max(first, second)


def _projected_variance(target: np.ndarray, direction: np.ndarray, hard: bool) -> float:
    """Variance of a target's predictions along a direction."""
    total = squares = 0.0
    for part, _ in row_blocks(target):
        projected = prediction_rows(part, hard) @ direction
        total += float(projected.sum())
        squares += float(projected @ projected)
    return max(squares / len(target) - (total / len(target)) ** 2, 0.0)


def _validation_variance(
    validation: np.ndarray,
    labels: np.ndarray,
    direction: np.ndarray,
    estimate: np.ndarray,
    frequency: np.ndarray,
    hard: bool,
) -> float:
    """Variance that the confusion matrix adds; each of its columns is a mean."""
    projected = np.concatenate(
        [prediction_rows(part, hard) @ direction for part, _ in row_blocks(validation)]
    )
    counts = np.bincount(labels, minlength=len(frequency))
    divisor = np.maximum(counts, 1)
    means = np.bincount(labels, projected, len(frequency)) / divisor
    spread = np.bincount(labels, np.square(projected - means[labels]), len(frequency)) / divisor
    return float((estimate**2 * spread / divisor).sum())


def _exact_weights(
    matrix: np.ndarray, difference: np.ndarray, strength: float
) -> np.ndarray | None:
    """Weights that fit the difference exactly, if the penalty allows it; otherwise None."""
    if np.linalg.matrix_rank(matrix) < len(matrix):
        return None
    change = np.linalg.solve(matrix, difference)
    size = float(np.linalg.norm(change))
    if (change < -1).any() or strength * np.linalg.norm(np.linalg.solve(matrix.T, change)) > size:
        return None
    return 1 + change
