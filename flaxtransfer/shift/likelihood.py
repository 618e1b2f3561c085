"""Maximum likelihood of class proportions under label shift.

Under label shift a target row has density proportional to ``sum_k q_k f_k / p_k``: f its calibrated
probabilities, p the source prior, q the target prevalence. Its logarithm is concave in q.
``maximize_likelihood`` solves one large target and certifies the optimum; ``maximize_resampled``
solves hundreds of resampled targets at once, for tests and intervals. ``estimate_prevalence`` is
what most want. Rows are processed in blocks and never copied as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from flaxtransfer.shift.optimize import nonnegative_quadratic

__all__ = [
    "LikelihoodMaximum",
    "information",
    "likelihood_pass",
    "maximize_likelihood",
    "maximize_resampled",
    "row_blocks",
]

_BLOCK_SIZE = 100_000
"""Numbers per block: small enough for the processor's cache in both products of a pass."""

_CURVATURE_ROWS = 200
"""Rows per class for the curvature of a Newton step; gradients use all rows."""

_MIN_CURVATURE_ROWS = 10_000
"""Fewest rows for the curvature; after a dozen passes all rows are used."""

_MAX_HALVINGS = 4
"""Halvings of a Newton step that does not increase the likelihood, before an EM step is used."""

_CHUNK_SIZE = 2_000_000
"""Gathered probabilities per chunk; 16 MB."""

_MAX_STEP_LENGTH = 1000.0


def maximize_likelihood(
    probabilities: np.ndarray,
    prior: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-6,
    max_passes: int = 1000,
) -> LikelihoodMaximum:
    """Maximum-likelihood proportions q: maximizes the mean of ``log(sum_k q_k f_k / p_k)``.

    Expectation maximization (Saerens et al.), with Newton steps on the simplex wherever they
    increase the likelihood more. Only the certificate ends it: with weak classifiers EM moves so
    slowly that rules on its movement stop far from the maximum.

    Args:
        probabilities: ``[m, K]``, calibrated, float32 or float64; not copied and not checked. The
            scale of a row does not matter.
        prior: ``[K]``, source prior; a class with prior 0 is ignored, and must not be the only
            class of a row.
        counts: ``[K]``, labeled examples and Dirichlet pseudo-counts; adds ``counts @ log(q)``.
        weights: ``[m]``, row weights; ones by default.
        tolerance: Of the gap.
        max_passes: Most passes over the rows; the result gives the gap where they do not suffice.

    Returns:
        The maximum, with its certificate.

    >>> probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]])
    >>> maximize_likelihood(probabilities, np.array([0.5, 0.5]), tolerance=1e-10).estimate.round(6)
    array([0.777778, 0.222222])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
        Y. Kim, P. Carbonetto, M. Stephens, M. Anitescu, "A fast algorithm for maximum likelihood
        estimation of mixture proportions using sequential quadratic programming", 2020.
    """
    classes = len(prior)
    pseudo_counts = np.zeros(classes) if counts is None else counts
    divisor = np.where(prior > 0, prior, np.inf)
    rows = float(len(probabilities) if weights is None else weights.sum())
    total = rows + pseudo_counts.sum()

    def at(q: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = likelihood_pass(probabilities, q / divisor, weights)
        seen = pseudo_counts > 0
        if not np.isfinite(value) or (q[seen] <= 0).any():
            return -np.inf, gradient
        gradient = gradient / divisor
        gradient[seen] += pseudo_counts[seen] / q[seen]
        return (value + float(pseudo_counts[seen] @ np.log(q[seen]))) / total, gradient / total

    def curvature(q: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        enough = max(_CURVATURE_ROWS * classes, _MIN_CURVATURE_ROWS)
        stride = max(1, len(probabilities) // enough) if passes <= 12 else 1
        row_weights = None if weights is None else weights[::stride]
        matrix = information(probabilities[::stride], q / divisor, divisor, row_weights)
        matrix *= rows / total
        # Over all rows, without the counts, matrix @ q equals the gradient; the diagonal makes up
        # what a subset of rows lacks.
        missing = (
            gradient
            - np.divide(pseudo_counts, q, out=np.zeros(classes), where=pseudo_counts > 0) / total
        )
        missing -= matrix @ q
        diagonal = np.divide(missing, q, out=np.zeros(classes), where=q > 0)
        return matrix + np.diag(
            np.maximum(diagonal, 0)
            + np.divide(pseudo_counts, q**2, out=np.zeros(classes), where=pseudo_counts > 0) / total
        )

    # A class that only the counts contain starts at its proportion there.
    q = prior / prior.sum() + np.where(divisor < np.inf, 0.0, pseudo_counts / total)
    q /= q.sum()
    value, gradient = at(q)
    start, passes = value, 1
    while (gap := float(gradient.max()) - 1) > tolerance and passes < max_passes:
        moved = None
        # The first EM steps are the most effective, and bring the iterate close enough for Newton.
        if passes > 2:
            matrix = curvature(q, gradient)
            target = nonnegative_quadratic(matrix, matrix @ q + gradient - 1)
            # The quadratic model ignores the logarithm at zero: toward a small proportion it
            # overshoots, and from a too small one it only doubles. A fraction of the EM step, which
            # is exact for a class that is confused with no other, bounds it from below until less
            # than one row is affected.
            expected = np.where(gradient > 1, 0.7, 0.03) * q * gradient
            target = np.maximum(target, np.where(expected * total > 1e-3, expected, 0.0))
            if target.sum() > 0:
                moved = _line_search(at, q, target / target.sum(), value, gradient)
                passes += _MAX_HALVINGS if moved is None else moved[3]
        if moved is None:
            next_q = q * gradient
            next_q /= next_q.sum()
            moved = (next_q, *at(next_q), 1)
            passes += 1
        q, value, gradient, _ = moved
    return LikelihoodMaximum(q, gradient, max(gap, 0.0), float(value - start), passes)


@dataclasses.dataclass(frozen=True, eq=False)
class LikelihoodMaximum:
    """Maximum-likelihood proportions with their optimality certificate.

    Args:
        estimate: ``[K]``.
        gradient: ``[K]``, of the mean log-likelihood: at the maximum 1 where a proportion is
            positive, and at most 1 where it is zero.
        gap: Largest gradient minus 1; the mean log-likelihood can increase by no more than this.
        log_likelihood: Mean over the rows, relative to that of the source prior.
        passes: Number of passes over the rows.
    """

    estimate: np.ndarray
    gradient: np.ndarray
    gap: float
    log_likelihood: float
    passes: int


def maximize_resampled(
    probabilities: np.ndarray,
    rows: np.ndarray,
    priors: np.ndarray,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> tuple[np.ndarray, np.ndarray]:
    """Maximum-likelihood proportions of many resampled targets at once, with likelihood ratios.

    Use it for bootstrap and permutation tests, where the same rows are drawn again and again; for
    one estimate with intervals use ``estimate_prevalence``.

    Expectation maximization, extrapolated in the logarithm of the proportions (SQUAREM) where that
    increases the likelihood. A target is finished when its certificate shows that the mean
    log-likelihood can increase by no more than ``tolerance``.

    Args:
        probabilities: ``[N, K]``, calibrated.
        rows: ``[B, m]``, the rows of each resampled target.
        priors: ``[B, K]`` or ``[K]``, the source prior of each. A class of prior 0 has probability
            0 in every row, and gets proportion 0.
        tolerance: Of the certificate.
        max_steps: Most steps of three passes each; the best point so far is returned then.

    Returns:
        Proportions ``[B, K]``, and their log-likelihood ratios ``[B]`` against the prior, summed
        over the m rows, >= 0.

    >>> probabilities = np.array([[0.8, 0.2], [0.2, 0.8]])
    >>> found, ratios = maximize_resampled(probabilities, np.array([[0, 0, 1]]), np.full(2, 0.5))
    >>> found.round(3)
    array([[0.778, 0.222]])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
        R. Varadhan, C. Roland, "Simple and globally convergent methods for accelerating the
        convergence of any EM algorithm", 2008.
    """
    classes = probabilities.shape[1]
    priors = np.broadcast_to(priors, (len(rows), classes))
    proportions, ratios = np.empty((len(rows), classes)), np.empty(len(rows))
    chunk = max(1, _CHUNK_SIZE // (rows.shape[1] * classes))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        proportions[part], ratios[part] = _maximize(
            probabilities[rows[part]], priors[part], tolerance, max_steps
        )
    return proportions, ratios


def likelihood_pass(
    probabilities: np.ndarray, ratios: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """One pass over the rows: the sums of ``log(f @ ratios)`` and of ``f / (f @ ratios)``.

    Args:
        probabilities: ``[m, K]``.
        ratios: ``[K]``, q / p.
        weights: ``[m]``, row weights; ones by default.

    Returns:
        The first sum, minus infinity where a row is impossible, and the second, ``[K]``.

    >>> likelihood_pass(np.array([[0.5, 0.5]]), np.array([1.0, 1.0]))
    (0.0, array([0.5, 0.5]))
    """
    value, sums = 0.0, np.zeros(probabilities.shape[1])
    for part, rows in row_blocks(probabilities):
        density = part @ ratios
        if weights is not None:
            density[weights[rows] == 0] = 1.0
        if density.min() <= 0:
            return -np.inf, sums
        if weights is None:
            value += float(np.log(density).sum())
            sums += (1 / density) @ part
        else:
            value += float(weights[rows] @ np.log(density))
            sums += (weights[rows] / density) @ part
    return value, sums


def information(
    probabilities: np.ndarray,
    ratios: np.ndarray,
    prior: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Observed information per row: the mean of ``s s'`` with s = f / p / (f @ ratios).

    Args:
        probabilities: ``[m, K]``.
        ratios: ``[K]``, q / p.
        prior: ``[K]``.
        weights: ``[m]``, row weights; ones by default.

    Returns:
        ``[K, K]``.

    >>> information(np.eye(2), np.array([1.0, 1.0]), np.array([0.5, 0.5]))
    array([[2., 0.],
           [0., 2.]])
    """
    found = np.zeros((probabilities.shape[1],) * 2)
    total = float(len(probabilities) if weights is None else weights.sum())
    for part, rows in row_blocks(probabilities, 8):
        density = part @ ratios
        factor = 1 / np.where(density > 0, density, np.inf)
        if weights is not None:
            factor *= np.sqrt(weights[rows])
        scores = part * factor[:, None]
        found += scores.T @ scores
    return found / np.outer(prior, prior) / total


def row_blocks(array: np.ndarray, size: int = 1) -> Iterator[tuple[np.ndarray, slice]]:
    """Blocks of rows in float64 that fit the processor's cache (``size`` times as many rows)."""
    step = max(64, size * _BLOCK_SIZE // array.shape[1])
    for start in range(0, len(array), step):
        rows = slice(start, start + step)
        yield array[rows].astype(np.float64, copy=False), rows


def _line_search(
    at: Callable[[np.ndarray], tuple[float, np.ndarray]],
    q: np.ndarray,
    target: np.ndarray,
    value: float,
    gradient: np.ndarray,
) -> tuple[np.ndarray, float, np.ndarray, int] | None:
    """The step toward ``target``, halved until the value increases; None where EM is better."""
    predicted_increase = float((gradient - 1) @ (target - q))
    gap = float(gradient.max())
    for halving in range(_MAX_HALVINGS):
        step = 0.5**halving
        next_q = q + step * (target - q)
        found, next_gradient = at(next_q)
        # Near the maximum increases are below rounding; there the certificate decides.
        flat = found > value - 1e-13 and float(next_gradient.max()) < gap
        if found > value + 1e-3 * step * max(predicted_increase, 0.0) or flat:
            return next_q, found, next_gradient, halving + 1
    return None


def _maximize(
    samples: np.ndarray, priors: np.ndarray, tolerance: float, max_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    # Likelihood of each row under each class, up to a factor per row.
    samples = np.divide(
        samples, priors[:, None], out=np.zeros_like(samples), where=priors[:, None] > 0
    )
    proportions, values = priors.copy(), np.zeros(len(priors))
    active = np.arange(len(priors))
    point = priors.copy()
    value, gradient = _pass(samples, point)
    for _ in range(max_steps):
        done = gradient.max(1) - 1 <= tolerance
        proportions[active], values[active] = point, value
        if done.all():
            break
        if done.any():
            active, samples, priors = active[~done], samples[~done], priors[~done]
            point, value, gradient = point[~done], value[~done], gradient[~done]
        once = _normalized(point * gradient)
        value_once, gradient_once = _pass(samples, once)
        twice = _normalized(once * gradient_once)
        extrapolated = _extrapolated(point, gradient, gradient_once)
        value, gradient = _pass(samples, extrapolated)
        worse = ~(value >= value_once)
        if worse.any():
            extrapolated[worse] = twice[worse]
            value[worse], gradient[worse] = _pass(samples[worse], twice[worse])
        point = extrapolated
    return proportions, np.maximum(values, 0)


def _pass(samples: np.ndarray, proportions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-likelihoods ``[B]`` and mean gradients ``[B, K]`` of samples ``[B, m, K]``."""
    density = np.maximum(np.matmul(samples, proportions[:, :, None])[:, :, 0], 1e-300)
    gradient = np.matmul((1 / density)[:, None, :], samples)[:, 0] / samples.shape[1]
    return np.log(density).sum(1), gradient


def _extrapolated(point: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """SQUAREM: extrapolation of the last two EM steps, in logarithms."""
    first, second = np.log(np.maximum(first, 1e-12)), np.log(np.maximum(second, 1e-12))
    change = second - first
    # Proportions close to 0 have little weight in the step length.
    size = np.sqrt((point * first**2).sum(1)), np.sqrt((point * change**2).sum(1))
    length = np.clip(size[0] / np.maximum(size[1], 1e-300), 1, _MAX_STEP_LENGTH)[:, None]
    logs = np.log(np.maximum(point, 1e-300)) + 2 * length * first + length**2 * change
    moved = np.exp(logs - logs.max(1, keepdims=True))
    return _normalized(np.where(point > 0, np.maximum(moved, 1e-200), 0))


def _normalized(proportions: np.ndarray) -> np.ndarray:
    normalized: np.ndarray = proportions / proportions.sum(1, keepdims=True)
    return normalized
