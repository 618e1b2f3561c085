"""Confidence intervals: of a share, and of a statistic that was resampled."""

import numpy as np
from scipy.stats import norm

__all__ = ["checked_level", "checked_replicates", "percentile_interval", "wilson_interval"]


def wilson_interval(successes: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """An interval for a probability, from how often it happened.

    It stays inside of 0 and 1 and has a width where nothing or everything happened, which the
    normal approximation has not.

    Raises:
        ValueError: no trials, more successes than trials, a level outside of 0 and 1.

    >>> tuple(round(end, 4) for end in wilson_interval(8, 10))
    (0.4902, 0.9433)

    References:
        E. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} trials have no interval")
    z = float(norm.isf((1 - checked_level(level)) / 2))
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    # The share itself is inside, also where rounding says otherwise.
    return float(max(0.0, min(middle - half, share))), float(min(1.0, max(middle + half, share)))


def percentile_interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle of a bootstrap's values: for statistics without much bias.

    >>> percentile_interval(np.arange(9.0), 0.5)
    (2.0, 6.0)

    References:
        B. Efron, R. Tibshirani, "An introduction to the bootstrap", 1993.
    """
    tail = (1 - checked_level(level)) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def checked_level(level: float) -> float:
    """The same level.

    Raises:
        ValueError: it is no share between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; it lies between 0 and 1, as 0.95")
    return level


def checked_replicates(replicates: int) -> int:
    """The same number.

    Raises:
        ValueError: it is no whole number from 1 up.
    """
    if replicates < 1 or replicates != int(replicates):
        raise ValueError(f"replicates is {replicates!r}; a bootstrap has one at least, better 1000")
    return int(replicates)
