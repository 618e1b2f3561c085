"""Two ways to the optimum of logistic regression: many fits on shared axes, one fit on its own."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import scipy.linalg

from flaxtransfer.features.axes import eigen, left_axes
from flaxtransfer.features.lbfgs import Diagonal, Inverse, Problem, Solution, solve

__all__ = ["alone", "together"]

_AT_ONCE = 2**21
"""Logits held at once; more fits than that go one batch after another, in the order given.

A batch lasts as long as its slowest fit, so that with many examples smaller ones waste less.
"""

_BATCH = 8
"""Fits that go together however many examples there are."""

_ROUNDS = (8, 30)
"""Iterations after which one fit alone looks whether its guess of the curvature was good."""

_GOOD = 2.0
"""Factor by which that guess may be wrong; L-BFGS makes up for it."""


def together(
    centred: np.ndarray,
    true: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    dtype: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[np.ndarray, np.ndarray, Solution]:
    """All fits, along the principal axes of all examples.

    Args:
      centred: float64 ``[examples, features]``, of mean 0.
      true: bool ``[examples, classes]``.
      weights: ``[fits, examples]``.
      strengths: ``[fits]``.
      dtype: to solve in.
      tolerance: gap to the optimum, as a share of the loss.
      max_iterations: of each fit.

    Returns:
      Kernels ``[fits, features, classes]``, biases ``[fits, classes]`` for centred features, and
      how well they were solved.

    References:
      D. Böhning, "Multinomial Logistic Regression Algorithm", 1992 (one curvature for all fits).
      T. Hastie, R. Tibshirani, "Efficient Quadratic Regularization for Expression Arrays", 2004
      (fewer examples than features).
    """
    values, rotated, back = _rotate(centred, dtype)
    design = _with_bias(rotated)
    guess = Diagonal(np.append(values, len(design)).astype(dtype))
    (count, classes), fits = true.shape, len(strengths)
    most = max(_BATCH, _AT_ONCE // (count * classes))
    # All batches have one size, the last is filled up, so that one program serves all of them.
    size = -(-fits // -(-fits // most))
    origin = np.zeros((design.shape[1], classes, size), dtype)
    logits = np.zeros((count, classes, size), dtype)
    parts = []
    for start in range(0, fits, size):
        chosen = np.minimum(np.arange(start, start + size), fits - 1)
        shares, penalties = weights[chosen].T.astype(dtype), strengths[chosen].astype(dtype)
        problem = Problem(design, true, shares, penalties)
        part = solve(problem, origin, logits, guess, tolerance, max_iterations)
        parts.append([np.asarray(field)[..., : fits - start] for field in part])
    solved = Solution(*(np.concatenate(field, axis=-1) for field in zip(*parts, strict=True)))
    kernels = np.moveaxis(np.tensordot(back, solved.coefficients[:-1], 1), 2, 0)
    return kernels, solved.coefficients[-1].T, solved


def alone(
    centred: np.ndarray,
    true: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    dtype: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[np.ndarray, np.ndarray, Solution]:
    """One fit, whose inverse Hessian is guessed from the features' products.

    The guess is ``(share * X'X + strength)^-1``, in which the share, the mean of ``p (1 - p)``, is
    only known at the optimum: it is looked up after a few iterations, and the guess is made anew
    where it was far off. With fewer examples than features these are first reduced, exactly, to as
    many as there are examples, by a QR decomposition.

    Args and Returns as for ``together``.
    """
    matrix = centred.astype(dtype)
    few = len(matrix) < matrix.shape[1]
    if few:
        (packed, tau), upper = scipy.linalg.qr(matrix.T, mode="raw", check_finite=False)
        matrix = np.ascontiguousarray(upper.T)
    products = matrix.T @ matrix
    (count, classes), penalty = true.shape, strengths.astype(dtype)
    problem = Problem(_with_bias(matrix), true, weights.T.astype(dtype), penalty)
    coefficients: Any = np.zeros((matrix.shape[1] + 1, classes, 1), dtype)
    logits: Any = np.zeros((count, classes, 1), dtype)
    share = float(weights.mean()) / classes * (1 - 1 / classes)
    taken, rounds = 0, iter(_ROUNDS)
    while True:
        guess = Inverse(_inverse(products, share, float(penalty[0])), dtype.type(share * count))
        most = min(next(rounds, max_iterations), max_iterations - taken)
        solved = solve(problem, coefficients, logits, guess, tolerance, most)
        taken += int(solved.iterations[0])
        coefficients, logits, found = solved.coefficients, solved.logits, float(solved.left[0])
        finished = bool(solved.gaps[0] <= tolerance) or int(solved.iterations[0]) < most
        good = share / _GOOD <= found <= share * _GOOD
        if taken >= max_iterations or (finished and good):
            break
        share = share if good else max(found, float(np.finfo(dtype).eps))
    solved = jax.tree.map(np.asarray, solved)._replace(iterations=np.array([taken]))
    kernel = solved.coefficients[:-1, :, 0]
    if few:
        kernel = _rotate_back(packed, tau, kernel)
    return kernel[None], solved.coefficients[-1].T, solved


def _with_bias(matrix: np.ndarray) -> np.ndarray:
    return np.column_stack([matrix, np.ones(len(matrix), matrix.dtype)])


def _rotate(centred: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared singular values, examples on the principal axes in ``dtype``, and the axes.

    With more examples than features any orthogonal axes are exact, and approximately principal ones
    are as good a guess: products in ``dtype``.
    """
    if len(centred) <= centred.shape[1]:
        values, left = left_axes(centred)
        return values, (left * np.sqrt(values)).astype(dtype), centred.T @ (left / np.sqrt(values))
    matrix = centred.astype(dtype)
    _, axes = eigen((matrix.T @ matrix).astype(np.float64))
    rotated = matrix @ axes.astype(dtype)
    return np.square(rotated).sum(axis=0), rotated, axes


def _inverse(products: np.ndarray, share: float, penalty: float) -> np.ndarray:
    """``(share * products + penalty)^-1``; the penalty not below what rounding leaves positive."""
    least = 10 * float(np.finfo(products.dtype).eps) * share * float(np.linalg.norm(products))
    penalty = max(penalty, least)
    while True:
        matrix = products * products.dtype.type(share)
        matrix[np.diag_indices_from(matrix)] += penalty
        try:
            lower = scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
            break
        except scipy.linalg.LinAlgError:
            penalty *= 10
    (invert,) = scipy.linalg.get_lapack_funcs(("potri",), (lower,))
    half, _ = invert(lower, lower=True, overwrite_c=True)
    return half + np.tril(half, -1).T


def _rotate_back(packed: np.ndarray, tau: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """Q times ``[examples, classes]``, without ever forming Q: ``[features, classes]``."""
    (apply,) = scipy.linalg.get_lapack_funcs(("ormqr",), (packed,))
    padded = np.zeros((len(packed), reduced.shape[1]), packed.dtype, order="F")
    padded[: len(reduced)] = reduced
    _, size, _ = apply("L", "N", packed, tau, padded, -1)
    product, _, _ = apply("L", "N", packed, tau, padded, int(size[0]), overwrite_c=True)
    return product
