"""Maximum likelihood of prevalence, with a certificate, for one target or many resampled ones.

Maximum likelihood of prevalence from calibrated posteriors, with a certificate of optimality.

Under label shift a target row has density proportional to ``sum_k q_k f_k / p_k``: `f` its
calibrated probabilities, `p` the source's prior, `q` the target's. The logarithm is concave in q.
Everything here walks over the rows in blocks and copies none of them but the block in hand.

Prevalence by maximum likelihood for hundreds of resampled targets at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from flaxtransfer.shift.optimize import nonnegative_quadratic

__all__ = ["Maximum", "blocks", "information", "likelihood_pass", "maximize", "maximize_resampled"]


_BLOCK = 100_000
"""Numbers in a block: both of a pass's products then find it in the processor's cache."""

_CURVATURE_ROWS = 200
"""Rows for each class that the curvature of a Newton step is taken from; slopes use all rows."""

_FEW_ROWS = 10_000
"""As many always give all they have; and all do if a dozen passes were not enough."""


_HALVINGS = 4
"""Of a Newton step that does not rise, before EM's is taken."""


@dataclasses.dataclass(frozen=True, eq=False)
class Maximum:
    """Where a likelihood was left, and how far that is from its maximum.

    Args:
        estimate: `[K]`.
        slopes: `[K]`, of the mean log-likelihood: 1 where a share is positive, and at most 1 where
            it is zero, at the maximum.
        gap: largest slope minus 1; the mean log-likelihood can rise by no more than this.
        log_likelihood: mean over the rows, relative to that of the source prior.
        passes: over the rows.
    """

    estimate: np.ndarray
    slopes: np.ndarray
    gap: float
    log_likelihood: float
    passes: int


def maximize(
    probabilities: np.ndarray,
    prior: np.ndarray,
    *,
    counts: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    tolerance: float = 1e-6,
    max_passes: int = 1000,
) -> Maximum:
    """Maximizes the mean over rows of ``log(sum_k q_k f_k / p_k)`` over the shares q.

    Expectation maximization (Saerens et al.), and Newton steps on the simplex wherever they rise
    higher, ended by the certificate and by nothing else: with weak classifiers, EM moves so little
    that rules on its movement stop far away from the maximum.

    Args:
        probabilities: `[m, K]`, calibrated, float32 or float64; not copied, and checked by whoever
            calls. The scale of a row does not matter.
        prior: `[K]`; a class whose prior is 0 plays no part, and must be no row's only class.
        counts: `[K]`, of labeled examples and of a Dirichlet prior: adds ``counts @ log(q)``.
        weights: `[m]`, of the rows; ones by default.
        tolerance: of the gap.
        max_passes: over the rows; the result says what the gap is where they do not suffice.

    Returns:
        The maximum, with its certificate.

    >>> probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8]])
    >>> maximize(probabilities, np.array([0.5, 0.5]), tolerance=1e-10).estimate.round(6)
    array([0.777778, 0.222222])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
        Y. Kim, P. Carbonetto, M. Stephens, M. Anitescu, "A fast algorithm for maximum likelihood
        estimation of mixture proportions using sequential quadratic programming", 2020.
    """
    classes = len(prior)
    extra = np.zeros(classes) if counts is None else counts
    divisor = np.where(prior > 0, prior, np.inf)
    rows = float(len(probabilities) if weights is None else weights.sum())
    total = rows + extra.sum()

    def at(q: np.ndarray) -> tuple[float, np.ndarray]:
        height, slopes = likelihood_pass(probabilities, q / divisor, weights)
        seen = extra > 0
        if not np.isfinite(height) or (q[seen] <= 0).any():
            return -np.inf, slopes
        slopes = slopes / divisor
        slopes[seen] += extra[seen] / q[seen]
        return (height + float(extra[seen] @ np.log(q[seen]))) / total, slopes / total

    def curvature(q: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        enough = max(_CURVATURE_ROWS * classes, _FEW_ROWS)
        stride = max(1, len(probabilities) // enough) if passes <= 12 else 1
        some = None if weights is None else weights[::stride]
        matrix = information(probabilities[::stride], q / divisor, divisor, some)
        matrix *= rows / total
        # All rows together satisfy matrix @ q = slopes, without the counts; what a selection of
        # rows lacks there, the diagonal gets.
        lacking = slopes - np.divide(extra, q, out=np.zeros(classes), where=extra > 0) / total
        lacking -= matrix @ q
        diagonal = np.divide(lacking, q, out=np.zeros(classes), where=q > 0)
        return matrix + np.diag(
            np.maximum(diagonal, 0)
            + np.divide(extra, q**2, out=np.zeros(classes), where=extra > 0) / total
        )

    # A class that only the counts know starts at what they say.
    q = prior / prior.sum() + np.where(divisor < np.inf, 0.0, extra / total)
    q /= q.sum()
    height, slopes = at(q)
    start, passes = height, 1
    while (gap := float(slopes.max()) - 1) > tolerance and passes < max_passes:
        moved = None
        # The first steps of EM are its best ones, and bring Newton's near enough.
        if passes > 2:
            matrix = curvature(q, slopes)
            goal = nonnegative_quadratic(matrix, matrix @ q + slopes - 1)
            # A parabola knows nothing of the logarithm at zero: on the way to a small share it
            # overshoots, and from too small a one it only doubles. EM's step, which is exact for a
            # class that nothing is confused with, holds it back until less than a row is left.
            expected = np.where(slopes > 1, 0.7, 0.03) * q * slopes
            goal = np.maximum(goal, np.where(expected * total > 1e-3, expected, 0.0))
            if goal.sum() > 0:
                moved = _line_search(at, q, goal / goal.sum(), height, slopes)
                passes += _HALVINGS if moved is None else moved[3]
        if moved is None:
            following = q * slopes
            following /= following.sum()
            moved = (following, *at(following), 1)
            passes += 1
        q, height, slopes, _ = moved
    return Maximum(q, slopes, max(gap, 0.0), float(height - start), passes)


def _line_search(
    at: Callable[[np.ndarray], tuple[float, np.ndarray]],
    q: np.ndarray,
    goal: np.ndarray,
    height: float,
    slopes: np.ndarray,
) -> tuple[np.ndarray, float, np.ndarray, int] | None:
    """The way towards `goal`, halved until it rises; None where EM is the better step."""
    rise = float((slopes - 1) @ (goal - q))
    gap = float(slopes.max())
    for halving in range(_HALVINGS):
        step = 0.5**halving
        following = q + step * (goal - q)
        found, there = at(following)
        # Near the maximum rises drown in rounding; there the certificate decides.
        level = found > height - 1e-13 and float(there.max()) < gap
        if found > height + 1e-3 * step * max(rise, 0.0) or level:
            return following, found, there, halving + 1
    return None


def likelihood_pass(
    probabilities: np.ndarray, ratios: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Once over the rows: sum of ``log(f @ ratios)``, and of ``f / (f @ ratios)``.

    Args:
        probabilities: `[m, K]`.
        ratios: `[K]`, q / p.
        weights: `[m]`, of the rows; ones by default.

    Returns:
        The sum, minus infinity where a row is impossible, and sums `[K]`.

    >>> likelihood_pass(np.array([[0.5, 0.5]]), np.array([1.0, 1.0]))
    (0.0, array([0.5, 0.5]))
    """
    height, sums = 0.0, np.zeros(probabilities.shape[1])
    for part, rows in blocks(probabilities):
        density = part @ ratios
        if weights is not None:
            density[weights[rows] == 0] = 1.0
        if density.min() <= 0:
            return -np.inf, sums
        if weights is None:
            height += float(np.log(density).sum())
            sums += (1 / density) @ part
        else:
            height += float(weights[rows] @ np.log(density))
            sums += (weights[rows] / density) @ part
    return height, sums


def information(
    probabilities: np.ndarray,
    ratios: np.ndarray,
    prior: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Observed information of a row about the shares: mean of ``s s'``, s = f / p / (f @ ratios).

    Args:
        probabilities: `[m, K]`.
        ratios: `[K]`, q / p.
        prior: `[K]`.
        weights: `[m]`, of the rows; ones by default.

    Returns:
        `[K, K]`.

    >>> information(np.eye(2), np.array([1.0, 1.0]), np.array([0.5, 0.5]))
    array([[2., 0.],
           [0., 2.]])
    """
    found = np.zeros((probabilities.shape[1],) * 2)
    total = float(len(probabilities) if weights is None else weights.sum())
    for part, rows in blocks(probabilities, 8):
        density = part @ ratios
        factor = 1 / np.where(density > 0, density, np.inf)
        if weights is not None:
            factor *= np.sqrt(weights[rows])
        scores = part * factor[:, None]
        found += scores.T @ scores
    return found / np.outer(prior, prior) / total


def blocks(array: np.ndarray, size: int = 1) -> Iterator[tuple[np.ndarray, slice]]:
    """Rows in float64, as many at a time as fit the processor's cache (`size` times as many)."""
    step = max(64, size * _BLOCK // array.shape[1])
    for start in range(0, len(array), step):
        rows = slice(start, start + step)
        yield array[rows].astype(np.float64, copy=False), rows


_CHUNK = 2_000_000
"""Numbers of gathered probabilities at a time; 16 MB."""

_LONGEST = 1000.0


def maximize_resampled(
    probabilities: np.ndarray,
    rows: np.ndarray,
    priors: np.ndarray,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 500,
) -> tuple[np.ndarray, np.ndarray]:
    """The maximum-likelihood prevalence of every resampled target, and how much likelier it is.

    What bootstrap and permutation tests need: the same rows, drawn again and again. For the one
    estimate that is reported, with intervals and advice, there is `estimate_prevalence`.

    Expectation maximization, extrapolated in the logarithm of the shares (SQUAREM) where that
    raises the likelihood. A resampling is done when its certificate says that the mean
    log-likelihood can rise by no more than `tolerance`.

    Args:
        probabilities: `[N, K]`, calibrated.
        rows: `[B, m]`, which rows each resampled target consists of.
        priors: `[B, K]` or `[K]`, the source's prior that goes with it. A class of prior 0 has
            probability 0 in every row, and gets share 0.
        tolerance: of the certificate.
        max_steps: of three passes each; what is left then is the best that was found.

    Returns:
        Shares `[B, K]`, and log-likelihood ratios `[B]` of these against the prior, summed over
        the m rows: not negative.

    >>> probabilities = np.array([[0.8, 0.2], [0.2, 0.8]])
    >>> shares, ratios = maximize_resampled(probabilities, np.array([[0, 0, 1]]), np.full(2, 0.5))
    >>> shares.round(3)
    array([[0.778, 0.222]])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
        R. Varadhan, C. Roland, "Simple and globally convergent methods for accelerating the
        convergence of any EM algorithm", 2008.
    """
    classes = probabilities.shape[1]
    priors = np.broadcast_to(priors, (len(rows), classes))
    shares, ratios = np.empty((len(rows), classes)), np.empty(len(rows))
    chunk = max(1, _CHUNK // (rows.shape[1] * classes))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        shares[part], ratios[part] = _maximize(
            probabilities[rows[part]], priors[part], tolerance, max_steps
        )
    return shares, ratios


def _maximize(
    samples: np.ndarray, priors: np.ndarray, tolerance: float, max_steps: int
) -> tuple[np.ndarray, np.ndarray]:
    # Likelihoods of the rows under each class, up to a factor for each row.
    samples = np.divide(
        samples, priors[:, None], out=np.zeros_like(samples), where=priors[:, None] > 0
    )
    shares, heights = priors.copy(), np.zeros(len(priors))
    active = np.arange(len(priors))
    point = priors.copy()
    height, slopes = _pass(samples, point)
    for _ in range(max_steps):
        done = slopes.max(1) - 1 <= tolerance
        shares[active], heights[active] = point, height
        if done.all():
            break
        if done.any():
            active, samples, priors = active[~done], samples[~done], priors[~done]
            point, height, slopes = point[~done], height[~done], slopes[~done]
        once = _normalized(point * slopes)
        height_once, slopes_once = _pass(samples, once)
        twice = _normalized(once * slopes_once)
        further = _extrapolated(point, slopes, slopes_once)
        height, slopes = _pass(samples, further)
        worse = ~(height >= height_once)
        if worse.any():
            further[worse] = twice[worse]
            height[worse], slopes[worse] = _pass(samples[worse], twice[worse])
        point = further
    return shares, np.maximum(heights, 0)


def _pass(samples: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-likelihoods `[B]`, and slopes `[B, K]` of their means, of samples `[B, m, K]`."""
    density = np.maximum(np.matmul(samples, shares[:, :, None])[:, :, 0], 1e-300)
    slopes = np.matmul((1 / density)[:, None, :], samples)[:, 0] / samples.shape[1]
    return np.log(density).sum(1), slopes


def _extrapolated(point: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """As far along the two last steps of EM as the change between them says, in logarithms."""
    first, second = np.log(np.maximum(first, 1e-12)), np.log(np.maximum(second, 1e-12))
    change = second - first
    # Shares that are all but 0 say nothing about the length of the step.
    size = np.sqrt((point * first**2).sum(1)), np.sqrt((point * change**2).sum(1))
    length = np.clip(size[0] / np.maximum(size[1], 1e-300), 1, _LONGEST)[:, None]
    logs = np.log(np.maximum(point, 1e-300)) + 2 * length * first + length**2 * change
    moved = np.exp(logs - logs.max(1, keepdims=True))
    return _normalized(np.where(point > 0, np.maximum(moved, 1e-200), 0))


def _normalized(shares: np.ndarray) -> np.ndarray:
    return shares / shares.sum(1, keepdims=True)
