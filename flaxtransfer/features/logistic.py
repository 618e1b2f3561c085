"""Multinomial logistic regression to the optimum: many strengths and many folds in one program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxtransfer.features.checks import examples, matching
from flaxtransfer.features.logistic_fits import alone, together

__all__ = ["LogisticPath", "logistic_path"]


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

    Each fit minimises ``sum(weights * cross_entropy) + strength / 2 * sum(kernel ** 2)``, the bias
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
      features: ``[examples, features]``, finite; standardise them, for the penalty is the same for
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
        matrix - middle, np.eye(number, dtype=bool)[label], shares, penalties,
        dtype, tolerance, max_iterations,
    )  # fmt: skip
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
