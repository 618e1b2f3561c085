"""Regularised estimation of label shift: weights that stay near 1 where the data say little."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

from flaxtransfer.shift.prevalence.simplex import nonnegative_quadratic

__all__ = ["regularisation_radius", "regularised_weights"]


def regularisation_radius(classes: int, validation: int, failure: float = 0.05) -> float:
    """How much a confusion matrix of so many examples may be wrong, with probability 1 - failure.

    >>> round(regularisation_radius(2, 100), 4)
    0.9758
    """
    size = np.log(2 * classes / failure)
    return float(3 * (2 * size / (3 * validation) + np.sqrt(2 * size / validation)))


def regularised_weights(matrix: np.ndarray, difference: np.ndarray, strength: float) -> np.ndarray:
    """Weights ``w = 1 + t`` with ``t >= -1`` that minimise ``|C t - d| + strength |t|``.

    Without squares: a norm of its own is shrunk to exactly nothing where the difference could be
    chance. The minimum lies on the path of ridge regressions, ``|C t - d|^2 + r |t|^2``, at the
    ridge r that makes ``r |t| = strength |C t - d|``; the quotient of both only grows with r.

    Args:
        matrix: `[K, K]`, C: P(predicted i, class j) at the source.
        difference: `[K]`, d: mean prediction on the target minus that on the source.
        strength: 0 for least squares alone.

    Returns:
        Weights `[K]`, q / p.

    >>> regularised_weights(np.eye(2) / 2, np.array([0.1, -0.1]), 0.0)
    array([1.2, 0.8])
    >>> regularised_weights(np.eye(2) / 2, np.array([0.1, -0.1]), 1.0)
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
