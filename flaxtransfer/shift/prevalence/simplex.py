"""Quadratics over shares: numbers that are not negative, and shares that sum to 1."""

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import nnls

__all__ = ["nonnegative_quadratic", "simplex_least_squares"]

_RIDGE = 1e-13
"""Of the mean diagonal: makes singular matrices solvable, and moves others by rounding only."""


def nonnegative_quadratic(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises ``x @ matrix @ x / 2 - vector @ x``.

    Exact up to rounding, by exchanging whole sets of variables between zero and not zero; where
    that goes in circles, one variable at a time, as Lawson and Hanson do it.

    Args:
        matrix: `[K, K]`, symmetric and positive definite; semi-definite ones get a ridge of 1e-13.
        vector: `[K]`.

    >>> nonnegative_quadratic(np.eye(2), np.array([2.0, -1.0]))
    array([2., 0.])

    References:
        J. Kim, H. Park, "Fast nonnegative matrix factorization: an active-set-like method and
        comparisons", 2011 (block principal pivoting).
    """
    count = len(vector)
    diagonal = np.diag(matrix)
    # Shares differ by orders of magnitude: with a unit diagonal, one tolerance suits all.
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    scaled = matrix * scale[:, None] * scale + _RIDGE * np.eye(count)
    wanted = vector * scale
    slack = 1e-12 * max(1.0, float(np.abs(wanted).max()))
    free = np.ones(count, bool)
    fewest, patience = count + 1, 5
    for _ in range(50 + count):
        x, slope = _on_face(scaled, wanted, free)
        wrong = (free & (x < -slack)) | (~free & (slope < -slack))
        number = int(wrong.sum())
        if number == 0:
            return np.maximum(x, 0) * scale
        if number < fewest:
            fewest, patience = number, 5
        elif patience == 0:
            break
        else:
            patience -= 1
        free = free ^ wrong
    root = np.linalg.cholesky(scaled + 1e-12 * np.eye(count))
    return nnls(root.T, np.linalg.solve(root, wanted), maxiter=30 * count)[0] * scale


def simplex_least_squares(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The shares q, not negative and of sum 1, that minimise ``|matrix @ q - vector|``.

    Args:
        matrix: `[R, K]`.
        vector: `[R]`.

    >>> simplex_least_squares(np.eye(2), np.array([1.2, -0.2]))
    array([1., 0.])
    """
    # For shares, matrix @ q - vector is a linear map of q, and adding (sum q)^2 adds 1. The
    # minimum over all q >= 0 of that with its sum rewarded lies on the same ray.
    residual = matrix - vector[:, None]
    size = float(np.square(residual).sum()) or 1.0
    q = nonnegative_quadratic(residual.T @ residual / size + 1.0, np.ones(matrix.shape[1]))
    return q / q.sum()


def _on_face(
    matrix: np.ndarray, vector: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The minimum with all but the free variables at zero, and the slopes there."""
    x = np.zeros(len(vector))
    if free.any():
        part = matrix[np.ix_(free, free)]
        try:
            x[free] = cho_solve(cho_factor(part, check_finite=False), vector[free])
        except np.linalg.LinAlgError:
            x[free] = np.linalg.lstsq(part, vector[free], rcond=None)[0]
    return x, np.where(free, 0.0, matrix @ x - vector)
