"""How often a model is right where it says how sure it is: the data of a reliability diagram."""

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_labels, as_probabilities
from flaxtransfer.shift.intervals import checked_level, wilson_interval

__all__ = ["ReliabilityBin", "bin_by_confidence", "reliability"]

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
