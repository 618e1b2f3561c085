"""L-BFGS for multinomial logistic regression: many fits in step, in one compiled program."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Diagonal", "Inverse", "Problem", "Solution", "solve"]


_MEMORY = 4
"""Pairs of L-BFGS; few are enough where the first guess of the inverse Hessian is this good."""

_TRIALS = 10
"""Steps tried along one direction at most; one or two are the rule."""

_PATIENCE = 100
"""Iterations without progress after which a fit is as good as its precision allows."""


class Problem(NamedTuple):
    """What is fitted; the last column of the design is 1, whose coefficient has no penalty."""

    design: Any  # [examples, axes]
    true: Any  # bool [examples, classes]
    weights: Any  # [examples, fits]
    strengths: Any  # [fits]


class Diagonal(NamedTuple):
    """First guess of the inverse Hessian along principal axes, as good for one fit as for many."""

    curvature: Any  # [axes], squared lengths of the design's columns


class Inverse(NamedTuple):
    """First guess of the inverse Hessian for one fit along any axes."""

    matrix: Any  # [axes - 1, axes - 1], of the Hessian without the bias
    bias: Any  # curvature in the bias


class Solution(NamedTuple):
    """With fits last."""

    coefficients: Any  # [axes, classes, fits]
    logits: Any  # [examples, classes, fits]
    losses: Any  # [fits], as all below
    gradient_norms: Any
    gaps: Any
    iterations: Any
    left: Any  # mean of p (1 - p): what share of the features' curvature the Hessian has


class _Point(NamedTuple):
    """Coefficients and gradient ``[axes, classes, fits]``, logits ``[examples, classes, fits]``."""

    coefficients: Any
    logits: Any
    loss: Any  # [fits], not yet divided
    gradient: Any
    left: Any  # [classes, fits]


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


@functools.partial(jax.jit, static_argnames="memory")
def solve(
    problem: Problem,
    coefficients: Any,
    logits: Any,
    guess: Diagonal | Inverse,
    tolerance: Any,
    max_iterations: Any,
    memory: int = _MEMORY,
) -> Solution:
    """Minimizes all fits in step; fits that are done stand still.

    Steps are searched along logits, which are linear in the step, so that a trial costs no pass
    over the features.

    Args:
      problem: what is fitted.
      coefficients: where to start, ``[axes, classes, fits]``.
      logits: of the examples there. (Made inside, zeros would be worked out by the compiler,
        slowly.)
      guess: of the inverse Hessian.
      tolerance: gap at which a fit is finished.
      max_iterations: of all fits together.
      memory: pairs that are kept.

    References:
      D. C. Liu, J. Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", 1989.
    """
    design, true, weights = problem.design, problem.true[:, :, None], problem.weights
    penalty = jnp.ones((design.shape[1], 1, 1), design.dtype).at[-1].set(0) * problem.strengths

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
        return _Point(
            coefficients,
            logits,
            loss + _inner(penalty * coefficients, coefficients) / 2,
            _dot(design, residual, ((0,), (0,))) + penalty * coefficients,
            jnp.sum(probs * (1 - probs) * weights[:, None], axis=0) / len(design),
        )

    def gap(at: _Point) -> Any:
        return _inner(at.gradient, _guessed(guess, at.left, penalty, at.gradient)) / 2 / at.loss

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
        vector = _guessed(guess, state.point.left, penalty, vector)
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
            here.logits,
            move,
            weights,
            _inner(penalty * here.coefficients, way),
            _inner(penalty * way, way),
            _inner(here.gradient, way),
            active,
        )
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

    start = point(coefficients, logits)
    zeros = jnp.zeros(len(problem.strengths), int)
    history = jnp.zeros((memory, *coefficients.shape), design.dtype)
    state = jax.lax.while_loop(
        lambda state: (state.iteration < max_iterations) & state.active(tolerance).any(),
        iterate,
        _State(0, start, history, history, gap(start), gap(start), zeros, zeros),
    )
    # Logits were added up step by step: what is reported is computed afresh.
    found = state.point.coefficients
    end = point(found, _dot(design, found, ((1,), (0,))))
    total = jnp.sum(weights, axis=0)
    norms = jnp.sqrt(_inner(end.gradient, end.gradient)) / total
    left = end.left.mean(axis=0)
    return Solution(found, end.logits, end.loss / total, norms, gap(end), state.iterations, left)


def _guessed(guess: Diagonal | Inverse, left: Any, penalty: Any, vector: Any) -> Any:
    """The guess of the inverse Hessian times a vector ``[axes, classes, fits]``."""
    if isinstance(guess, Inverse):
        inner = _dot(guess.matrix, vector[:-1], ((1,), (0,)))
        return jnp.concatenate([inner, vector[-1:] / guess.bias])
    floor = jnp.finfo(vector.dtype).eps
    return vector / (guess.curvature[:, None, None] * jnp.maximum(left, floor) + penalty)


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


def _inner(a: Any, b: Any) -> Any:
    return jnp.sum(a * b, axis=(0, 1))


def _reciprocal(x: Any) -> Any:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)
