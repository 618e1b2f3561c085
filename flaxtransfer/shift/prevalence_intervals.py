"""Score intervals of prevalence from profile likelihoods.

A proportion near 0 is not normally distributed, and an interval of plus or minus two standard
errors misses it. A score interval holds the proportions that a score test does not reject, with the
variance under each: for certain posteriors, and far from 0 and 1, it is Wilson's interval of a
binomial proportion. Near 0 and 1 the test is corrected for skewness and uses the unequal tails of
Feldman and Cousins.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.likelihood import LikelihoodMaximum, row_blocks
from flaxtransfer.shift.uncertainty import Precision, Sample

__all__ = [
    "ProfileLikelihood",
    "ProfilePoint",
    "critical_values",
    "profile_likelihood",
    "score_intervals",
]

_GRID_SIZE = 257

_BLOCK_ROWS = 20_000
"""Rows per block."""

_CHUNK_SIZE = 10_000_000
"""Numbers held at once, in addition to the posteriors."""

_FAR_FROM_BOUNDARY = 10.0
"""Standard errors from 0 and from 1 beyond which the likelihood is practically normal."""

_BOUNDARY = 1e-12
"""Proportions below this are 0."""

_Test = Callable[[np.ndarray], np.ndarray]


def score_intervals(
    sample: Sample, maximum: LikelihoodMaximum, precision: Precision, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Score intervals near 0 and 1: lower and upper ends, ``[K]`` each.

    They hold the proportions that a score test at ``level`` does not reject; the other proportions
    adjust along the profile. Far from 0 and 1 the score is linear and the ends have a closed form;
    near them they are found on the likelihood itself.

    References:
        O. E. Barndorff-Nielsen, "Inference on full or partial parameters based on the standardized
        signed log likelihood ratio", 1986.
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
        J. J. Gart, J. Nam, "Approximate interval estimation of the ratio of binomial parameters: a
        review and corrections for skewness", 1988.
        C. R. Rao, "Large sample tests of statistical hypotheses concerning several parameters with
        applications to problems of estimation", 1948.
    """
    q, total = maximum.estimate, sample.total
    usable = np.isfinite(sample.divisor)
    z = float(norm.ppf((1 + level) / 2))
    low, high = _wilson(q, precision, z, total)
    low[~usable], high[~usable] = 0.0, 0.0
    near = usable & (np.minimum(q, 1 - q) < _FAR_FROM_BOUNDARY * precision.error)
    chosen = np.flatnonzero(near)
    size = max(1, _CHUNK_SIZE // (len(sample.probabilities) + len(sample.source.probabilities)))
    for start in range(0, len(chosen), size):
        subset = chosen[start : start + size]
        resolution = 1e-3 * precision.error[subset] + 1e-12
        # At the boundary itself the score of a certain row is infinite and its variance zero.
        inside = np.minimum(q[subset], _BOUNDARY), np.maximum(q[subset], 1 - _BOUNDARY)
        profile = profile_likelihood(sample, maximum, precision.directions[:, subset])
        too_small, too_large = _rejections(profile, maximum, precision, subset, level)
        low[subset] = _find_end(too_small, q[subset], inside[0], low[subset], resolution)
        high[subset] = _find_end(too_large, q[subset], inside[1], high[subset], resolution)
    low[low <= _BOUNDARY], high[high >= 1 - _BOUNDARY] = 0.0, 1.0
    return low, high


def critical_values(distance: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Critical values near 0 and 1 (Feldman and Cousins).

    With two equal tails, one is wasted near a boundary: no estimate is far below a proportion of 0,
    and an interval that gives 2.5 % to that tail covers in 97.5 instead of 95 of 100 cases. So
    estimates are ordered by their likelihood ratio against the best possible proportion.

    Args:
        distance: Of the proportion from the boundary below it, in standard errors, >= 0.
        level: Confidence level.

    Returns:
        Two arrays like ``distance``: how many standard errors above and below a proportion an
        estimate is accepted. From the two-sided normal quantile on both are that quantile; at the
        boundary the first is the one-sided quantile, and the second is infinite.

    References:
        G. J. Feldman, R. D. Cousins, "Unified approach to the classical statistical analysis of
        small signals", 1998.

    >>> above, below = critical_values(np.array([0.0, 1.0, 3.0]), 0.95)
    >>> above.round(2), below.round(2)
    (array([1.64, 1.82, 1.96]), array([ inf, 2.16, 1.96]))
    """
    grid, values = _critical_value_table(level)
    # From the two-sided quantile on the boundary has no effect, and both values are equal.
    distance = np.minimum(distance, grid[-1])
    above = np.interp(distance, grid, values)
    with np.errstate(divide="ignore"):
        return above, (distance**2 + above**2) / (2 * distance)


@dataclasses.dataclass(frozen=True, eq=False)
class ProfileLikelihood:
    """Profile likelihood of prevalence along one direction per proportion.

    The score of a proportion has mean zero at its true value. Its variance and skewness there are
    averages over the examples of target and validation together, each weighted by its probability
    under the proportion: the target alone has little information about a class that it hardly
    contains.

    Args:
        density: ``[m + n]``, of target and validation, relative to the source's.
        slope: ``[m + n, D]``, derivative of the density along each direction.
        mixture: ``[m + n]``, density of all examples together, per target example.
        rows: m, number of target rows.
        known: ``[L]``, proportions with labeled examples or pseudo-counts.
        known_directions: ``[L, D]``, their derivatives.
        counts: ``[L]``.
    """

    density: np.ndarray
    slope: np.ndarray
    mixture: np.ndarray
    rows: int
    known: np.ndarray
    known_directions: np.ndarray
    counts: np.ndarray

    def at(self, step: np.ndarray) -> ProfilePoint:
        """The profile after a step ``[D]`` from the estimate along each direction."""
        directions = self.slope.shape[1]
        score, information, third, decrease = np.zeros((4, directions))
        possible = np.ones(directions, bool)
        for begin in range(0, len(self.density), _BLOCK_ROWS):
            block = slice(begin, begin + _BLOCK_ROWS)
            target = slice(0, max(0, self.rows - begin))
            slope, here = self.slope[block], self.density[block, None]
            there = here + step * slope
            possible &= (there[target] > 0).all(0)
            there = np.where(there > 0, there, np.inf)
            pull = slope / there
            weighted = pull * slope / self.mixture[block, None]
            score += pull[target].sum(0)
            information += weighted.sum(0)
            third += (weighted * pull).sum(0)
            decrease -= np.log(there[target] / here[target]).sum(0)
        moved = self.known[:, None] + step * self.known_directions
        possible &= (moved > 0).all(0)
        moved = np.where(moved > 0, moved, np.inf)
        pull, counts = self.known_directions / moved, self.counts[:, None]
        return ProfilePoint(
            score=score + (counts * pull).sum(0),
            information=information + (counts * pull**2).sum(0),
            third=third + (counts * pull**3).sum(0),
            decrease=decrease - (counts * np.log(moved / self.known[:, None])).sum(0),
            possible=possible,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ProfilePoint:
    """The profile likelihood with each of D proportions moved along its direction; arrays ``[D]``.

    Args:
        score: Slope of the target's log-likelihood.
        information: Variance of the score.
        third: Third moment of the score.
        decrease: Of the log-likelihood from its maximum.
        possible: Whether the target has a positive likelihood there.
    """

    score: np.ndarray
    information: np.ndarray
    third: np.ndarray
    decrease: np.ndarray
    possible: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Variance ``[D]`` of the proportion: the inverse of the information."""
        return 1 / np.where(self.information > 0, self.information, np.inf)


def profile_likelihood(
    sample: Sample, maximum: LikelihoodMaximum, directions: np.ndarray
) -> ProfileLikelihood:
    """Profile likelihood along ``directions``, ``[K, D]``."""
    q = maximum.estimate
    density, slope = _density_along(sample.probabilities, sample, q, directions)
    if sample.weights is not None:
        density, slope = density[sample.weights > 0], slope[sample.weights > 0]
    source, source_slope = _density_along(sample.source.probabilities, sample, q, directions)
    rows, seen = len(density), sample.counts > 0
    density = np.concatenate([density, source])
    return ProfileLikelihood(
        density=density,
        slope=np.concatenate([slope, source_slope]),
        mixture=density + len(source) / rows,
        rows=rows,
        known=q[seen],
        known_directions=directions[seen],
        counts=sample.counts[seen],
    )


@functools.lru_cache(maxsize=8)
def _critical_value_table(level: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances up to the two-sided quantile, and the upper critical value at each.

    An estimate x at a distance d has the likelihood ratio ``exp(-(x - d)^2 / 2)`` against the best
    proportion, or ``exp(x d - d^2 / 2)`` where x is below the boundary. Both ends of the accepted
    range have the same ratio, which gives the lower one; bisection finds the upper one with
    coverage ``level``.
    """
    least, most = float(norm.ppf(level)), float(norm.ppf((1 + level) / 2))
    grid = np.linspace(0, most, _GRID_SIZE)
    low, high = np.full(_GRID_SIZE, least), np.full(_GRID_SIZE, most)
    for _ in range(50):
        middle = (low + high) / 2
        with np.errstate(divide="ignore"):  # at the boundary itself nothing is too low
            lower = -(grid**2 + middle**2) / (2 * grid)
        small = norm.cdf(middle) - norm.cdf(lower) < level
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    return grid, high


def _density_along(
    probabilities: np.ndarray, sample: Sample, q: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    ratios, slopes = q / sample.divisor, directions / sample.divisor[:, None]
    density = np.empty(len(probabilities))
    slope = np.empty((len(probabilities), directions.shape[1]))
    for part, rows in row_blocks(probabilities, 8):
        density[rows], slope[rows] = part @ ratios, part @ slopes
    return density, slope


def _wilson(
    q: np.ndarray, precision: Precision, z: float, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """Roots t of ``(q - t)^2 = z^2 (t (1 - t) + ambiguity) / total + z^2 validation``."""
    fixed = z**2 * (precision.ambiguity / total + precision.validation)
    square, middle = 1 + z**2 / total, q + z**2 / total / 2
    root = np.sqrt(np.maximum(middle**2 - square * (q**2 - fixed), 0))
    return np.maximum((middle - root) / square, 0), np.minimum((middle + root) / square, 1)


def _rejections(
    profile: ProfileLikelihood,
    maximum: LikelihoodMaximum,
    precision: Precision,
    subset: np.ndarray,
    level: float,
) -> tuple[_Test, _Test]:
    """Score tests in both directions: how far the estimate is outside of the accepted range."""
    q, two_sided = maximum.estimate[subset], float(norm.ppf((1 + level) / 2))
    # The validation acts through the scores and adds to their variance.
    target = np.where(precision.target > 0, precision.target, np.inf)[subset]
    validation = precision.validation[subset] / target**2
    # Slightly inside: the skewness of an estimate of exactly 0 is infinite.
    skewness_here = _error_and_skewness(profile.at(precision.inside[subset] - q), validation)[1]

    def departure(proportions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Standardized distance of the estimate from a proportion, and the standard error."""
        step = proportions - q
        point = profile.at(step)
        error, skewness = _error_and_skewness(point, validation)
        score = point.score * point.variance / error
        # The short tail of a skewed estimate ends before that of a normal one. In the long tail one
        # doubtful row makes the score large, and its skewness correction is not monotone; there the
        # signed root of the likelihood ratio is nearly normal, up to a sixth of the skewness.
        short = score - np.maximum(score**2 - 1, 0) * skewness / 6
        root = np.sqrt(2 * np.maximum(point.decrease, 0) * point.variance) / error
        long = -np.sign(step) * root + skewness_here / 6
        found = np.where(score * skewness < 0, short, long)
        return np.where(point.possible, found, np.where(step > 0, -np.inf, np.inf)), error

    def critical(proportions: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        above, below = critical_values(proportions / error, level)
        # At the boundary 1 the two are exchanged.
        below_one, above_one = critical_values((1 - proportions) / error, level)
        return above + above_one - two_sided, below + below_one - two_sided

    def too_small(proportions: np.ndarray) -> np.ndarray:
        found, error = departure(proportions)
        result: np.ndarray = found - critical(proportions, error)[0]
        return result

    def too_large(proportions: np.ndarray) -> np.ndarray:
        found, error = departure(proportions)
        result: np.ndarray = -found - critical(proportions, error)[1]
        return result

    return too_small, too_large


def _error_and_skewness(
    point: ProfilePoint, validation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of a proportion's estimate, at least ``_BOUNDARY``, and its skewness."""
    variance = point.variance
    error = np.maximum(np.sqrt(variance + validation * variance**2), _BOUNDARY)
    return error, point.third * (variance / error) ** 3


def _find_end(
    rejects: _Test, inner: np.ndarray, outer: np.ndarray, guess: np.ndarray, resolution: np.ndarray
) -> np.ndarray:
    """Where ``rejects`` first exceeds 0 on the way from ``inner`` to ``outer``, or ``outer``.

    Outward steps that double until the sign changes, then regula falsi with the Illinois rule until
    the bracket is ``resolution`` wide, for all proportions at once. The variance decreases toward a
    boundary, and the test may reject a proportion on the way but not the boundary: close to it the
    interval then includes the boundary; from far away, where score and variance are both unreliable
    at the boundary, it does not.
    """
    near = rejects(inner)
    # If the test rejects the estimate itself, at a boundary, the interval ends there.
    outer = np.where(near > 0, inner, outer)
    close = np.abs(outer - inner) < _FAR_FROM_BOUNDARY * 1000 * resolution
    kept = close & (np.sign(rejects(outer)) == np.sign(near))
    lowest, highest = np.minimum(inner, outer), np.maximum(inner, outer)
    reach = np.sign(outer - inner) * np.maximum(1.25 * np.abs(guess - inner), 1000 * resolution)
    inside, outside = inner.copy(), np.clip(inner + reach, lowest, highest)
    far = rejects(outside)
    while (more := (np.sign(far) == np.sign(near)) & (outside != outer)).any():
        inside, near = np.where(more, outside, inside), np.where(more, far, near)
        reach = 2 * reach
        outside = np.where(more, np.clip(inner + reach, lowest, highest), outside)
        far = np.where(more, rejects(outside), far)
    kept |= np.sign(far) == np.sign(near)
    side = np.zeros(len(inner))
    point = guess
    for _ in range(60):
        between = (point > np.minimum(inside, outside)) & (point < np.maximum(inside, outside))
        point = np.where(between, point, (inside + outside) / 2)
        value = rejects(point)
        stays = np.sign(value) == np.sign(near)
        far = np.where(stays & (side > 0), far / 2, far)
        near = np.where(~stays & (side < 0), near / 2, near)
        inside, near = np.where(stays, point, inside), np.where(stays, value, near)
        outside, far = np.where(stays, outside, point), np.where(stays, far, value)
        side = np.where(stays, 1, -1)
        width = np.abs(outside - inside)
        if (kept | (width <= 1e-3 * np.abs(outside - inner) + 1e-12)).all():
            break
        with np.errstate(invalid="ignore", divide="ignore"):
            secant = (inside * far - outside * near) / (far - near)
        point = np.where(np.isfinite(far) & np.isfinite(secant), secant, (inside + outside) / 2)
    return np.where(kept, outer, (inside + outside) / 2)
