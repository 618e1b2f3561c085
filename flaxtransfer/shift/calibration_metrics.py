"""Calibration errors, proper scores and reliability diagrams.

How often a model is right where it says how sure it is: the data of a reliability diagram.

The calibration error of a reliability diagram: its bias taken off, and its interval.

How far probabilities are from frequencies: proper scores, and calibration errors by bins.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.checks import as_labels, as_probabilities
from flaxtransfer.shift.statistics import checked_level, checked_replicates, wilson_interval

__all__ = [
    "CalibrationError",
    "ReliabilityBin",
    "bin_by_confidence",
    "brier_score",
    "calibration_error",
    "debiased_errors",
    "error_interval",
    "expected_error",
    "negative_log_likelihood",
    "reliability",
]


_FEWEST = 10
"""Examples a bin; the accuracy of fewer is noise."""


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """Examples of about the same confidence.

    Args:
        count: how many.
        confidence: mean probability of the class that is predicted.
        accuracy: share of right predictions.
        low: lower end of the accuracy's Wilson interval.
        high: upper end.
        smallest: confidence in the bin.
        largest: confidence in the bin.
    """

    count: int
    confidence: float
    accuracy: float
    low: float
    high: float
    smallest: float
    largest: float


def reliability(
    probabilities: Any, labels: Any, *, bins: int = 15, level: float = 0.95
) -> tuple[ReliabilityBin, ...]:
    """Bins of equal mass, by the confidence in the predicted class, least confident first.

    Calibrated predictions lie on the diagonal: accuracy is confidence. Equal confidences are never
    parted, and a bin has 10 examples or more, so that there may be fewer bins than asked for.

    Args:
        probabilities: `[n, K]`.
        labels: `[n]`.
        bins: at most.
        level: of the intervals.

    Returns:
        Plain numbers: `dataclasses.asdict` makes JSON of a bin.

    Raises:
        ValueError: arrays are broken, no bins, a level outside of 0 and 1.

    >>> (one,) = reliability([[0.8, 0.2], [0.4, 0.6]], [0, 0])
    >>> one.count, round(one.confidence, 6), one.accuracy
    (2, 0.7, 0.5)

    References:
        A. Niculescu-Mizil, R. Caruana, "Predicting good probabilities with supervised learning",
        2005.
    """
    found = as_probabilities(probabilities, "probabilities")
    known = as_labels(labels, "labels", count=len(found), classes=found.shape[1])
    confidences, right = found.max(1), found.argmax(1) == known
    numbers = bin_by_confidence(confidences, bins)
    result = []
    for number in range(numbers.max() + 1):
        inside = numbers == number
        count, hits = int(inside.sum()), int(right[inside].sum())
        low, high = wilson_interval(hits, count, checked_level(level))
        result.append(
            ReliabilityBin(
                count=count,
                confidence=float(confidences[inside].mean()),
                accuracy=hits / count,
                low=low,
                high=high,
                smallest=float(confidences[inside].min()),
                largest=float(confidences[inside].max()),
            )
        )
    return tuple(result)


def bin_by_confidence(confidences: np.ndarray, bins: int) -> np.ndarray:
    """The number of the bin `[n]` of each confidence `[n]`, from 0 without gaps.

    Raises:
        ValueError: bins is no positive whole number.

    >>> bin_by_confidence(np.repeat([0.5, 0.6, 0.9], [5, 10, 15]), 3)[[0, 5, 15]].tolist()
    [0, 0, 1]
    """
    if bins != int(bins) or bins < 1:
        raise ValueError(f"bins is {bins!r}; there is at least one bin")
    count = len(confidences)
    wanted = int(min(bins, max(1, count // _FEWEST)))
    ordered = np.sort(confidences)
    starts = [0]
    fewest = min(_FEWEST, count)
    for number in range(1, wanted):
        # A bin begins where a new confidence does: at or after the place of equal mass, or before
        # it where that is nearer.
        place = round(number * count / wanted)
        value = ordered[place]
        before = int(np.searchsorted(ordered, value, side="left"))
        after = int(np.searchsorted(ordered, value, side="right"))
        for start in sorted((before, after), key=lambda start: abs(start - place)):
            if start - starts[-1] >= fewest and count - start >= fewest:
                starts.append(start)
                break
    edges = ordered[starts[1:]]
    return np.searchsorted(edges, confidences, side="right")


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


@dataclasses.dataclass(frozen=True)
class CalibrationError:
    """How well probabilities of labeled examples are calibrated.

    Args:
        count: of examples.
        accuracy: share of right predictions.
        confidence: mean probability of the predicted class; above the accuracy, the model is
            overconfident.
        nll: mean negative log-likelihood, in nats.
        brier: mean squared distance from the one-hot label, between 0 and 2.
        expected: expected calibration error (ECE): mean of |confidence - accuracy| over the bins.
            It is above 0 for perfect probabilities too, more so the fewer the examples.
        debiased: the same less what sampling adds to it; 0 where that is all there is. None where a
            bin has one example.
        low: lower end of the interval of the error, for these bins.
        high: upper end.
        level: of the interval.
        root_mean_square: debiased as well, of the squared differences; None as above.
        bins: the reliability diagram.
        notes: fewer bins than asked for.
    """

    count: int
    accuracy: float
    confidence: float
    nll: float
    brier: float
    expected: float
    debiased: float | None
    low: float
    high: float
    level: float
    root_mean_square: float | None
    bins: tuple[ReliabilityBin, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        debiased = "not known" if self.debiased is None else f"{self.debiased:.4f}"
        lines = [
            f"{self.count} example(s), accuracy {self.accuracy:.4f}, mean confidence "
            f"{self.confidence:.4f}",
            f"negative log-likelihood {self.nll:.4f}, Brier score {self.brier:.4f}",
            f"expected calibration error {debiased} ({self.level:.0%} interval {self.low:.4f} to "
            f"{self.high:.4f}; {self.expected:.4f} before the correction of its bias)",
        ]
        return "\n".join([*lines, *self.notes])


def negative_log_likelihood(probabilities: Any, labels: Any) -> float:
    """Mean over examples of -log of the probability of their class, in nats.

    Infinite where a class that occurred had probability 0.

    >>> round(negative_log_likelihood([[0.5, 0.5], [0.25, 0.75]], [0, 1]), 4)
    0.4904
    """
    found, known = _checked(probabilities, labels)
    return _nll(found, known)


def brier_score(probabilities: Any, labels: Any) -> float:
    """Mean over examples of the squared distance of probabilities from the one-hot label.

    The multi-class form, summed over the classes: from 0 to 2. For two classes it is twice the
    score of one column.

    >>> brier_score([[0.5, 0.5], [0.25, 0.75]], [0, 1])
    0.3125

    References:
        G. Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    found, known = _checked(probabilities, labels)
    return _brier(found, known)


def calibration_error(
    probabilities: Any,
    labels: Any,
    *,
    bins: int = 15,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationError:
    """Scores, and the calibration error of the predicted class's probability.

    Give it examples that the calibration has not seen: on its own, a fit looks better than it is.
    The error is that of the binned probabilities, which is a lower bound of the true one. Its
    interval is a parametric bootstrap's, see `error_interval`.

    Args:
        probabilities: `[n, K]`.
        labels: `[n]`.
        bins: of equal mass, at most; equal confidences stay together, 10 examples at least.
        replicates: of the bootstrap.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: arrays are broken, no bins, no replicates, a level outside of 0 and 1.

    >>> found = calibration_error([[0.9, 0.1]] * 50, [0] * 45 + [1] * 5)
    >>> round(found.expected, 6), len(found.bins)
    (0.0, 1)

    References:
        C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On calibration of modern neural networks", 2017.
        A. Kumar, P. Liang, T. Ma, "Verified uncertainty calibration", 2019.
    """
    found, known = _checked(probabilities, labels)
    right = found.argmax(1) == known
    diagram = reliability(found, known, bins=bins, level=level)
    low, high = error_interval(diagram, level=level, replicates=replicates, seed=seed)
    debiased = debiased_errors(diagram)
    notes = []
    if len(diagram) < bins:
        notes.append(
            f"{len(diagram)} of {bins} bins: examples of equal confidence stay together, and a bin "
            "has 10 at least"
        )
    if debiased is None:
        notes.append("a bin with one example does not show how much of the error is chance")
    return CalibrationError(
        count=len(found),
        accuracy=float(right.mean()),
        confidence=float(found.max(1).mean()),
        nll=_nll(found, known),
        brier=_brier(found, known),
        expected=expected_error(diagram),
        debiased=None if debiased is None else debiased[0],
        low=low,
        high=high,
        level=level,
        root_mean_square=None if debiased is None else debiased[1],
        bins=diagram,
        notes=tuple(notes),
    )


def _checked(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    found = as_probabilities(probabilities, "probabilities")
    return found, as_labels(labels, "labels", count=len(found), classes=found.shape[1])


def _nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return float(np.mean(-np.log(probabilities[np.arange(len(labels)), labels])) + 0.0)


def _brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    own = probabilities[np.arange(len(labels)), labels]
    return float(((probabilities**2).sum(1) - 2 * own + 1).mean())
