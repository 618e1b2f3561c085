"""Newton's method in a box, and quadratic programs over the simplex.

Newton's method for a smooth convex function in a box: damped, to a stated gradient norm.

Quadratics over shares: numbers that are not negative, and shares that sum to 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import nnls

__all__ = ["Local", "Minimum", "minimize", "nonnegative_quadratic", "simplex_least_squares"]


_SUFFICIENT = 1e-4
"""Share of the descent that the slope promises, and a step has to keep (Armijo)."""

_NEWTON_RIDGE = 1e-13
"""Relative to the Hessian's mean diagonal: directions without curvature stay where they are."""

_POLISH = 4
_STILL = 1e-7
"""Steps after the tolerance is reached, at most, and the step that needs no other after it."""


class Local(Protocol):
    """A convex function around one point."""

    value: float
    gradient: np.ndarray

    def hessian(self) -> np.ndarray | None:
        """`[d, d]`; None where only products with it are affordable."""

    def times(self, direction: np.ndarray) -> np.ndarray:
        """The Hessian times a direction `[d]`."""

    def diagonal(self) -> np.ndarray:
        """Of the Hessian, `[d]`, positive or zero; the preconditioner where `hessian` is None."""


@dataclasses.dataclass(frozen=True, eq=False)
class Minimum:
    """Where the search ended.

    Args:
        point: `[d]`.
        local: the function there.
        gradient_norm: Euclidean, of the directions that no bound blocks, in the caller's units.
        step: `[d]`, what Newton's method would do next: near 0 at a minimum, and of the order of 1
            where the function falls for ever and only its slope has become small.
        iterations: steps taken.
    """

    point: np.ndarray
    local: Local
    gradient_norm: float
    step: np.ndarray
    iterations: int


def minimize(
    function: Callable[[np.ndarray], Local],
    start: np.ndarray,
    *,
    lower: np.ndarray,
    upper: np.ndarray,
    units: np.ndarray,
    tolerance: float = 1e-8,
    limit: int = 200,
) -> Minimum:
    """The minimum of a convex function in a box, by projected Newton steps with backtracking.

    For some thousand parameters at most with a dense Hessian; beyond, with conjugate gradients on
    products. It does not raise where it cannot reach the tolerance: the norm says so.

    Args:
        function: value, gradient and curvature at a point.
        start: `[d]`, in the box.
        lower: `[d]`, -inf for none.
        upper: `[d]`, inf for none.
        units: `[d]`, what the gradient is multiplied by before its norm is compared.
        tolerance: of the norm.
        limit: of steps.

    References:
        D. Bertsekas, "Projected Newton methods for optimization problems with simple
        constraints", 1982.
    """
    point = np.clip(start, lower, upper)
    local = function(point)
    polished = 0
    for iteration in range(limit + 1):
        gradient = local.gradient
        blocked = ((point <= lower) & (gradient > 0)) | ((point >= upper) & (gradient < 0))
        norm = float(np.linalg.norm((gradient * units)[~blocked]))
        step = _newton_step(local, ~blocked, tolerance / max(norm, tolerance))
        if norm <= tolerance:
            # A flat minimum has a small gradient far away from it. A few steps more arrive there,
            # or show that there is nowhere to arrive.
            if polished == _POLISH or np.abs(step).max() <= _STILL:
                break
            polished += 1
        if iteration == limit:
            break
        moved = _backtrack(function, point, local, step, lower, upper)
        if moved is None:
            break
        point, local = moved
    return Minimum(point, local, norm, step, iteration)


def _backtrack(
    function: Callable[[np.ndarray], Local],
    point: np.ndarray,
    local: Local,
    step: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
) -> tuple[np.ndarray, Local] | None:
    """The first of the halved steps that descends enough; None where none does."""
    # Near the minimum, the descent is below the rounding of the value.
    slack = 1e-14 * max(1.0, abs(local.value))
    for halving in range(50):
        candidate = np.clip(point + 0.5**halving * step, lower, upper)
        there = function(candidate)
        promised = float(local.gradient @ (candidate - point))
        if there.value <= local.value + _SUFFICIENT * promised + slack:
            return candidate, there
    return None


def _newton_step(local: Local, free: np.ndarray, accuracy: float) -> np.ndarray:
    step = np.zeros(len(free))
    if not free.any():
        return step
    dense = local.hessian()
    if dense is None:
        step[free] = _conjugate_gradients(local, free, min(0.1, max(accuracy, 1e-3)))
        return step
    matrix = dense[np.ix_(free, free)]
    ridge = _NEWTON_RIDGE * float(np.trace(matrix)) / len(matrix) + np.finfo(float).tiny
    for _ in range(12):
        try:
            factor = cho_factor(matrix + ridge * np.eye(len(matrix)), check_finite=False)
        except LinAlgError:
            ridge *= 10
            continue
        step[free] = -cho_solve(factor, local.gradient[free], check_finite=False)
        return step
    # Curvature drowned in rounding: the gradient's direction still descends.
    step[free] = -local.gradient[free]
    return step


def _conjugate_gradients(local: Local, free: np.ndarray, accuracy: float) -> np.ndarray:
    """Solves for the step until the residual is this share of the gradient."""
    diagonal = local.diagonal()[free]
    scale = 1 / np.maximum(diagonal, 1e-12 * max(float(diagonal.max()), np.finfo(float).tiny))
    residual = -local.gradient[free]
    target = accuracy * float(np.linalg.norm(residual))
    solution = np.zeros_like(residual)
    preconditioned = scale * residual
    direction = preconditioned.copy()
    product = float(residual @ preconditioned)
    for _ in range(250):
        whole = np.zeros(len(free))
        whole[free] = direction
        curved = local.times(whole)[free]
        curvature = float(direction @ curved)
        if curvature <= 0:
            break
        rate = product / curvature
        solution += rate * direction
        residual = residual - rate * curved
        if np.linalg.norm(residual) <= target:
            break
        preconditioned = scale * residual
        following = float(residual @ preconditioned)
        direction = preconditioned + following / product * direction
        product = following
    return solution if solution.any() else preconditioned


_RIDGE = 1e-13
"""Of the mean diagonal: makes singular matrices solvable, and moves others by rounding only."""


def nonnegative_quadratic(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimizes ``x @ matrix @ x / 2 - vector @ x``.

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
    """The shares q, not negative and of sum 1, that minimize ``|matrix @ q - vector|``.

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
