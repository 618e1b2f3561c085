"""Multinomial logistic regression to the optimum: many strengths and many folds in one program."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

__all__ = ["LogisticPath", "logistic_path"]

_NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue below which a direction is rounding, in float64."""

_MEMORY = 4
"""Pairs of L-BFGS; few are enough where the first guess of the inverse Hessian is this good."""

_TRIALS = 10
"""Steps tried along one direction at most; one or two are the rule."""

_PATIENCE = 100
"""Iterations without progress after which a fit is as good as its precision allows."""

_AT_ONCE = 2**21
"""Logits held at once; more fits than that go one batch after another, in the order given.

A batch lasts as long as its slowest fit, so that with many examples smaller ones waste less.
"""

_BATCH = 8
"""Fits that go together however many examples there are."""


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
        matrix = np.asarray(features, self.kernels.dtype)
        if matrix.ndim != 2 or matrix.shape[1] != self.kernels.shape[1]:
            raise ValueError(
                f"features have shape {matrix.shape}, wanted [examples, {self.kernels.shape[1]}]"
            )
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

    The features are rotated to their principal axes first. That is exact: an L2 penalty
    does not see a rotation, and the optimum has no part outside the span of the examples, so that
    with fewer examples than features there are only as many unknowns as examples. Along these
    axes the Hessian is close to diagonal for every strength and fold, which L-BFGS takes as its
    first guess: it needs tens of iterations rather than hundreds. Steps are searched along logits,
    which are linear in the step, so that a trial costs no pass over the features.

    The rotation is paid for once. It is a bargain for many fits; one fit alone may take as long as
    scikit-learn's or longer.

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
    matrix, label, penalties, shares, number = _checked(
        features, labels, strengths, weights, classes
    )
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    if tolerance is None:
        tolerance = 1e-7 if dtype == np.float32 else 1e-15
    middle = matrix.mean(axis=0)
    values, rotated, back = _rotate(matrix - middle, dtype)
    design = np.column_stack([rotated, np.ones(len(matrix))]).astype(dtype)
    curvature = np.append(values, len(matrix)).astype(dtype)

    fits = len(penalties)
    most = max(_BATCH, _AT_ONCE // (len(matrix) * number))
    # All batches have one size, the last is filled up, so that one program serves all of them.
    size = -(-fits // -(-fits // most))
    parts = []
    for start in range(0, fits, size):
        chosen = np.minimum(np.arange(start, start + size), fits - 1)
        # The start is an argument: as a constant it would be worked out by the compiler, slowly.
        part = _solve(
            np.zeros((len(matrix), number, size), dtype),
            design, curvature, np.eye(number, dtype=bool)[label], shares[chosen].T.astype(dtype),
            penalties[chosen].astype(dtype), tolerance, max_iterations,
        )  # fmt: skip
        parts.append(jax.tree.map(lambda x: np.asarray(x)[: fits - start], part))  # noqa: B023
    solved = _Solution(*(np.concatenate(field) for field in zip(*parts, strict=True)))
    kernels = np.moveaxis(np.tensordot(back, solved.coefficients[:, :-1], (1, 1)), 0, 1)
    biases = solved.coefficients[:, -1] - middle @ kernels
    return LogisticPath(
        penalties,
        kernels.astype(dtype),
        (biases - biases.mean(axis=1, keepdims=True)).astype(dtype),
        solved.logits,
        solved.losses,
        solved.gradient_norms,
        solved.gaps,
        solved.iterations,
        tolerance,
    )


def _rotate(centred: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared singular values, examples on the principal axes in ``dtype``, and the axes.

    With fewer examples than features the axes come out of the examples' products, and squaring in
    float32 would lose all below 3e-4 of the largest: float64. With more, any orthogonal axes
    are exact, and approximately principal ones are as good a guess: products in ``dtype``.
    """
    count, width = centred.shape
    if count <= width:
        values, left = scipy.linalg.eigh(centred @ centred.T, driver="evd")
        kept = values > _NEGLIGIBLE * max(values[-1], 0)
        values, left = values[kept], left[:, kept]
        rotated = (left * np.sqrt(values)).astype(dtype)
        return values, rotated, centred.T @ (left / np.sqrt(values))
    matrix = centred.astype(dtype)
    _, axes = scipy.linalg.eigh((matrix.T @ matrix).astype(np.float64), driver="evd")
    rotated = matrix @ axes.astype(dtype)
    return np.square(rotated).sum(axis=0), rotated, axes


class _Solution(NamedTuple):
    """With fits first."""

    coefficients: Any
    logits: Any
    losses: Any
    gradient_norms: Any
    gaps: Any
    iterations: Any


class _Point(NamedTuple):
    """Coefficients and gradient ``[axes, classes, fits]``, logits ``[examples, classes, fits]``."""

    coefficients: Any
    logits: Any
    loss: Any  # [fits], not yet divided
    gradient: Any
    curvature: Any  # of the Hessian's diagonal, estimated


class _State(NamedTuple):
    iteration: Any
    point: _Point
    steps: Any  # [memory, axes, classes, fits]
    changes: Any
    gaps: Any  # [fits]
    best: Any  # [fits], the smallest gap that counted as progress
    stale: Any  # [fits], iterations since
    iterations: Any

    def active(self, tolerance: Any) -> Any:
        """Fits that are worth another iteration, bool ``[fits]``."""
        return (self.gaps > tolerance) & (self.stale < _PATIENCE)


# The accelerators' default for float32 products is three digits.
_dot = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)


def _inner(a: Any, b: Any) -> Any:
    return jnp.sum(a * b, axis=(0, 1))


@functools.partial(jax.jit, static_argnames="memory")
def _solve(
    logits: Any,
    design: Any,
    curvature: Any,
    target: Any,
    weights: Any,
    strengths: Any,
    tolerance: Any,
    max_iterations: Any,
    memory: int = _MEMORY,
) -> _Solution:
    """L-BFGS on all fits in step; fits that are done stand still."""
    (count, width), classes, fits = design.shape, target.shape[1], len(strengths)
    true = target[:, :, None]
    penalty = jnp.ones((width, 1, 1), design.dtype).at[-1].set(0) * strengths
    floor = jnp.finfo(design.dtype).eps

    def point(coefficients: Any, logits: Any) -> _Point:
        relative = logits - jnp.max(logits, axis=1, keepdims=True)
        powers = jnp.exp(relative)
        total = jnp.sum(powers, axis=1)
        probs = powers / total[:, None]
        # Confident examples have a probability of 1 to rounding. What is left to 1 is not rounded.
        others = jnp.where(true, 0, probs)
        missing = jnp.sum(others, axis=1)
        likely = jnp.log1p(-jnp.minimum(missing, 0.5))
        unlikely = jnp.sum(jnp.where(true, relative, 0), axis=1) - jnp.log(total)
        loss = -jnp.sum(jnp.where(missing < 0.5, likely, unlikely) * weights, axis=0)
        residual = jnp.where(true, -missing[:, None], probs) * weights[:, None]
        # How much of the curvature of the features is left, by class: the mean of p (1 - p).
        left = jnp.sum(probs * (1 - probs) * weights[:, None], axis=0) / count
        return _Point(
            coefficients,
            logits,
            loss + _inner(penalty * coefficients, coefficients) / 2,
            _dot(design, residual, ((0,), (0,))) + penalty * coefficients,
            curvature[:, None, None] * jnp.maximum(left, floor) + penalty,
        )

    def gap(at: _Point) -> Any:
        return _inner(at.gradient, at.gradient / at.curvature) / 2 / at.loss

    def direction(state: _State) -> Any:
        # The two-loop recursion. Pairs that were not made yet are zeros and have no say.
        slots = (state.iteration - 1 - jnp.arange(memory)) % memory

        def back(vector: Any, slot: Any) -> tuple[Any, Any]:
            step, change = state.steps[slot], state.changes[slot]
            share = _reciprocal(_inner(step, change)) * _inner(step, vector)
            return vector - share * change, share

        def forth(vector: Any, one: Any) -> tuple[Any, None]:
            slot, share = one
            step, change = state.steps[slot], state.changes[slot]
            other = _reciprocal(_inner(step, change)) * _inner(change, vector)
            return vector + step * (share - other), None

        vector, shares = jax.lax.scan(back, state.point.gradient, slots)
        vector = vector / state.point.curvature
        # What all classes have in common changes no probability: the penalty alone would take it
        # back, over many iterations.
        vector = vector - vector.mean(axis=1, keepdims=True)
        vector, _ = jax.lax.scan(forth, vector, (slots, shares), reverse=True)
        return -vector

    def iterate(state: _State) -> _State:
        here, way, active = state.point, direction(state), state.active(tolerance)
        move = _dot(design, way, ((1,), (0,)))
        # Relative to the true class, which changes no probability and cancels nothing later.
        move = move - jnp.sum(jnp.where(true, move, 0), axis=1, keepdims=True)
        size = _step_size(
            here.logits, move, weights, _inner(penalty * here.coefficients, way),
            _inner(penalty * way, way), _inner(here.gradient, way), active,
        )  # fmt: skip
        there = point(here.coefficients + size * way, here.logits + size * move)
        slot = state.iteration % memory
        return _State(
            state.iteration + 1,
            there,
            state.steps.at[slot].set(size * way),
            state.changes.at[slot].set(there.gradient - here.gradient),
            (now := gap(there)),
            jnp.where(now < 0.9 * state.best, now, state.best),
            jnp.where(now < 0.9 * state.best, 0, state.stale + active),
            state.iterations + active,
        )

    nothing = jnp.zeros((width, classes, fits), design.dtype)
    start = point(nothing, logits)
    zeros = jnp.zeros(fits, int)
    history = jnp.zeros((memory, *nothing.shape), design.dtype)
    state = jax.lax.while_loop(
        lambda state: (state.iteration < max_iterations) & state.active(tolerance).any(),
        iterate,
        _State(0, start, history, history, gap(start), gap(start), zeros, zeros),
    )
    # Logits were added up step by step: what is reported is computed afresh.
    coefficients = state.point.coefficients
    end = point(coefficients, _dot(design, coefficients, ((1,), (0,))))
    total = jnp.sum(weights, axis=0)
    return _Solution(
        jnp.moveaxis(coefficients, 2, 0),
        jnp.moveaxis(end.logits, 2, 0),
        end.loss / total,
        jnp.sqrt(_inner(end.gradient, end.gradient)) / total,
        gap(end),
        state.iterations,
    )


def _step_size(
    logits: Any, move: Any, weights: Any, tilt: Any, bend: Any, slope: Any, active: Any
) -> Any:
    """Step along ``move`` at which the slope is a tenth of the first or less, 0 where not active.

    The objective is convex along the way, so its slope rises: Newton's method on it, kept between
    the last step that was too short and the last that was too long.
    """

    def trial(carry: tuple) -> tuple:
        n, size, low, high, searching = carry
        probs = jax.nn.softmax(logits + size * move, axis=1)
        mean = jnp.sum(probs * move, axis=1)
        rise = jnp.sum(mean * weights, axis=0) + tilt + size * bend
        spread = jnp.sum(probs * jnp.square(move), axis=1) - jnp.square(mean)
        curve = jnp.sum(spread * weights, axis=0) + bend
        low, high = jnp.where(rise < 0, size, low), jnp.where(rise < 0, high, size)
        newton = size - rise * _reciprocal(curve)
        halfway = jnp.where(jnp.isinf(high), 2 * size, (low + high) / 2)
        better = jnp.where((newton > low) & (newton < high), newton, halfway)
        searching = searching & (jnp.abs(rise) > 0.1 * jnp.abs(slope))
        return n + 1, jnp.where(searching, better, size), low, high, searching

    ones = jnp.ones_like(slope)
    start = (0, ones, 0 * ones, jnp.inf * ones, active)
    _, size, *_ = jax.lax.while_loop(lambda c: (c[0] < _TRIALS) & c[-1].any(), trial, start)
    return jnp.where(active & (slope < 0), size, 0)


def _reciprocal(x: Any) -> Any:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _checked(
    features: Any, labels: Any, strengths: Any, weights: Any, classes: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Features in float64, labels, strengths ``[fits]``, weights ``[fits, examples]``, classes."""
    matrix, label = np.asarray(features, np.float64), np.asarray(labels)
    penalties = np.asarray(strengths, np.float64)
    if not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"labels are {label.dtype}, wanted integers")
    if matrix.ndim != 2 or label.shape != matrix.shape[:1] or not matrix.size:
        raise ValueError(
            f"features have shape {matrix.shape} and labels {label.shape}; wanted "
            "[examples, features] and [examples]"
        )
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"{wrong} of {len(matrix)} examples have features that are not finite")
    if penalties.ndim > 1 or not penalties.size or not (penalties > 0).all():
        raise ValueError(f"strengths are numbers above 0, one or more, not {penalties.tolist()}")
    number = int(label.max()) + 1 if classes is None else classes
    if label.min() < 0 or label.max() >= number:
        raise ValueError(
            f"labels go from {label.min()} to {label.max()}; there are {number} classes"
        )
    if len(np.unique(label)) < 2:
        raise ValueError(f"all examples are of class {label[0]}; a classifier needs two or more")
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
    return matrix, label, np.broadcast_to(penalties, fits), shares, number
