"""Score intervals of prevalence from profile likelihoods.

How far an estimate may lie from a share that is near its border.

With two equal tails one is wasted there: no estimate is far below a share of 0, and an interval
that gives 2.5 % to the other tail holds it in 97.5 of 100 cases where 95 were asked. So estimates
are kept by how likely the share makes them, compared with the possible share that suits them best.

A likelihood of prevalence along one direction for each share: how it falls, and how surely.

The score of a share is zero on average where the share is right. What it varies by there, and how
skewed it is, are averages too, over the examples of target and validation together, each as likely
as the share makes it: the target alone knows little of a class that it hardly shows.

Confidence intervals of prevalence from the likelihood: score intervals that know the borders.

A share near zero has no normal distribution, and an interval of plus or minus two standard errors
misses it. A score interval holds the shares that a test would not reject, with the variance that
they would have had: on posteriors that are certain, and far from 0 and 1, it is Wilson's interval
of a binomial share. Near them both tails are corrected for skewness, and they are not equal
(`borders.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.likelihood import Maximum, blocks
from flaxtransfer.shift.precision import Precision, Sample

__all__ = ["Point", "Profiles", "critical_values", "profiles", "score_intervals"]


_POINTS = 257


def critical_values(distance: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """How many standard errors above and below a share an estimate is kept.

    Args:
        distance: of the share from the border below it, in standard errors, at least 0.
        level: of the interval.

    Returns:
        Two arrays like `distance`. From the two-sided normal quantile on both are that quantile; at
        the border the first is the one-sided one, and the second infinite.

    References:
        G. J. Feldman, R. D. Cousins, "Unified approach to the classical statistical analysis of
        small signals", 1998.

    >>> above, below = critical_values(np.array([0.0, 1.0, 3.0]), 0.95)
    >>> above.round(2), below.round(2)
    (array([1.64, 1.82, 1.96]), array([ inf, 2.16, 1.96]))
    """
    grid, values = _table(level)
    # From the two-sided quantile on, where both are equal, the border is out of sight.
    distance = np.minimum(distance, grid[-1])
    above = np.interp(distance, grid, values)
    with np.errstate(divide="ignore"):
        return above, (distance**2 + above**2) / (2 * distance)


@functools.lru_cache(maxsize=8)
def _table(level: float) -> tuple[np.ndarray, np.ndarray]:
    """Distances up to the two-sided quantile, and the upper critical value at each.

    An estimate x at a distance d has the likelihood ratio ``exp(-(x - d)^2 / 2)`` against the best
    share, or ``exp(x d - d^2 / 2)`` where x is below the border. Both ends of what is kept have the
    same ratio, which gives the lower one; bisection finds the upper one that keeps `level`.
    """
    least, most = float(norm.ppf(level)), float(norm.ppf((1 + level) / 2))
    grid = np.linspace(0, most, _POINTS)
    low, high = np.full(_POINTS, least), np.full(_POINTS, most)
    for _ in range(50):
        middle = (low + high) / 2
        with np.errstate(divide="ignore"):  # at the border itself nothing is too low
            lower = -(grid**2 + middle**2) / (2 * grid)
        small = norm.cdf(middle) - norm.cdf(lower) < level
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    return grid, high


_ROWS = 20_000
"""That are looked at together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """The likelihood where each of `D` shares has been moved along its direction; arrays `[D]`.

    Args:
        score: slope of the target's log-likelihood.
        information: its variance.
        third: its third moment.
        fall: of the log-likelihood below its maximum.
        possible: whether the target can be seen there at all.
    """

    score: np.ndarray
    information: np.ndarray
    third: np.ndarray
    fall: np.ndarray
    possible: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """`[D]`, of the share: the inverse of the information."""
        return 1 / np.where(self.information > 0, self.information, np.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Profiles:
    """What `profiles` has made of a sample: densities of its examples, and their growth.

    Args:
        density: `[m + n]`, of target and validation, relative to the source's.
        growth: `[m + n, D]`, of the density for a step along each direction.
        mixture: `[m + n]`, density of all examples together, per target example.
        rows: m, of the target.
        known: `[L]`, shares that labels or a prior count for.
        ways: `[L, D]`, their growth.
        counts: `[L]`.
    """

    density: np.ndarray
    growth: np.ndarray
    mixture: np.ndarray
    rows: int
    known: np.ndarray
    ways: np.ndarray
    counts: np.ndarray

    def at(self, step: np.ndarray) -> Point:
        """After a step `[D]` from the estimate, along each of the directions."""
        directions = self.growth.shape[1]
        score, information, third, fall = np.zeros((4, directions))
        possible = np.ones(directions, bool)
        for begin in range(0, len(self.density), _ROWS):
            block = slice(begin, begin + _ROWS)
            target = slice(0, max(0, self.rows - begin))
            growth, here = self.growth[block], self.density[block, None]
            there = here + step * growth
            possible &= (there[target] > 0).all(0)
            there = np.where(there > 0, there, np.inf)
            pull = growth / there
            weighted = pull * growth / self.mixture[block, None]
            score += pull[target].sum(0)
            information += weighted.sum(0)
            third += (weighted * pull).sum(0)
            fall -= np.log(there[target] / here[target]).sum(0)
        moved = self.known[:, None] + step * self.ways
        possible &= (moved > 0).all(0)
        moved = np.where(moved > 0, moved, np.inf)
        pull, counts = self.ways / moved, self.counts[:, None]
        return Point(
            score=score + (counts * pull).sum(0),
            information=information + (counts * pull**2).sum(0),
            third=third + (counts * pull**3).sum(0),
            fall=fall - (counts * np.log(moved / self.known[:, None])).sum(0),
            possible=possible,
        )


def profiles(sample: Sample, maximum: Maximum, directions: np.ndarray) -> Profiles:
    """The likelihood along `directions`, `[K, D]`."""
    q = maximum.estimate
    density, growth = _along(sample.probabilities, sample, q, directions)
    if sample.weights is not None:
        density, growth = density[sample.weights > 0], growth[sample.weights > 0]
    source, source_growth = _along(sample.source.probabilities, sample, q, directions)
    rows, seen = len(density), sample.counts > 0
    density = np.concatenate([density, source])
    return Profiles(
        density=density,
        growth=np.concatenate([growth, source_growth]),
        mixture=density + len(source) / rows,
        rows=rows,
        known=q[seen],
        ways=directions[seen],
        counts=sample.counts[seen],
    )


def _along(
    probabilities: np.ndarray, sample: Sample, q: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    ratios, slopes = q / sample.divisor, directions / sample.divisor[:, None]
    density = np.empty(len(probabilities))
    growth = np.empty((len(probabilities), directions.shape[1]))
    for part, rows in blocks(probabilities, 8):
        density[rows], growth[rows] = part @ ratios, part @ slopes
    return density, growth


_NUMBERS = 10_000_000
"""That are held at once, beside the posteriors."""

_FAR = 10.0
"""Standard errors from 0 and from 1 beyond which a likelihood is as good as normal."""

_BORDER = 1e-12
"""A share that is 0 for all that matters."""

_Test = Callable[[np.ndarray], np.ndarray]


def score_intervals(
    sample: Sample, maximum: Maximum, precise: Precision, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends, `[K]` each: the shares that a score test at `level` keeps.

    The others follow along the share's direction. Far from 0 and 1 the score is linear and the
    ends have a formula; near them they are found on the likelihood itself.

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
    low, high = _wilson(q, precise, z, total)
    low[~usable], high[~usable] = 0.0, 0.0
    near = usable & (np.minimum(q, 1 - q) < _FAR * precise.error)
    chosen = np.flatnonzero(near)
    size = max(1, _NUMBERS // (len(sample.probabilities) + len(sample.source.probabilities)))
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        fine = 1e-3 * precise.error[some] + 1e-12
        # At the border itself the score of a certain row is infinite and its variance zero.
        inside = np.minimum(q[some], _BORDER), np.maximum(q[some], 1 - _BORDER)
        along = profiles(sample, maximum, precise.directions[:, some])
        too_small, too_large = _rejections(along, maximum, precise, some, level)
        low[some] = _end(too_small, q[some], inside[0], low[some], fine)
        high[some] = _end(too_large, q[some], inside[1], high[some], fine)
    low[low <= _BORDER], high[high >= 1 - _BORDER] = 0.0, 1.0
    return low, high


def _wilson(
    q: np.ndarray, precise: Precision, z: float, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """Solutions t of ``(q - t)^2 = z^2 (t (1 - t) + ambiguity) / total + z^2 validation``."""
    fixed = z**2 * (precise.ambiguity / total + precise.validation)
    square, middle = 1 + z**2 / total, q + z**2 / total / 2
    root = np.sqrt(np.maximum(middle**2 - square * (q**2 - fixed), 0))
    return np.maximum((middle - root) / square, 0), np.minimum((middle + root) / square, 1)


def _rejections(
    along: Profiles, maximum: Maximum, precise: Precision, some: np.ndarray, level: float
) -> tuple[_Test, _Test]:
    """How far above a share the estimate lies beyond what is kept, and how far below it."""
    q, two_sided = maximum.estimate[some], float(norm.ppf((1 + level) / 2))
    # What the validation moves it moves through the scores, whose variance that adds to.
    target = np.where(precise.target > 0, precise.target, np.inf)[some]
    validation = precise.validation[some] / target**2
    # A little inside: an estimate of nothing would be skewed without end.
    skewness_here = _spread(along.at(precise.inside[some] - q), validation)[1]

    def departure(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The estimate's distance from a share, as a normal number, and the standard error."""
        step = shares - q
        point = along.at(step)
        error, skewness = _spread(point, validation)
        score = point.score * point.variance / error
        # The short tail of a skewed estimate ends before a normal one. In the long tail one
        # doubtful row makes the score large, and a correction of it can turn back; the root of
        # the likelihood ratio is nearly normal, but for a sixth of the skewness.
        short = score - np.maximum(score**2 - 1, 0) * skewness / 6
        root = np.sqrt(2 * np.maximum(point.fall, 0) * point.variance) / error
        long = -np.sign(step) * root + skewness_here / 6
        found = np.where(score * skewness < 0, short, long)
        return np.where(point.possible, found, np.where(step > 0, -np.inf, np.inf)), error

    def critical(shares: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        above, below = critical_values(shares / error, level)
        # At the border of 1 the two change places.
        below_one, above_one = critical_values((1 - shares) / error, level)
        return above + above_one - two_sided, below + below_one - two_sided

    def too_small(shares: np.ndarray) -> np.ndarray:
        found, error = departure(shares)
        return found - critical(shares, error)[0]

    def too_large(shares: np.ndarray) -> np.ndarray:
        found, error = departure(shares)
        return -found - critical(shares, error)[1]

    return too_small, too_large


def _spread(point: Point, validation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of a share's estimate, at least `_BORDER`, and its skewness."""
    variance = point.variance
    error = np.maximum(np.sqrt(variance + validation * variance**2), _BORDER)
    return error, point.third * (variance / error) ** 3


def _end(
    rejects: _Test, inner: np.ndarray, outer: np.ndarray, guess: np.ndarray, fine: np.ndarray
) -> np.ndarray:
    """Where `rejects` is first above 0 on the way from `inner` to `outer`; `outer` if nowhere.

    Steps outward that double until the sign changes, then regula falsi with the Illinois rule until
    the bracket is `fine`. All shares at once. The variance shrinks towards a border, and the test
    may reject a share on the way and not the border: near by, the interval then goes as far; from
    far away that says nothing, for there both score and variance are lost.
    """
    near = rejects(inner)
    # A test that rejects the estimate itself, at a border, leaves nothing between.
    outer = np.where(near > 0, inner, outer)
    by = np.abs(outer - inner) < _FAR * 1000 * fine
    kept = by & (np.sign(rejects(outer)) == np.sign(near))
    lowest, highest = np.minimum(inner, outer), np.maximum(inner, outer)
    reach = np.sign(outer - inner) * np.maximum(1.25 * np.abs(guess - inner), 1000 * fine)
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
