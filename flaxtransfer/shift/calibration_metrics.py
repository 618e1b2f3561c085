"""Calibration metrics: calibration error, proper scores and reliability diagrams.

Use them on labeled examples that the calibration has not seen. ``calibration_error`` computes all
of them at once, with the bias of the binned error removed and a confidence interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.checks import as_labels, as_probabilities
from flaxtransfer.shift.statistics import check_level, check_replicates, wilson_interval

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

_MIN_PER_BIN = 10
"""Examples per bin; the accuracy of fewer is noise."""


@dataclasses.dataclass(frozen=True)
class CalibrationError:
    """Calibration of the probabilities of labeled examples.

    Args:
        count: Number of examples.
        accuracy: Fraction of correct predictions.
        confidence: Mean probability of the predicted class; above the accuracy, the model is
            overconfident.
        nll: Mean negative log-likelihood, in nats.
        brier: Brier score: mean squared distance from the one-hot label, between 0 and 2.
        expected: Expected calibration error (ECE): mean of |confidence - accuracy| over the bins.
            It is above 0 for perfect probabilities too, more so with fewer examples.
        debiased: The ECE without what sampling adds, at least 0; None where a bin has one example.
        low: Lower end of the confidence interval of the error, for these bins.
        high: Upper end of it.
        level: Confidence level.
        root_mean_square: Root of the mean squared difference, debiased; None as above.
        bins: The reliability diagram.
        notes: What the reader must know, such as fewer bins than asked for.
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
            f"{self.high:.4f}; {self.expected:.4f} before bias correction)",
        ]
        return "\n".join([*lines, *self.notes])


def calibration_error(
    probabilities: Any,
    labels: Any,
    *,
    bins: int = 15,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> CalibrationError:
    """Calibration error, proper scores and the reliability diagram of labeled examples.

    Use it on examples that the calibration has not seen; on its own examples a fit looks too good.
    The error is that of the binned probabilities, a lower bound of the true one. Its interval is
    from a parametric bootstrap, see ``error_interval``.

    Args:
        probabilities: ``[n, K]``.
        labels: ``[n]``.
        bins: Most bins of equal mass; equal confidences stay in one bin of at least 10 examples.
        replicates: Bootstrap replicates.
        level: Confidence level of the intervals.
        seed: Of the bootstrap.

    Raises:
        ValueError: Invalid arrays, no bins, no replicates, or a level outside of 0 and 1.

    >>> found = calibration_error([[0.9, 0.1]] * 50, [0] * 45 + [1] * 5)
    >>> round(found.expected, 6), len(found.bins)
    (0.0, 1)

    References:
        C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On calibration of modern neural networks", 2017.
        A. Kumar, P. Liang, T. Ma, "Verified uncertainty calibration", 2019.
    """
    found, known = _check(probabilities, labels)
    correct = found.argmax(1) == known
    diagram = reliability(found, known, bins=bins, level=level)
    low, high = error_interval(diagram, level=level, replicates=replicates, seed=seed)
    debiased = debiased_errors(diagram)
    notes = []
    if len(diagram) < bins:
        notes.append(
            f"{len(diagram)} of {bins} bins: examples of equal confidence stay in one bin, and a "
            "bin has at least 10"
        )
    if debiased is None:
        notes.append("a bin has one example: the bias of the calibration error is not known")
    return CalibrationError(
        count=len(found),
        accuracy=float(correct.mean()),
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


def negative_log_likelihood(probabilities: Any, labels: Any) -> float:
    """Mean negative log-likelihood of the labels, in nats.

    Infinite where a class that occurs has probability 0.

    >>> round(negative_log_likelihood([[0.5, 0.5], [0.25, 0.75]], [0, 1]), 4)
    0.4904
    """
    found, known = _check(probabilities, labels)
    return _nll(found, known)


def brier_score(probabilities: Any, labels: Any) -> float:
    """Brier score: mean squared distance of probabilities from the one-hot label.

    The multi-class form, summed over the classes, from 0 to 2. For two classes it is twice the
    score of one column.

    >>> brier_score([[0.5, 0.5], [0.25, 0.75]], [0, 1])
    0.3125

    References:
        G. Brier, "Verification of forecasts expressed in terms of probability", 1950.
    """
    found, known = _check(probabilities, labels)
    return _brier(found, known)


@dataclasses.dataclass(frozen=True)
class ReliabilityBin:
    """One bin of a reliability diagram: examples of similar confidence.

    Args:
        count: Number of examples.
        confidence: Mean probability of the predicted class.
        accuracy: Fraction of correct predictions.
        low: Lower end of the Wilson interval of the accuracy.
        high: Upper end of it.
        smallest: Smallest confidence in the bin.
        largest: Largest confidence in the bin.
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
    """Reliability diagram: bins of equal mass by confidence, least confident first.

    For calibrated predictions accuracy equals confidence. Equal confidences stay in one bin, and a
    bin has at least 10 examples, so that there may be fewer bins than asked for.

    Args:
        probabilities: ``[n, K]``.
        labels: ``[n]``.
        bins: Most bins.
        level: Confidence level of the intervals.

    Returns:
        The bins, of plain numbers: ``dataclasses.asdict`` makes JSON of a bin.

    Raises:
        ValueError: Invalid arrays, no bins, or a level outside of 0 and 1.

    >>> (one,) = reliability([[0.8, 0.2], [0.4, 0.6]], [0, 0])
    >>> one.count, round(one.confidence, 6), one.accuracy
    (2, 0.7, 0.5)

    References:
        A. Niculescu-Mizil, R. Caruana, "Predicting good probabilities with supervised learning",
        2005.
    """
    found = as_probabilities(probabilities, "probabilities")
    known = as_labels(labels, "labels", count=len(found), classes=found.shape[1])
    confidences, correct = found.max(1), found.argmax(1) == known
    numbers = bin_by_confidence(confidences, bins)
    result = []
    for number in range(numbers.max() + 1):
        inside = numbers == number
        count, correct_counts = int(inside.sum()), int(correct[inside].sum())
        low, high = wilson_interval(correct_counts, count, check_level(level))
        result.append(
            ReliabilityBin(
                count=count,
                confidence=float(confidences[inside].mean()),
                accuracy=correct_counts / count,
                low=low,
                high=high,
                smallest=float(confidences[inside].min()),
                largest=float(confidences[inside].max()),
            )
        )
    return tuple(result)


def expected_error(diagram: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: the mean over examples of |confidence - accuracy| of their bin.

    >>> expected_error([ReliabilityBin(10, 0.75, 0.5, 0.2, 0.8, 0.7, 0.8)])
    0.25
    """
    counts, confidence, accuracy = _columns(diagram)
    return float(counts @ np.abs(confidence - accuracy) / counts.sum())


def debiased_errors(diagram: Sequence[ReliabilityBin]) -> tuple[float, float] | None:
    """Debiased calibration errors: mean and root mean square, without what sampling adds.

    The accuracy of a bin is a noisy estimate, so that the binned error is above 0 even for perfect
    probabilities. The correction of the square is unbiased; that of the mean treats accuracies as
    normal.

    Returns:
        Mean and root mean square, both >= 0; None where a bin has one example, whose noise cannot
        be estimated.

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
    weights = counts / counts.sum()
    errors = np.abs(confidence - accuracy)
    variance = accuracy * (1 - accuracy)
    square = float(weights @ (errors**2 - variance / (counts - 1)))
    # The mean of |N(error, variance)| in closed form.
    deviation = np.sqrt(variance / counts)
    ratio = np.divide(errors, deviation, out=np.full_like(errors, np.inf), where=deviation > 0)
    folded = 2 * deviation * norm.pdf(ratio) + errors * (1 - 2 * norm.sf(ratio))
    absolute = float(weights @ (2 * errors - folded))
    return max(absolute, 0.0), float(np.sqrt(max(square, 0.0)))


def error_interval(
    diagram: Sequence[ReliabilityBin], *, level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the calibration error by a parametric (grid) bootstrap.

    Resampling the examples does not work: near 0 it adds the sampling error a second time, and
    intervals of calibrated models miss 0. Instead, true errors of each size are tried: each is
    spread over the bins in proportion to the observed errors, correct predictions are simulated
    with the resulting accuracies, and the interval holds the sizes for which the observed error is
    in neither tail.

    Args:
        diagram: Bins.
        level: Confidence level.
        replicates: Simulations per size.
        seed: Of the simulations; the same for every size.

    Raises:
        ValueError: No replicates, or a level outside of 0 and 1.

    >>> bins = [ReliabilityBin(100, 0.75, 0.5, 0.4, 0.6, 0.7, 0.8)]
    >>> low, high = error_interval(bins)
    >>> 0.1 < low < 0.25 < high < 0.4
    True

    References:
        B. Hansen, "The grid bootstrap and the autoregressive model", 1999.
        A. Read, "Presentation of search results: the CLs technique", 2002 (the upper end).
    """
    counts, confidence, accuracy = _columns(diagram)
    replicates = check_replicates(replicates)
    tail = (1 - check_level(level)) / 2
    weights = counts / counts.sum()
    errors = confidence - accuracy
    # A bin with an observed error of 0 may still have a true error of the size of its noise.
    smooth = (counts * accuracy + 1) / (counts + 2)
    noise = np.sqrt(smooth * (1 - smooth) / counts)
    spread = np.hypot(errors, noise)
    observed_sign = np.where(errors < 0, -1.0, 1.0)
    # Within the noise the sign of the error may also be the opposite.
    other_sign = np.where(np.abs(errors) > 2 * noise, observed_sign, -observed_sign)
    observed = float(weights @ np.abs(errors))

    def true_accuracy(size: float, sign: np.ndarray) -> np.ndarray:
        result: np.ndarray = np.clip(
            confidence - size * sign * spread / (weights @ spread), 0.0, 1.0
        )
        return result

    def simulated_errors(size: float, sign: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(seed)
        target = (replicates, len(counts))
        correct_counts = random.binomial(counts, true_accuracy(size, sign), size=target)
        result: np.ndarray = np.abs(confidence - correct_counts / counts) @ weights
        return result

    def end(condition: Callable[[np.ndarray], bool], sign: np.ndarray) -> float:
        size = _bisect(
            lambda size: condition(simulated_errors(size, sign)),
            float((weights @ spread) / spread.min()),
        )
        return float(weights @ np.abs(confidence - true_accuracy(size, sign)))

    # Equal up to rounding counts as equal, in both tails.
    slack = 1e-12
    # An error smaller than that of calibrated models carries little information: without the
    # second factor (CLs) the upper end would be 0 as well. Where too few simulated errors are below
    # it to estimate a tail, the smallest error with an estimable tail replaces it.
    calibrated = simulated_errors(0.0, observed_sign)
    reference = max(observed, float(np.quantile(calibrated, min(1.0, 1 / (tail * replicates)))))
    below = float((calibrated <= reference + slack).mean())

    def reached(errors: np.ndarray) -> bool:
        return bool((errors >= observed - slack).mean() >= tail)

    def exceeded(errors: np.ndarray) -> bool:
        return bool((errors <= reference + slack).mean() < tail * below)

    high = max(end(exceeded, observed_sign), end(exceeded, other_sign))
    return min(end(reached, observed_sign), high), high


def bin_by_confidence(confidences: np.ndarray, bins: int) -> np.ndarray:
    """Bin index ``[n]`` of each confidence ``[n]``, from 0 without gaps.

    Args:
        confidences: ``[n]``.
        bins: Most bins.

    Raises:
        ValueError: ``bins`` is not a positive whole number.

    >>> bin_by_confidence(np.repeat([0.5, 0.6, 0.9], [5, 10, 15]), 3)[[0, 5, 15]].tolist()
    [0, 0, 1]
    """
    if bins != int(bins) or bins < 1:
        raise ValueError(f"bins must be a whole number >= 1, got {bins!r}")
    count = len(confidences)
    target = int(min(bins, max(1, count // _MIN_PER_BIN)))
    ordered = np.sort(confidences)
    starts = [0]
    smallest_bin = min(_MIN_PER_BIN, count)
    for number in range(1, target):
        # A bin starts at a new confidence: at or after the position of equal mass, or before it
        # where that is closer.
        position = round(number * count / target)
        value = ordered[position]
        before = int(np.searchsorted(ordered, value, side="left"))
        after = int(np.searchsorted(ordered, value, side="right"))
        for start in sorted((before, after), key=lambda start: abs(start - position)):
            if start - starts[-1] >= smallest_bin and count - start >= smallest_bin:
                starts.append(start)
                break
    edges = ordered[starts[1:]]
    return np.searchsorted(edges, confidences, side="right")


def _bisect(condition: Callable[[float], bool], largest: float) -> float:
    """Smallest size for which a condition holds, by bisection; ``largest`` where it never does."""
    if condition(0.0):
        return 0.0
    low, high = 0.0, largest
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if condition(middle) else (middle, high)
    return high


def _columns(diagram: Sequence[ReliabilityBin]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.array([each.count for each in diagram]),
        np.array([each.confidence for each in diagram]),
        np.array([each.accuracy for each in diagram]),
    )


def _check(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    found = as_probabilities(probabilities, "probabilities")
    return found, as_labels(labels, "labels", count=len(found), classes=found.shape[1])


def _nll(probabilities: np.ndarray, labels: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return float(np.mean(-np.log(probabilities[np.arange(len(labels)), labels])) + 0.0)


def _brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    of_label = probabilities[np.arange(len(labels)), labels]
    return float(((probabilities**2).sum(1) - 2 * of_label + 1).mean())
