"""Confidence intervals of prevalence from the likelihood: score intervals that know the borders.

A share near zero has no normal distribution, and an interval of plus or minus two standard errors
misses it. A score interval holds the shares that a test would not reject, with the variance that
they would have had: on posteriors that are certain it is Wilson's interval of a binomial share.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.influence import scale_response, validation_variance
from flaxtransfer.shift.likelihood import Maximum, blocks, information

__all__ = ["Precision", "Sample", "precision", "score_intervals", "weakest_direction"]

_NUMBERS = 10_000_000
"""That are held at once, beside the posteriors."""

_FAR = 10.0
"""Standard errors from 0 and from 1 beyond which a likelihood is as good as normal."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What a likelihood of prevalence is made of.

    Args:
        probabilities: `[m, K]`, calibrated, of the target; float32 or float64.
        source: the calibration.
        counts: `[K]`, of labelled target examples and of a prior.
        weights: `[m]`, 0 for rows that do not count; None where all do.
    """

    probabilities: np.ndarray
    source: Calibration
    counts: np.ndarray
    weights: np.ndarray | None = None

    @property
    def divisor(self) -> np.ndarray:
        """`[K]`, the source's prior, infinite where it is zero: such classes play no part."""
        return np.where(self.source.prior > 0, self.source.prior, np.inf)

    @property
    def rows(self) -> float:
        """How many rows count."""
        return float(len(self.probabilities) if self.weights is None else self.weights.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Precision:
    """What target and validation tell about each share.

    Args:
        directions: `[K, K]`; column k is how the other shares follow best when share k grows by 1.
        target: `[K]`, variances from the target alone.
        validation: `[K]`, variances from the validation that fixed calibration and source prior.
        ambiguity: `[K]`, what the variance of a target example has beyond that of a certain label.
    """

    directions: np.ndarray
    target: np.ndarray
    validation: np.ndarray
    ambiguity: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """`[K]`, standard errors."""
        return np.sqrt(self.target + self.validation)


def weakest_direction(sample: Sample, maximum: Maximum) -> tuple[float, np.ndarray]:
    """The direction that the target says least about, `[K]` of length 1, and its standard error.

    An error of 1 is as large as a share can be: such a target determines nothing along there. Only
    shares that can move count; one at zero, with a slope that holds it there, is determined.
    """
    q, free = maximum.estimate, _free(maximum)
    matrix = information(sample.probabilities, q / sample.divisor, sample.divisor, sample.weights)
    matrix = matrix * sample.rows
    seen = sample.counts > 0
    matrix[seen, seen] += sample.counts[seen] / q[seen] ** 2
    direction = np.zeros(len(q))
    if free.sum() < 2:
        return 0.0, direction
    count = int(free.sum())
    tangent = np.linalg.qr(np.concatenate([np.ones((count, 1)), np.eye(count)[:, 1:]], 1))[0][:, 1:]
    values, vectors = np.linalg.eigh(tangent.T @ matrix[np.ix_(free, free)] @ tangent)
    direction[free] = tangent @ vectors[:, 0]
    return float(1 / np.sqrt(max(values[0], 1e-300))), direction


def precision(sample: Sample, maximum: Maximum) -> Precision:
    """Variances of the shares, and how the others follow each of them.

    From the expected information, averaged over the examples of target and validation together,
    each as likely as the estimate makes it: the observed one knows nothing of a class that the
    target does not show. Half an example more of each class keeps shares off the border.
    """
    source, q, divisor = sample.source, maximum.estimate, sample.divisor
    classes, usable = len(q), np.isfinite(divisor)
    total = sample.rows + sample.counts.sum()
    inside = np.where(usable, (total * q + 0.5) / (total + usable.sum() / 2), 0.0)
    matrix = np.zeros((classes, classes))
    validation = len(source.labels)
    for array, weights in ((sample.probabilities, sample.weights), (source.probabilities, None)):
        for part, rows in blocks(array, 8):
            ratios = part @ (inside / divisor)
            mixture = sample.rows * (part @ (q / divisor)) + validation
            factor = sample.rows / np.where(ratios > 0, ratios * mixture, np.inf)
            if weights is not None:
                factor *= weights[rows]
            scores = part * np.sqrt(factor)[:, None]
            matrix += scores.T @ scores
    matrix /= np.outer(divisor, divisor)
    matrix[usable, usable] += sample.counts[usable] / inside[usable] ** 2
    free = _free(maximum) & usable
    if free.sum() == 1:
        # From the only share there is, the way leads to its likeliest rival.
        free[np.argmax(np.where(free | ~usable, -np.inf, maximum.slopes))] = True
    directions, known = _follow(matrix, free, usable)
    target = np.where(known > 0, 1 / np.where(known > 0, known, 1), np.inf)
    target[~usable] = 0.0
    # What calibration and prior move is moved through the scores of the target.
    observed = information(sample.probabilities, q / divisor, divisor, sample.weights)
    response = np.diag(likely_slopes(sample, maximum)) - observed * q
    along = directions * (target * sample.rows)
    moved = validation_variance(
        source,
        response.T @ along,
        scale_response(source, sample.probabilities, q).T @ along,
    )
    return Precision(
        directions=directions,
        target=target,
        validation=moved,
        ambiguity=np.maximum(total * target - inside * (1 - inside), 0),
    )


def likely_slopes(sample: Sample, maximum: Maximum) -> np.ndarray:
    """The slopes of the rows alone, without the counts."""
    q, total = maximum.estimate, sample.rows + sample.counts.sum()
    counted = np.divide(sample.counts, q, out=np.zeros(len(q)), where=sample.counts > 0)
    return (maximum.slopes * total - counted) / sample.rows


def score_intervals(
    sample: Sample, maximum: Maximum, precise: Precision, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends, `[K]` each: the shares that a score test at `level` keeps.

    The others follow along the share's direction. Far from 0 and 1 the score is linear and the
    ends have a formula; near them they are found on the likelihood itself.

    References:
        E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
        C. R. Rao, "Large sample tests of statistical hypotheses concerning several parameters with
        applications to problems of estimation", 1948.
    """
    q, total = maximum.estimate, sample.rows + sample.counts.sum()
    usable = np.isfinite(sample.divisor)
    z = float(norm.ppf((1 + level) / 2))
    low, high = _wilson(q, precise, z, total)
    low[~usable], high[~usable] = 0.0, 0.0
    near = usable & (np.minimum(q, 1 - q) < _FAR * precise.error)
    chosen = np.flatnonzero(near)
    size = max(1, _NUMBERS // len(sample.probabilities))
    for start in range(0, len(chosen), size):
        some = chosen[start : start + size]
        test = _score_test(sample, maximum, precise, some, total)
        fine = 1e-3 * precise.error[some] + 1e-12
        low[some] = _end(test, q[some], np.zeros(len(some)), z, low[some], fine)
        high[some] = _end(test, q[some], np.ones(len(some)), -z, high[some], fine)
    return low, high


def _wilson(
    q: np.ndarray, precise: Precision, z: float, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """Solutions t of ``(q - t)^2 = z^2 (t (1 - t) + ambiguity) / total + z^2 validation``."""
    fixed = z**2 * (precise.ambiguity / total + precise.validation)
    square, middle = 1 + z**2 / total, q + z**2 / total / 2
    root = np.sqrt(np.maximum(middle**2 - square * (q**2 - fixed), 0))
    return np.maximum((middle - root) / square, 0), np.minimum((middle + root) / square, 1)


def _score_test(sample, maximum, precise, some, total):  # type: ignore[no-untyped-def]
    """The standardised score of the shares `some`, as a function of where they are put."""
    q, way = maximum.estimate, precise.directions[:, some]
    ratios, slope = q / sample.divisor, way / sample.divisor[:, None]
    density = np.empty(len(sample.probabilities))
    growth = np.empty((len(sample.probabilities), len(some)))
    for part, rows in blocks(sample.probabilities, 8):
        density[rows], growth[rows] = part @ ratios, part @ slope
    if sample.weights is not None:
        density, growth = density[sample.weights > 0], growth[sample.weights > 0]
    seen = sample.counts > 0

    def test(shares: np.ndarray) -> np.ndarray:
        step = shares - q[some]
        score, possible = np.zeros(len(some)), np.ones(len(some), bool)
        for begin in range(0, len(density), 20_000):
            rows = slice(begin, begin + 20_000)
            there = density[rows, None] + step * growth[rows]
            possible &= (there > 0).all(0)
            score += (growth[rows] / np.where(there > 0, there, np.inf)).sum(0)
        moved = q[seen, None] + step * way[seen]
        possible &= (moved > 0).all(0)
        score += (sample.counts[seen, None] * way[seen] / np.where(moved > 0, moved, np.inf)).sum(0)
        variance = (shares * (1 - shares) + precise.ambiguity[some]) / total
        whole = np.sqrt(variance + precise.validation[some])
        found = score * variance / np.where(whole > 0, whole, np.inf)
        return np.where(possible, found, np.where(step > 0, -np.inf, np.inf))

    return test


def _end(test, inner, outer, wanted, guess, fine):  # type: ignore[no-untyped-def]
    """Where `test` is `wanted` between `inner`, which it keeps, and `outer`; `outer` if nowhere.

    Regula falsi with the Illinois rule, for all shares at once, until the bracket is `fine`.
    """
    inside, outside = inner.copy(), outer.copy()
    near, far = test(inner) - wanted, test(outer) - wanted
    # A test that rejects the estimate itself, at a border, leaves nothing between.
    outer = np.where(np.sign(near) == np.sign(wanted), inner, outer)
    kept = np.sign(far) == np.sign(near)
    side = np.zeros(len(inner))
    point = guess
    for _ in range(60):
        between = (point > np.minimum(inside, outside)) & (point < np.maximum(inside, outside))
        point = np.where(between, point, (inside + outside) / 2)
        value = test(point) - wanted
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


def _free(maximum: Maximum) -> np.ndarray:
    return (maximum.estimate > 0) | (maximum.slopes > 1 - 1e-6)


def _follow(
    matrix: np.ndarray, free: np.ndarray, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Directions in which only the free shares follow, and the information along each."""
    classes = len(matrix)
    directions = np.zeros((classes, classes))
    part = matrix[np.ix_(free, free)]
    inverse = np.linalg.pinv(part, rcond=1e-13, hermitian=True)
    sums = inverse.sum(1)
    covariance = inverse - np.outer(sums, sums) / sums.sum()
    spread = np.maximum(np.diag(covariance), 1e-300)
    directions[np.ix_(free, free)] = covariance / spread
    known = np.zeros(classes)
    known[free] = 1 / spread
    rest = usable & ~free
    pull = inverse @ matrix[np.ix_(free, rest)]
    step = -pull + np.outer(sums, (pull.sum(0) - 1) / sums.sum())
    directions[np.ix_(free, rest)] = step
    directions[rest, rest] = 1.0
    known[rest] = (
        np.diag(matrix)[rest]
        + 2 * (step * matrix[np.ix_(free, rest)]).sum(0)
        + (step * (part @ step)).sum(0)
    )
    return directions, known
