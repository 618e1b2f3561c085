"""Multinomial logistic regression to the optimum, for many strengths and folds at once.

Principal axes of features by one eigendecomposition, of whichever products are fewer.

Two ways to the optimum of logistic regression: many fits on shared axes, one fit on its own.

Multinomial logistic regression to the optimum: many strengths and many folds in one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.linalg

from flaxtransfer.features.checks import examples, matching
from flaxtransfer.features.lbfgs import Diagonal, Inverse, Problem, Solution, solve

__all__ = ["LogisticPath", "alone", "eigen", "left_axes", "logistic_path", "together"]


_NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue below which a direction is rounding, in float64."""


def left_axes(centered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values and left singular vectors, those without variance left out.

    With fewer examples than features they come out of the examples' products, which is exact: no
    head with an L2 penalty leaves the span of its examples. Squaring in float32 would lose all
    singular values below 3e-4 of the largest; float64 keeps those above 1e-6.

    Args:
      centered: float64 ``[examples, features]``.

    Returns:
      ``[rank]``, ascending, and ``[examples, rank]``.

    >>> values, left = left_axes(np.array([[3.0, 0.0], [-3.0, 0.0]]))
    >>> values.round(12).tolist(), np.abs(left).round(3).tolist()
    ([18.0], [[0.707], [0.707]])
    """
    count, width = centered.shape
    few = count <= width
    values, vectors = eigen(centered @ centered.T if few else centered.T @ centered)
    kept = values > _NEGLIGIBLE * max(values[-1], 0)
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if few else centered @ (vectors / np.sqrt(values))


def eigen(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, which is overwritten.

    Divide and conquer takes three quarters of the time of SciPy's default.
    """
    values, vectors = scipy.linalg.eigh(
        products, driver="evd", overwrite_a=True, check_finite=False
    )
    return values, vectors


_AT_ONCE = 2**21
"""Logits held at once; more fits than that go one batch after another, in the order given.

A batch lasts as long as its slowest fit, so that with many examples smaller ones waste less.
"""

_BATCH = 8
"""Fits that go together however many examples there are."""

_ROUNDS = (4, 30)
"""Iterations after which one fit alone looks whether its guess of the curvature was good."""

_GOOD = 3.0
"""Factor by which that guess may be wrong; L-BFGS makes up for it."""


def together(
    centered: np.ndarray,
    true: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    dtype: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[np.ndarray, np.ndarray, Solution]:
    """All fits, along the principal axes of all examples.

    Args:
      centered: float64 ``[examples, features]``, of mean 0.
      true: bool ``[examples, classes]``.
      weights: ``[fits, examples]``.
      strengths: ``[fits]``.
      dtype: to solve in.
      tolerance: gap to the optimum, as a share of the loss.
      max_iterations: of each fit.

    Returns:
      Kernels ``[fits, features, classes]``, biases ``[fits, classes]`` for centered features, and
      how well they were solved.

    References:
      D. Böhning, "Multinomial Logistic Regression Algorithm", 1992 (one curvature for all fits).
      T. Hastie, R. Tibshirani, "Efficient Quadratic Regularization for Expression Arrays", 2004
      (fewer examples than features).
    """
    values, rotated, back = _rotate(centered, dtype)
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
    centered: np.ndarray,
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
    matrix = centered.astype(dtype)
    few = len(matrix) < matrix.shape[1]
    if few:
        (packed, tau), upper = scipy.linalg.qr(matrix.T, mode="raw", check_finite=False)
        matrix = np.ascontiguousarray(upper.T)
    products = matrix.T @ matrix
    (count, classes), penalty = true.shape, strengths.astype(dtype)
    # Here for all rounds.
    problem = jax.device_put(Problem(_with_bias(matrix), true, weights.T.astype(dtype), penalty))
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


def _rotate(centered: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared singular values, examples on the principal axes in ``dtype``, and the axes.

    With more examples than features any orthogonal axes are exact, and approximately principal ones
    are as good a guess: products in ``dtype``.
    """
    if len(centered) <= centered.shape[1]:
        values, left = left_axes(centered)
        return values, (left * np.sqrt(values)).astype(dtype), centered.T @ (left / np.sqrt(values))
    matrix = centered.astype(dtype)
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


@dataclass(frozen=True)
class LogisticPath:
    """A linear classifier for each fit, and how well each was solved.

    Args:
      strengths: ``[fits]``.
      kernels: ``[fits, features, classes]``; each sums to 0 over the classes.
      biases: ``[fits, classes]``, sum 0.
      logits: of the examples that were given, those of weight 0 included,
        ``[fits, examples, classes]``.
      losses: the objective, penalty included, divided by the sum of the weights, ``[fits]``.
      gradient_norms: Euclidean norm of the gradient of ``losses`` in kernel and bias, ``[fits]``.
      gaps: estimated share of a loss that is above its optimum, ``[fits]``: half the square of the
        gradient in the metric of the inverse Hessian's estimate.
      iterations: of L-BFGS, int ``[fits]``.
      tolerance: the gap that was asked for.
    """

    strengths: np.ndarray
    kernels: np.ndarray
    biases: np.ndarray
    logits: np.ndarray
    losses: np.ndarray
    gradient_norms: np.ndarray
    gaps: np.ndarray
    iterations: np.ndarray
    tolerance: float

    @property
    def converged(self) -> np.ndarray:
        """Bool ``[fits]``."""
        return self.gaps <= self.tolerance

    def log_probs(self, features: Any) -> np.ndarray:
        """Log-probabilities of other examples, ``[fits, examples, classes]``.

        Raises:
          ValueError: another number of features.
        """
        matrix = matching(features, self.kernels.shape[1], self.kernels.dtype)
        logits = matrix @ self.kernels + self.biases[:, None]
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[fits, examples]``."""
        return self.log_probs(features).argmax(axis=-1)


def logistic_path(
    features: Any,
    labels: Any,
    strengths: float | Sequence[float] = 1.0,
    *,
    weights: Any = None,
    classes: int | None = None,
    tolerance: float | None = None,
    max_iterations: int = 500,
) -> LogisticPath:
    """Fits every strength and every choice of examples, all at once.

    Each fit minimizes ``sum(weights * cross_entropy) + strength / 2 * sum(kernel ** 2)``, the bias
    without penalty: scikit-learn's ``LogisticRegression(C=1 / strength)`` with three classes or
    more. With two, scikit-learn keeps one column where there are two here, and its ``C`` is
    ``2 / strength``.

    Several fits share one rotation of the features to their principal axes. That is exact: an L2
    penalty does not see a rotation, and the optimum has no part outside the span of the examples,
    so that with fewer examples than features there are only as many unknowns as examples. Along
    these axes the Hessian is close to diagonal for every strength and fold, which L-BFGS takes as
    its first guess: it needs tens of iterations rather than hundreds. For one fit alone there is
    nothing to share: the first guess is the inverse of a matrix, which costs a fifth of the axes.

    Args:
      features: ``[examples, features]``, finite; standardize them, for the penalty is the same for
        all. Solved in float32, or in float64 with ``jax_enable_x64``.
      labels: integers ``[examples]``, 0 .. classes - 1.
      strengths: penalties above 0, ``[fits]``, or one for all fits. (At 0 separable classes have
        no optimum.)
      weights: of the examples, 0 or more, ``[fits, examples]`` or ``[examples]`` for all fits.
        0 and 1 select folds. Default: 1.
      classes: how many there are; by default as many as the labels say.
      tolerance: a fit is finished when its loss is above the optimum by this share, as estimated.
        (A norm of the gradient would let weak strengths go far too early, whose losses are small.)
        Default: 1e-7 in float32, 1e-15 in float64, which is about three and seven correct digits of
        the coefficients. On classes that are all but separable the weakest strengths may end above
        it in float32: ``gaps`` says by how much.
      max_iterations: where a fit ends otherwise, if 100 iterations without progress did not end it
        before; then it is not ``converged``.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, one class, a class without an
        example of weight above 0, strengths that are not above 0.
      TypeError: labels that are no integers.

    References:
      D. C. Liu, J. Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", 1989.
      D. Böhning, "Multinomial Logistic Regression Algorithm", 1992 (one curvature for all fits).
      T. Hastie, R. Tibshirani, "Efficient Quadratic Regularization for Expression Arrays", 2004
      (fewer examples than features).

    >>> random = np.random.default_rng(0)
    >>> labels = np.arange(60) % 3
    >>> features = random.normal(size=(60, 200)) + 2 * np.eye(200)[labels]
    >>> path = logistic_path(features, labels, [1.0, 100.0])
    >>> path.kernels.shape, bool(path.converged.all())
    ((2, 200, 3), True)
    """
    matrix, label, number = examples(features, labels, classes)
    penalties, shares = _fits(label, number, strengths, weights)
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    if tolerance is None:
        tolerance = 1e-7 if dtype == np.float32 else 1e-15
    middle = matrix.mean(axis=0)
    solver = alone if len(penalties) == 1 else together
    kernels, biases, solved = solver(
        matrix - middle,
        np.eye(number, dtype=bool)[label],
        shares,
        penalties,
        dtype,
        tolerance,
        max_iterations,
    )
    biases = biases - middle @ kernels
    return LogisticPath(
        penalties,
        kernels.astype(dtype),
        (biases - biases.mean(axis=1, keepdims=True)).astype(dtype),
        np.moveaxis(solved.logits, 2, 0),
        solved.losses,
        solved.gradient_norms,
        solved.gaps,
        solved.iterations,
        tolerance,
    )


def _fits(
    label: np.ndarray, number: int, strengths: Any, weights: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Strengths ``[fits]`` and weights ``[fits, examples]``."""
    penalties = np.asarray(strengths, np.float64)
    if penalties.ndim > 1 or not penalties.size or not (penalties > 0).all():
        raise ValueError(f"strengths are numbers above 0, one or more, not {penalties.tolist()}")
    shares = np.ones(len(label)) if weights is None else np.asarray(weights, np.float64)
    if shares.ndim not in (1, 2) or shares.shape[-1] != len(label):
        raise ValueError(
            f"weights have shape {shares.shape}, wanted [fits, {len(label)}] or [{len(label)}]"
        )
    if not (np.isfinite(shares).all() and (shares >= 0).all()):
        raise ValueError("weights are finite and 0 or more")
    if shares.ndim == 2 and penalties.ndim == 1 and len(penalties) not in (1, len(shares)):
        raise ValueError(f"there are {len(penalties)} strengths and {len(shares)} rows of weights")
    fits = len(shares) if shares.ndim == 2 else penalties.size
    shares = np.broadcast_to(shares, (fits, len(label)))
    seen = (shares > 0) @ np.eye(number)[label] > 0
    if missing := np.flatnonzero(~seen.all(axis=0)).tolist():
        raise ValueError(
            f"classes {missing} have no example of weight above 0 in some fit: their bias has no "
            "optimum; leave them out or number the labels anew"
        )
    return np.broadcast_to(penalties, fits), shares
