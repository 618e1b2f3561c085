"""L-BFGS for multinomial logistic regression.

Many fits run side by side in one compiled program, each with a preconditioner that is close to the
inverse Hessian. It is the solver of ``features.logistic``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["DensePreconditioner", "DiagonalPreconditioner", "Problem", "Solution", "solve"]


_MEMORY = 4
"""Pairs of L-BFGS; with a good preconditioner few are enough."""

_LINE_SEARCH_STEPS = 10
"""Most steps tried along one direction; usually one or two."""

_PATIENCE = 100
"""Iterations without progress after which a fit has reached the precision of its dtype."""


class Problem(NamedTuple):
    """The fits; the last column of the design is 1, and its coefficient has no penalty."""

    design: Any  # [examples, axes]
    one_hot: Any  # bool [examples, classes]
    weights: Any  # [examples, fits]
    strengths: Any  # [fits]


class DiagonalPreconditioner(NamedTuple):
    """Diagonal preconditioner along principal axes, shared by all fits."""

    squares: Any  # [axes], squared norms of the columns of the design


class DensePreconditioner(NamedTuple):
    """Inverse Hessian estimate for one fit, along any axes."""

    matrix: Any  # [axes - 1, axes - 1], inverse Hessian without the bias
    bias: Any  # curvature of the bias


class Solution(NamedTuple):
    """The solved fits; fits are the last axis."""

    coefficients: Any  # [axes, classes, fits]
    logits: Any  # [examples, classes, fits]
    losses: Any  # [fits], like all below
    gradient_norms: Any
    gaps: Any
    iterations: Any
    curvature: Any  # mean of p (1 - p): scale of the Hessian relative to the features' products


class _Point(NamedTuple):
    """Coefficients and gradient ``[axes, classes, fits]``, logits ``[examples, classes, fits]``."""

    coefficients: Any
    logits: Any
    loss: Any  # [fits], summed over examples
    gradient: Any
    curvature: Any  # [classes, fits]


class _State(NamedTuple):
    iteration: Any
    point: _Point
    steps: Any  # [memory, axes, classes, fits]
    changes: Any
    gaps: Any  # [fits]
    best: Any  # [fits], the smallest gap so far, where it counted as progress
    stale: Any  # [fits], iterations since then
    iterations: Any

    def active(self, tolerance: Any) -> Any:
        """Fits that need another iteration, bool ``[fits]``."""
        return (self.gaps > tolerance) & (self.stale < _PATIENCE)


# The default precision of float32 products on accelerators is three digits.
_dot = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames="memory")
def solve(
    problem: Problem,
    coefficients: Any,
    logits: Any,
    preconditioner: DiagonalPreconditioner | DensePreconditioner,
    tolerance: Any,
    max_iterations: Any,
    memory: int = _MEMORY,
) -> Solution:
    """Minimizes all fits side by side; finished fits no longer change.

    The line search works on logits, which are linear in the step, so that a trial needs no pass
    over the features.

    Args:
        problem: the fits.
        coefficients: where to start, ``[axes, classes, fits]``.
        logits: of the examples at the start. (They are an argument because the compiler would
            slowly fold constant zeros.)
        preconditioner: estimate of the inverse Hessian.
        tolerance: gap at which a fit is finished.
        max_iterations: iterations, at most.
        memory: number of pairs kept.

    References:
        D. C. Liu, J. Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization",
        1989.
    """
    design, one_hot, weights = problem.design, problem.one_hot[:, :, None], problem.weights
    penalty = jnp.ones((design.shape[1], 1, 1), design.dtype).at[-1].set(0) * problem.strengths

    def point(coefficients: Any, logits: Any) -> _Point:
        relative = logits - jnp.max(logits, axis=1, keepdims=True)
        powers = jnp.exp(relative)
        total = jnp.sum(powers, axis=1)
        probs = powers / total[:, None]
        # The probability of a confident example rounds to 1. Its complement keeps all digits.
        others = jnp.where(one_hot, 0, probs)
        complement = jnp.sum(others, axis=1)
        likely = jnp.log1p(-jnp.minimum(complement, 0.5))
        unlikely = jnp.sum(jnp.where(one_hot, relative, 0), axis=1) - jnp.log(total)
        loss = -jnp.sum(jnp.where(complement < 0.5, likely, unlikely) * weights, axis=0)
        residual = jnp.where(one_hot, -complement[:, None], probs) * weights[:, None]
        return _Point(
            coefficients,
            logits,
            loss + _inner(penalty * coefficients, coefficients) / 2,
            _dot(design, residual, ((0,), (0,))) + penalty * coefficients,
            jnp.sum(probs * (1 - probs) * weights[:, None], axis=0) / len(design),
        )

    def gap(at: _Point) -> Any:
        return (
            _inner(at.gradient, _precondition(preconditioner, at.curvature, penalty, at.gradient))
            / 2
            / at.loss
        )

    def direction(state: _State) -> Any:
        # The two-loop recursion. Pairs that do not exist yet are zeros and contribute nothing.
        slots = (state.iteration - 1 - jnp.arange(memory)) % memory

        def back(vector: Any, slot: Any) -> tuple[Any, Any]:
            step, change = state.steps[slot], state.changes[slot]
            alpha = _reciprocal(_inner(step, change)) * _inner(step, vector)
            return vector - alpha * change, alpha

        def forth(vector: Any, one: Any) -> tuple[Any, None]:
            slot, alpha = one
            step, change = state.steps[slot], state.changes[slot]
            beta = _reciprocal(_inner(step, change)) * _inner(change, vector)
            return vector + step * (alpha - beta), None

        vector, alphas = jax.lax.scan(back, state.point.gradient, slots)
        vector = _precondition(preconditioner, state.point.curvature, penalty, vector)
        # A part that all classes share changes no probability; the penalty alone would remove it,
        # over many iterations.
        vector = vector - vector.mean(axis=1, keepdims=True)
        vector, _ = jax.lax.scan(forth, vector, (slots, alphas), reverse=True)
        return -vector

    def iterate(state: _State) -> _State:
        here, along, active = state.point, direction(state), state.active(tolerance)
        slope = _dot(design, along, ((1,), (0,)))  # of the logits
        # Relative to the true class: probabilities stay, and later sums do not cancel.
        slope = slope - jnp.sum(jnp.where(one_hot, slope, 0), axis=1, keepdims=True)
        size = _step_size(
            here.logits,
            slope,
            weights,
            _inner(penalty * here.coefficients, along),
            _inner(penalty * along, along),
            _inner(here.gradient, along),
            active,
        )
        there = point(here.coefficients + size * along, here.logits + size * slope)
        slot = state.iteration % memory
        return _State(
            state.iteration + 1,
            there,
            state.steps.at[slot].set(size * along),
            state.changes.at[slot].set(there.gradient - here.gradient),
            (now := gap(there)),
            jnp.where(now < 0.9 * state.best, now, state.best),
            jnp.where(now < 0.9 * state.best, 0, state.stale + active),
            state.iterations + active,
        )

    start = point(coefficients, logits)
    zeros = jnp.zeros(len(problem.strengths), int)
    history = jnp.zeros((memory, *coefficients.shape), design.dtype)
    state = jax.lax.while_loop(
        lambda state: (state.iteration < max_iterations) & state.active(tolerance).any(),
        iterate,
        _State(0, start, history, history, gap(start), gap(start), zeros, zeros),
    )
    # Logits were accumulated step by step; the results are computed afresh.
    found = state.point.coefficients
    end = point(found, _dot(design, found, ((1,), (0,))))
    total = jnp.sum(weights, axis=0)
    norms = jnp.sqrt(_inner(end.gradient, end.gradient)) / total
    curvature = end.curvature.mean(axis=0)
    return Solution(
        found, end.logits, end.loss / total, norms, gap(end), state.iterations, curvature
    )


def _precondition(
    preconditioner: DiagonalPreconditioner | DensePreconditioner,
    curvature: Any,
    penalty: Any,
    vector: Any,
) -> Any:
    """The inverse Hessian estimate times a vector ``[axes, classes, fits]``."""
    if isinstance(preconditioner, DensePreconditioner):
        inner = _dot(preconditioner.matrix, vector[:-1], ((1,), (0,)))
        return jnp.concatenate([inner, vector[-1:] / preconditioner.bias])
    floor = np.finfo(vector.dtype).eps
    squares = preconditioner.squares[:, None, None]
    return vector / (squares * jnp.maximum(curvature, floor) + penalty)


def _step_size(
    logits: Any,
    slope: Any,
    weights: Any,
    penalty_slope: Any,
    penalty_curvature: Any,
    initial: Any,
    active: Any,
) -> Any:
    """Line search: the step at which the derivative is at most a tenth of the initial one.

    The objective is convex along the direction, so that its derivative rises: Newton's method,
    bracketed by the last step that was too short and the last that was too long.

    Args:
        logits: at the start.
        slope: derivative of the logits by the step.
        weights: of the examples.
        penalty_slope: derivative of the penalty at the start.
        penalty_curvature: its second derivative.
        initial: derivative of the objective at the start.
        active: fits to search for; the others get 0.
    """

    def trial(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        n, size, low, high, searching = carry
        probs = jax.nn.softmax(logits + size * slope, axis=1)
        mean = jnp.sum(probs * slope, axis=1)
        first = jnp.sum(mean * weights, axis=0) + penalty_slope + size * penalty_curvature
        variance = jnp.sum(probs * jnp.square(slope), axis=1) - jnp.square(mean)
        second = jnp.sum(variance * weights, axis=0) + penalty_curvature
        low, high = jnp.where(first < 0, size, low), jnp.where(first < 0, high, size)
        newton = size - first * _reciprocal(second)
        halfway = jnp.where(jnp.isinf(high), 2 * size, (low + high) / 2)
        better = jnp.where((newton > low) & (newton < high), newton, halfway)
        searching = searching & (jnp.abs(first) > 0.1 * jnp.abs(initial))
        return n + 1, jnp.where(searching, better, size), low, high, searching

    ones = jnp.ones_like(initial)
    start = (0, ones, 0 * ones, jnp.inf * ones, active)
    _, size, *_ = jax.lax.while_loop(
        lambda c: (c[0] < _LINE_SEARCH_STEPS) & c[-1].any(), trial, start
    )
    return jnp.where(active & (initial < 0), size, 0)


def _inner(a: Any, b: Any) -> Any:
    return jnp.sum(a * b, axis=(0, 1))


def _reciprocal(x: Any) -> Any:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
