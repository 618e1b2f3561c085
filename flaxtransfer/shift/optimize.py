"""Convex optimization: projected Newton in a box, and quadratic programs on the simplex.

``minimize`` fits calibration maps; the quadratic programs solve for class proportions, which are
non-negative and sum to 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import nnls

__all__ = [
    "Evaluation",
    "Minimum",
    "minimize",
    "nonnegative_quadratic",
    "simplex_least_squares",
]

_ARMIJO = 1e-4
"""Fraction of the decrease predicted by the slope that a step must reach (Armijo)."""

_NEWTON_RIDGE = 1e-13
"""Relative to the mean diagonal of the Hessian: no movement along directions without curvature."""

_MAX_EXTRA_STEPS = 4

_NEGLIGIBLE_STEP = 1e-7
"""Most steps after the tolerance is reached, and the step size that ends them."""

_RIDGE = 1e-13
"""Relative to the mean diagonal: makes singular matrices solvable, negligible for others."""


def minimize(
    function: Callable[[np.ndarray], Evaluation],
    start: np.ndarray,
    *,
    lower: np.ndarray,
    upper: np.ndarray,
    units: np.ndarray,
    tolerance: float = 1e-8,
    max_iterations: int = 200,
) -> Minimum:
    """Minimum of a convex function in a box, by projected Newton steps with backtracking.

    Use it for up to some thousand parameters with a dense Hessian, and for more with conjugate
    gradients on Hessian-vector products. It does not raise where it cannot reach the tolerance;
    check ``gradient_norm``.

    Args:
        function: Value, gradient and curvature at a point.
        start: Start point ``[d]``, in the box.
        lower: Lower bounds ``[d]``, -inf for none.
        upper: Upper bounds ``[d]``, inf for none.
        units: Factors ``[d]`` of the gradient in its norm.
        tolerance: Of the gradient norm.
        max_iterations: Most Newton steps.

    References:
        D. Bertsekas, "Projected Newton methods for optimization problems with simple
        constraints", 1982.
    """
    point = np.clip(start, lower, upper)
    current = function(point)
    extra_steps = 0
    for iteration in range(max_iterations + 1):
        gradient = current.gradient
        blocked = ((point <= lower) & (gradient > 0)) | ((point >= upper) & (gradient < 0))
        norm = float(np.linalg.norm((gradient * units)[~blocked]))
        step = _newton_step(current, ~blocked, tolerance / max(norm, tolerance))
        if norm <= tolerance:
            # A flat minimum has a small gradient far from it. A few more steps reach it, or
            # show that there is no minimum.
            if extra_steps == _MAX_EXTRA_STEPS or np.abs(step).max() <= _NEGLIGIBLE_STEP:
                break
            extra_steps += 1
        if iteration == max_iterations:
            break
        moved = _backtrack(function, point, current, step, lower, upper)
        if moved is None:
            break
        point, current = moved
    return Minimum(point, current, norm, step, iteration)


@dataclasses.dataclass(frozen=True, eq=False)
class Minimum:
    """Result of ``minimize``.

    Args:
        point: The minimizer ``[d]``.
        evaluation: The function there.
        gradient_norm: Euclidean norm over the directions that no bound blocks, in the caller's
            units.
        step: The next Newton step ``[d]``: near 0 at a minimum, and of the order of 1 where the
            function decreases without bound and only its slope has become small.
        iterations: Number of steps taken.
    """

    point: np.ndarray
    evaluation: Evaluation
    gradient_norm: float
    step: np.ndarray
    iterations: int


class Evaluation(Protocol):
    """A convex function evaluated at one point."""

    value: float
    gradient: np.ndarray

    def hessian(self) -> np.ndarray | None:
        """The Hessian ``[d, d]``; None where only products with it are affordable."""

    def hessian_product(self, direction: np.ndarray) -> np.ndarray:
        """Hessian-vector product with a direction ``[d]``."""

    def diagonal(self) -> np.ndarray:
        """Diagonal of the Hessian ``[d]``, >= 0; the preconditioner where ``hessian`` is None."""


def nonnegative_quadratic(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Quadratic program: the x >= 0 that minimizes ``x @ matrix @ x / 2 - vector @ x``.

    Exact up to rounding, by block principal pivoting; where that cycles, by Lawson and Hanson's
    non-negative least squares.

    Args:
        matrix: ``[K, K]``, symmetric positive definite; semi-definite ones get a ridge of 1e-13.
        vector: ``[K]``.

    >>> nonnegative_quadratic(np.eye(2), np.array([2.0, -1.0]))
    array([2., 0.])

    References:
        J. Kim, H. Park, "Fast nonnegative matrix factorization: an active-set-like method and
        comparisons", 2011 (block principal pivoting).
    """
    count = len(vector)
    diagonal = np.diag(matrix)
    # Proportions differ by orders of magnitude; with a unit diagonal one tolerance suits all.
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    scaled = matrix * scale[:, None] * scale + _RIDGE * np.eye(count)
    target = vector * scale
    slack = 1e-12 * max(1.0, float(np.abs(target).max()))
    free = np.ones(count, bool)
    fewest_wrong, patience = count + 1, 5
    for _ in range(50 + count):
        x, slope = _solve_with_free(scaled, target, free)
        wrong = (free & (x < -slack)) | (~free & (slope < -slack))
        number = int(wrong.sum())
        if number == 0:
            solution: np.ndarray = np.maximum(x, 0) * scale
            return solution
        if number < fewest_wrong:
            fewest_wrong, patience = number, 5
        elif patience == 0:
            break
        else:
            patience -= 1
        free = free ^ wrong
    root = np.linalg.cholesky(scaled + 1e-12 * np.eye(count))
    solution = nnls(root.T, np.linalg.solve(root, target), maxiter=30 * count)[0] * scale
    return solution


def simplex_least_squares(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Least squares on the simplex: the q >= 0 of sum 1 that minimizes ``|matrix @ q - vector|``.

    Args:
        matrix: ``[R, K]``.
        vector: ``[R]``.

    >>> simplex_least_squares(np.eye(2), np.array([1.2, -0.2]))
    array([1., 0.])
    """
    # On the simplex, matrix @ q - vector is a linear map of q, and adding (sum q)^2 adds 1. The
    # minimum over all q >= 0 with a reward for the sum lies on the same ray.
    residual = matrix - vector[:, None]
    size = float(np.square(residual).sum()) or 1.0
    q = nonnegative_quadratic(residual.T @ residual / size + 1.0, np.ones(matrix.shape[1]))
    proportions: np.ndarray = q / q.sum()
    return proportions


def _backtrack(
    function: Callable[[np.ndarray], Evaluation],
    point: np.ndarray,
    current: Evaluation,
    step: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
) -> tuple[np.ndarray, Evaluation] | None:
    """The first of the halved steps that decreases the function enough; None where none does."""
    # Near the minimum the decrease is below the rounding error of the value.
    slack = 1e-14 * max(1.0, abs(current.value))
    for halving in range(50):
        candidate = np.clip(point + 0.5**halving * step, lower, upper)
        evaluation = function(candidate)
        predicted = float(current.gradient @ (candidate - point))
        if evaluation.value <= current.value + _ARMIJO * predicted + slack:
            return candidate, evaluation
    return None


def _newton_step(current: Evaluation, free: np.ndarray, accuracy: float) -> np.ndarray:
    step = np.zeros(len(free))
    if not free.any():
        return step
    dense = current.hessian()
    if dense is None:
        step[free] = _conjugate_gradients(current, free, min(0.1, max(accuracy, 1e-3)))
        return step
    matrix = dense[np.ix_(free, free)]
    ridge = _NEWTON_RIDGE * float(np.trace(matrix)) / len(matrix) + np.finfo(float).tiny
    for _ in range(12):
        try:
            factor = cho_factor(matrix + ridge * np.eye(len(matrix)), check_finite=False)
        except LinAlgError:
            ridge *= 10
            continue
        step[free] = -cho_solve(factor, current.gradient[free], check_finite=False)
        return step
    # The curvature is lost to rounding; the negative gradient still decreases the function.
    step[free] = -current.gradient[free]
    return step


def _conjugate_gradients(current: Evaluation, free: np.ndarray, accuracy: float) -> np.ndarray:
    """Newton step by conjugate gradients, to a residual of ``accuracy`` times the gradient."""
    diagonal = current.diagonal()[free]
    scale = 1 / np.maximum(diagonal, 1e-12 * max(float(diagonal.max()), np.finfo(float).tiny))
    residual = -current.gradient[free]
    target = accuracy * float(np.linalg.norm(residual))
    solution = np.zeros_like(residual)
    preconditioned = scale * residual
    direction = preconditioned.copy()
    product = float(residual @ preconditioned)
    for _ in range(250):
        whole = np.zeros(len(free))
        whole[free] = direction
        curved = current.hessian_product(whole)[free]
        curvature = float(direction @ curved)
        if curvature <= 0:
            break
        rate = product / curvature
        solution += rate * direction
        residual = residual - rate * curved
        if np.linalg.norm(residual) <= target:
            break
        preconditioned = scale * residual
        next_product = float(residual @ preconditioned)
        direction = preconditioned + next_product / product * direction
        product = next_product
    result: np.ndarray = solution if solution.any() else preconditioned
    return result


def _solve_with_free(
    matrix: np.ndarray, vector: np.ndarray, free: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum with all but the free variables at zero, and the gradient there."""
    x = np.zeros(len(vector))
    if free.any():
        part = matrix[np.ix_(free, free)]
        try:
            x[free] = cho_solve(cho_factor(part, check_finite=False), vector[free])
        except np.linalg.LinAlgError:
            x[free] = np.linalg.lstsq(part, vector[free], rcond=None)[0]
    return x, np.where(free, 0.0, matrix @ x - vector)
