"""The calibration error of a reliability diagram: its bias taken off, and its interval."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.calibration.reliability import ReliabilityBin
from flaxtransfer.shift.intervals import checked_level, checked_replicates

__all__ = ["debiased_errors", "error_interval", "expected_error"]


def expected_error(diagram: Sequence[ReliabilityBin]) -> float:
    """Mean over examples of |confidence - accuracy| of their bin.

    >>> expected_error([ReliabilityBin(10, 0.75, 0.5, 0.2, 0.8, 0.7, 0.8)])
    0.25
    """
    counts, confidence, accuracy = _columns(diagram)
    return float(counts @ np.abs(confidence - accuracy) / counts.sum())


def debiased_errors(diagram: Sequence[ReliabilityBin]) -> tuple[float, float] | None:
    """The mean and the root mean square of the bins' errors, less what their sampling adds.

    The accuracy of a bin is not its probability, so that errors are above 0 for perfect
    probabilities too. The square is corrected without bias, the mean as if accuracies were normal.

    Returns:
        Both at least 0; None where a bin has one example, which does not show its own noise.

    >>> debiased_errors([ReliabilityBin(5, 0.75, 0.5, 0.2, 0.8, 0.7, 0.8)])[1]  # of 0.25
    0.0

    References:
        A. Kumar, P. Liang, T. Ma, "Verified uncertainty calibration", 2019.
        J. Bröcker, "Estimating reliability and resolution of probability forecasts through
        decomposition of the empirical score", 2012.
    """
    counts, confidence, accuracy = _columns(diagram)
    if counts.min() < 2:
        return None
    shares = counts / counts.sum()
    errors = np.abs(confidence - accuracy)
    variance = accuracy * (1 - accuracy)
    square = float(shares @ (errors**2 - variance / (counts - 1)))
    # The mean of |N(error, variance)| in closed form: what another sampling would make of it.
    deviation = np.sqrt(variance / counts)
    ratio = np.divide(errors, deviation, out=np.full_like(errors, np.inf), where=deviation > 0)
    folded = 2 * deviation * norm.pdf(ratio) + errors * (1 - 2 * norm.sf(ratio))
    absolute = float(shares @ (2 * errors - folded))
    return max(absolute, 0.0), float(np.sqrt(max(square, 0.0)))


def error_interval(
    diagram: Sequence[ReliabilityBin], *, level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The true errors with which the observed one is not surprising: a parametric bootstrap.

    Resampling the examples will not do: near 0 it adds to the error what sampling had added
    already, and intervals of calibrated models do not reach 0. Instead, each size of the true error
    is tried: it is spread over the bins as the observed errors are, right predictions are drawn
    with the accuracies that this makes, and sizes under which the observed error falls into neither
    tail are in the interval.

    Args:
        diagram: bins.
        level: of the interval.
        replicates: draws of each size.
        seed: of the draws; the same for every size.

    Raises:
        ValueError: no replicates, a level outside of 0 and 1.

    >>> bins = [ReliabilityBin(100, 0.75, 0.5, 0.4, 0.6, 0.7, 0.8)]
    >>> low, high = error_interval(bins)
    >>> 0.1 < low < 0.25 < high < 0.4
    True

    References:
        B. Hansen, "The grid bootstrap and the autoregressive model", 1999.
        A. Read, "Presentation of search results: the CLs technique", 2002: the upper end.
    """
    counts, confidence, accuracy = _columns(diagram)
    replicates = checked_replicates(replicates)
    tail = (1 - checked_level(level)) / 2
    shares = counts / counts.sum()
    errors = confidence - accuracy
    # A bin that happens to have no error may have one all the same, of the size of its noise.
    smooth = (counts * accuracy + 1) / (counts + 2)
    noise = np.sqrt(smooth * (1 - smooth) / counts)
    spread = np.hypot(errors, noise)
    observed_sign = np.where(errors < 0, -1.0, 1.0)
    # And its sign may be the other one, as far as the noise goes.
    other_sign = np.where(np.abs(errors) > 2 * noise, observed_sign, -observed_sign)
    observed = float(shares @ np.abs(errors))

    def true_accuracy(size: float, sign: np.ndarray) -> np.ndarray:
        return np.clip(confidence - size * sign * spread / (shares @ spread), 0.0, 1.0)

    def drawn(size: float, sign: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(seed)
        wanted = (replicates, len(counts))
        hits = random.binomial(counts, true_accuracy(size, sign), size=wanted)
        return np.abs(confidence - hits / counts) @ shares

    def end(holds: Callable[[np.ndarray], bool], sign: np.ndarray) -> float:
        size = _first(
            lambda size: holds(drawn(size, sign)), float((shares @ spread) / spread.min())
        )
        return float(shares @ np.abs(confidence - true_accuracy(size, sign)))

    # Equal up to rounding counts as equal, in both tails.
    slack = 1e-12
    # An error smaller than that of calibrated models says little: without the second factor, the
    # upper end would be 0 as well. So few may be below that draws cannot tell a tail of them; it
    # then counts as the smallest error of which they can.
    calibrated = drawn(0.0, observed_sign)
    least = max(observed, float(np.quantile(calibrated, min(1.0, 1 / (tail * replicates)))))
    below = float((calibrated <= least + slack).mean())

    def reached(errors: np.ndarray) -> bool:
        return bool((errors >= observed - slack).mean() >= tail)

    def exceeded(errors: np.ndarray) -> bool:
        return bool((errors <= least + slack).mean() < tail * below)

    high = max(end(exceeded, observed_sign), end(exceeded, other_sign))
    return min(end(reached, observed_sign), high), high


def _first(holds: Callable[[float], bool], largest: float) -> float:
    """From where on a statement about a size holds, by bisection; `largest` where it never does."""
    if holds(0.0):
        return 0.0
    low, high = 0.0, largest
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _columns(diagram: Sequence[ReliabilityBin]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array([each.count for each in diagram]),
        np.array([each.confidence for each in diagram]),
        np.array([each.accuracy for each in diagram]),
    )
