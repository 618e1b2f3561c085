"""How far an estimate may lie from a share that is near its border.

With two equal tails one is wasted there: no estimate is far below a share of 0, and an interval
that gives 2.5 % to the other tail holds it in 97.5 of 100 cases where 95 were asked. So estimates
are kept by how likely the share makes them, compared with the possible share that suits them best.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy.stats import norm

__all__ = ["critical_values"]

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
