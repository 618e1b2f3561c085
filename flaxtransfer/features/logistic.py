"""Multinomial logistic regression.

``logistic_path`` solves many penalties and folds to the optimum in one compiled program. Use
``features.sweep`` to choose the penalty by cross-validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.linalg

from flaxtransfer.features.inputs import checked_examples, checked_features
from flaxtransfer.features.lbfgs import (
    DensePreconditioner,
    DiagonalPreconditioner,
    Problem,
    Solution,
    solve,
)

__all__ = ["LogisticPath", "eigh", "fit_many", "fit_one", "left_singular_vectors", "logistic_path"]


@dataclass(frozen=True)
class LogisticPath:
    """Logistic regressions of several penalties and sets of weights, and how well they converged.

    Args:
        strengths: ``[fits]``.
        kernels: ``[fits, features, classes]``; each sums to 0 over the classes.
        biases: ``[fits, classes]``, sum 0.
        logits: of the training examples, those of weight 0 included, ``[fits, examples, classes]``.
        losses: the objective, penalty included, divided by the sum of the weights, ``[fits]``.
        gradient_norms: Euclidean norm of the gradient of ``losses`` in kernel and bias, ``[fits]``.
        gaps: estimated fraction of the loss that is above its optimum, ``[fits]``: half the square
            of the gradient in the metric of the estimated inverse Hessian.
        iterations: of L-BFGS, int ``[fits]``.
        tolerance: gap at which a fit counts as converged.
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
        """Log-probabilities ``[fits, examples, classes]``.

        Raises:
            ValueError: another number of features.
        """
        matrix = checked_features(features, self.kernels.shape[1], self.kernels.dtype)
        logits = matrix @ self.kernels + self.biases[:, None]
        logits -= logits.max(axis=-1, keepdims=True)
        log_probs: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return log_probs

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[fits, examples]``."""
        predicted: np.ndarray = self.log_probs(features).argmax(axis=-1)
        return predicted


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
    """Multinomial logistic regression, for every penalty and every set of weights at once.

    Use it for several penalties or folds on one set of features. Each fit minimizes
    ``sum(weights * cross_entropy) + strength / 2 * sum(kernel ** 2)``, the bias without penalty:
    scikit-learn's ``LogisticRegression(C=1 / strength)`` with three classes or more. With two,
    scikit-learn has one column instead of two, and its ``C`` is ``2 / strength``.

    Several fits share one rotation of the features to their principal axes. That is exact: an L2
    penalty is invariant to rotation, and the optimum is in the span of the examples, so that with
    fewer examples than features there are only as many unknowns as examples. Along these axes the
    Hessian is close to diagonal for every strength and fold, which preconditions L-BFGS: it needs
    tens of iterations instead of hundreds. A single fit uses the inverse of a matrix instead, which
    costs a fifth of the axes.

    Args:
        features: ``[examples, features]``, finite; standardize them, because all have
            the same penalty. Solved in float32, or in float64 with ``jax_enable_x64``.
        labels: integers ``[examples]``, 0 .. classes - 1.
        strengths: penalties above 0, ``[fits]``, or one for all fits. (At 0 separable classes have
            no optimum.)
        weights: of the examples, 0 or more, ``[fits, examples]`` or ``[examples]`` for all fits. 0
            and 1 select folds. Default: 1.
        classes: number of classes; default: the largest label plus 1.
        tolerance: a fit is finished when its estimated loss exceeds the optimum by this fraction.
            (The norm of the gradient would stop weak penalties, whose losses are small, far too
            early.) Default: 1e-7 in float32, 1e-15 in float64, which is about three and seven
            correct digits of the coefficients. On nearly separable classes the weakest penalties
            may end above it in float32; see ``gaps``.
        max_iterations: a fit that reaches it, or 100 iterations without progress, is not
            ``converged``.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, one class, a class without
            an example of weight above 0, strengths that are not above 0.
        TypeError: labels that are not integers.

    References:
        D. C. Liu, J. Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization",
        1989.
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
    matrix, label, number = checked_examples(features, labels, classes)
    penalties, weight_rows = _fits(label, number, strengths, weights)
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    if tolerance is None:
        tolerance = 1e-7 if dtype == np.float32 else 1e-15
    mean = matrix.mean(axis=0)
    fit = fit_one if len(penalties) == 1 else fit_many
    kernels, biases, solved = fit(
        matrix - mean,
        np.eye(number, dtype=bool)[label],
        weight_rows,
        penalties,
        dtype,
        tolerance,
        max_iterations,
    )
    biases = biases - mean @ kernels
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
        raise ValueError(f"strengths must be > 0, one or more, got {penalties.tolist()}")
    weight_rows = np.ones(len(label)) if weights is None else np.asarray(weights, np.float64)
    if weight_rows.ndim not in (1, 2) or weight_rows.shape[-1] != len(label):
        raise ValueError(
            f"weights must have shape [fits, {len(label)}] or [{len(label)}], got "
            f"{weight_rows.shape}"
        )
    if not (np.isfinite(weight_rows).all() and (weight_rows >= 0).all()):
        raise ValueError("weights must be finite and >= 0")
    if (
        weight_rows.ndim == 2
        and penalties.ndim == 1
        and len(penalties) not in (1, len(weight_rows))
    ):
        raise ValueError(
            f"strengths must be one, or one per row of weights ({len(weight_rows)}), got "
            f"{len(penalties)}"
        )
    fits = len(weight_rows) if weight_rows.ndim == 2 else penalties.size
    weight_rows = np.broadcast_to(weight_rows, (fits, len(label)))
    seen = (weight_rows > 0) @ np.eye(number)[label] > 0
    if missing := np.flatnonzero(~seen.all(axis=0)).tolist():
        raise ValueError(
            "every class must have an example of weight > 0 in every fit, classes "
            f"{missing} have no example in some; leave them out and renumber the labels"
        )
    return np.broadcast_to(penalties, fits), weight_rows


_NEGLIGIBLE = 1e-12
"""Fraction of the largest eigenvalue below which an eigenvalue is rounding, in float64."""

_BATCH_LOGITS = 2**21
"""Logits per batch of fits, at most.

A batch takes as long as its slowest fit, so that with many examples small batches waste less.
"""

_LEAST_BATCH = 8
"""Fits per batch, at least, however many examples there are."""

_CHECKS = (4, 30)
"""Iterations after which a single fit checks its estimate of the curvature."""

_CURVATURE_FACTOR = 3.0
"""Factor by which that estimate may be wrong; L-BFGS compensates for it."""


def fit_many(
    centered: np.ndarray,
    one_hot: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    dtype: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[np.ndarray, np.ndarray, Solution]:
    """Solves many fits along the principal axes of all examples.

    Args:
        centered: float64 ``[examples, features]``, of mean 0.
        one_hot: bool ``[examples, classes]``, the labels.
        weights: ``[fits, examples]``.
        strengths: ``[fits]``.
        dtype: of the computation.
        tolerance: gap to the optimum, as a fraction of the loss.
        max_iterations: per fit.

    Returns:
        Kernels ``[fits, features, classes]``, biases ``[fits, classes]`` for centered features, and
        the solution of the solver.

    References:
        D. Böhning, "Multinomial Logistic Regression Algorithm", 1992 (one curvature for all fits).
        T. Hastie, R. Tibshirani, "Efficient Quadratic Regularization for Expression Arrays", 2004
        (fewer examples than features).
    """
    values, rotated, axes = _rotate(centered, dtype)
    design = _with_bias(rotated)
    preconditioner = DiagonalPreconditioner(np.append(values, len(design)).astype(dtype))
    (count, classes), fits = one_hot.shape, len(strengths)
    most = max(_LEAST_BATCH, _BATCH_LOGITS // (count * classes))
    # All batches have one size (the last is padded), so that one program serves all of them.
    size = -(-fits // -(-fits // most))
    origin = np.zeros((design.shape[1], classes, size), dtype)
    logits = np.zeros((count, classes, size), dtype)
    parts = []
    for start in range(0, fits, size):
        chosen = np.minimum(np.arange(start, start + size), fits - 1)
        penalties = strengths[chosen].astype(dtype)
        problem = Problem(design, one_hot, weights[chosen].T.astype(dtype), penalties)
        part = solve(problem, origin, logits, preconditioner, tolerance, max_iterations)
        parts.append([np.asarray(field)[..., : fits - start] for field in part])
    solved = Solution(*(np.concatenate(field, axis=-1) for field in zip(*parts, strict=True)))
    kernels = np.moveaxis(np.tensordot(axes, solved.coefficients[:-1], 1), 2, 0)
    return kernels, solved.coefficients[-1].T, solved


def fit_one(
    centered: np.ndarray,
    one_hot: np.ndarray,
    weights: np.ndarray,
    strengths: np.ndarray,
    dtype: Any,
    tolerance: float,
    max_iterations: int,
) -> tuple[np.ndarray, np.ndarray, Solution]:
    """Solves one fit, with a dense preconditioner.

    It is ``(curvature * X'X + strength)^-1``, in which the curvature, the mean of ``p (1 - p)``, is
    only known at the optimum: it is compared with the actual one after a few iterations, and the
    preconditioner is made again if it was far off. With fewer examples than features these are
    first reduced, exactly, to as many as there are examples, by a QR decomposition.

    Args and Returns as for ``fit_many``.
    """
    matrix = centered.astype(dtype)
    few = len(matrix) < matrix.shape[1]
    if few:
        (packed, tau), upper = scipy.linalg.qr(matrix.T, mode="raw", check_finite=False)
        matrix = np.ascontiguousarray(upper.T)
    products = matrix.T @ matrix
    (count, classes), penalty = one_hot.shape, strengths.astype(dtype)
    # On the device for all rounds.
    problem = jax.device_put(Problem(_with_bias(matrix), one_hot, weights.T.astype(dtype), penalty))
    coefficients: Any = np.zeros((matrix.shape[1] + 1, classes, 1), dtype)
    logits: Any = np.zeros((count, classes, 1), dtype)
    curvature = float(weights.mean()) / classes * (1 - 1 / classes)
    taken, checks = 0, iter(_CHECKS)
    while True:
        preconditioner = DensePreconditioner(
            _inverse(products, curvature, float(penalty[0])), dtype.type(curvature * count)
        )
        most = min(next(checks, max_iterations), max_iterations - taken)
        solved = solve(problem, coefficients, logits, preconditioner, tolerance, most)
        taken += int(solved.iterations[0])
        coefficients, logits = solved.coefficients, solved.logits
        actual = float(solved.curvature[0])
        finished = bool(solved.gaps[0] <= tolerance) or int(solved.iterations[0]) < most
        close = curvature / _CURVATURE_FACTOR <= actual <= curvature * _CURVATURE_FACTOR
        if taken >= max_iterations or (finished and close):
            break
        curvature = curvature if close else max(actual, float(np.finfo(dtype).eps))
    solved = jax.tree.map(np.asarray, solved)._replace(iterations=np.array([taken]))
    kernel = solved.coefficients[:-1, :, 0]
    if few:
        kernel = _rotate_back(packed, tau, kernel)
    return kernel[None], solved.coefficients[-1].T, solved


def left_singular_vectors(centered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values and left singular vectors, without those of variance 0.

    They come from the smaller of the two Gram matrices. Squaring in float32 would lose all singular
    values below 3e-4 of the largest; float64 keeps those above 1e-6.

    Args:
        centered: float64 ``[examples, features]``.

    Returns:
        ``[rank]``, ascending, and ``[examples, rank]``.

    >>> values, left = left_singular_vectors(np.array([[3.0, 0.0], [-3.0, 0.0]]))
    >>> values.round(12).tolist(), np.abs(left).round(3).tolist()
    ([18.0], [[0.707], [0.707]])
    """
    count, width = centered.shape
    few = count <= width
    values, vectors = eigh(centered @ centered.T if few else centered.T @ centered)
    kept = values > _NEGLIGIBLE * max(values[-1], 0)
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if few else centered @ (vectors / np.sqrt(values))


def eigh(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, which is overwritten.

    Divide and conquer takes three quarters of the time of SciPy's default.
    """
    values, vectors = scipy.linalg.eigh(
        products, driver="evd", overwrite_a=True, check_finite=False
    )
    return values, vectors


def _with_bias(matrix: np.ndarray) -> np.ndarray:
    return np.column_stack([matrix, np.ones(len(matrix), matrix.dtype)])


def _rotate(centered: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared singular values, examples on the principal axes in ``dtype``, and the axes.

    With more examples than features any orthogonal axes are exact, and approximately principal ones
    precondition as well, so that the products are in ``dtype``.
    """
    if len(centered) <= centered.shape[1]:
        values, left = left_singular_vectors(centered)
        return values, (left * np.sqrt(values)).astype(dtype), centered.T @ (left / np.sqrt(values))
    matrix = centered.astype(dtype)
    _, axes = eigh((matrix.T @ matrix).astype(np.float64))
    rotated = matrix @ axes.astype(dtype)
    return np.square(rotated).sum(axis=0), rotated, axes


def _inverse(products: np.ndarray, curvature: float, penalty: float) -> np.ndarray:
    """``(curvature * products + penalty)^-1``, with a penalty that keeps it positive definite."""
    least = 10 * float(np.finfo(products.dtype).eps) * curvature * float(np.linalg.norm(products))
    penalty = max(penalty, least)
    while True:
        matrix = products * products.dtype.type(curvature)
        matrix[np.diag_indices_from(matrix)] += penalty
        try:
            lower = scipy.linalg.cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
            break
        except scipy.linalg.LinAlgError:
            penalty *= 10
    (invert,) = scipy.linalg.get_lapack_funcs(("potri",), (lower,))
    half, _ = invert(lower, lower=True, overwrite_c=True)
    inverse: np.ndarray = half + np.tril(half, -1).T
    return inverse


def _rotate_back(packed: np.ndarray, tau: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """Q times ``[examples, classes]``, without forming Q: ``[features, classes]``."""
    (apply,) = scipy.linalg.get_lapack_funcs(("ormqr",), (packed,))
    padded = np.zeros((len(packed), reduced.shape[1]), packed.dtype, order="F")
    padded[: len(reduced)] = reduced
    _, size, _ = apply("L", "N", packed, tau, padded, -1)
    product: np.ndarray = apply("L", "N", packed, tau, padded, int(size[0]), overwrite_c=True)[0]
    return product
