"""How far probabilities are from frequencies: proper scores, and calibration errors by bins."""

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration.binned_error import (
    debiased_errors,
    error_interval,
    expected_error,
)
from flaxtransfer.shift.calibration.reliability import ReliabilityBin, reliability
from flaxtransfer.shift.checks import as_labels, as_probabilities

__all__ = ["CalibrationError", "brier_score", "calibration_error", "negative_log_likelihood"]


@dataclasses.dataclass(frozen=True)
class CalibrationError:
    """How well probabilities of labelled examples are calibrated.

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
