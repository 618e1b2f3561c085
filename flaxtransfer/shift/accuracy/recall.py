"""Accuracy under label shift: the recall of each class, weighted by its share of the target."""

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.accuracy.accuracy_estimates import AccuracyEstimate
from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.intervals import checked_level, checked_replicates, percentile_interval
from flaxtransfer.shift.prevalence.prevalence import Prevalence

__all__ = ["class_recall", "prevalence_weighted_recall"]

NAME = "prevalence-weighted recall"

_ASSUMES = "a class looks as it does at the source (label shift alone), and the prevalence is right"

_NEGLIGIBLE = 1e-9
"""A class this rare has no part in an accuracy."""


def class_recall(source: Calibration) -> np.ndarray:
    """`[K]`, the share of each class's validation examples that is predicted right.

    NaN for classes without validation examples.

    >>> predicted, labels = np.eye(2)[[0, 0, 1]], np.zeros(3, int)
    >>> source = Calibration("none", np.ones(2), np.zeros(2), predicted, labels)
    >>> class_recall(source).round(4).tolist()
    [0.6667, nan]
    """
    return _recall(source, _right(source), None, np.full(source.classes, np.nan))


def prevalence_weighted_recall(
    source: Calibration,
    prevalence: Prevalence,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> AccuracyEstimate:
    """Sum over classes of prevalence times recall: the accuracy, exactly, under label shift.

    The intervals draw validation examples again, and prevalences from theirs. A class of the target
    without validation examples has no recall: there is no value then, and the interval says what is
    possible.

    Args:
        source: the calibration with its validation examples.
        prevalence: of the target.
        replicates: of the bootstrap.
        level: of the interval.
        seed: of the bootstrap.

    Raises:
        ValueError: numbers of classes differ, no replicates, a level outside of 0 and 1.

    References:
        Z. Lipton, Y. Wang, A. Smola, "Detecting and correcting for label shift with black box
        predictors", 2018.
    """
    checked_level(level)
    replicates = checked_replicates(replicates)
    if prevalence.estimate.shape != (source.classes,):
        raise ValueError(
            f"the prevalence is of {len(prevalence.estimate)} classes, and the source of "
            f"{source.classes}"
        )
    if not prevalence.identifiable:
        reason = f"the prevalence is not identifiable: {prevalence.reason}"
        return AccuracyEstimate(NAME, None, None, None, _ASSUMES, reason)
    recall = class_recall(source)
    unknown = np.isnan(recall)
    recall[unknown] = 0
    random = np.random.default_rng(seed)
    count = len(source.labels)
    right = _right(source)
    drawn = np.empty((replicates, 2))
    for row in drawn:
        weights = np.bincount(random.integers(count, size=count), minlength=count)
        shares = _drawn_again(prevalence, random)
        row[:] = shares @ _recall(source, right, weights, recall), shares[unknown].sum()
    value = float(prevalence.estimate @ recall)
    low, high = percentile_interval(drawn[:, 0], level)
    share = float(prevalence.estimate[unknown].sum())
    if share <= _NEGLIGIBLE:
        return AccuracyEstimate(NAME, value, low, high, _ASSUMES)
    named = ", ".join(str(k) for k in np.flatnonzero(unknown)[:10])
    reason = (
        f"class(es) {named} have no validation example, and so no recall, and are {share:.4f} of "
        f"the target: between {value:.4f} and {min(value + share, 1.0):.4f}, before sampling"
    )
    _, high = percentile_interval(drawn.sum(1), level)
    return AccuracyEstimate(NAME, None, low, min(high, 1.0), _ASSUMES, reason)


def _right(source: Calibration) -> np.ndarray:
    return (source.probabilities.argmax(1) == source.labels).astype(float)


def _recall(
    source: Calibration, right: np.ndarray, weights: np.ndarray | None, otherwise: np.ndarray
) -> np.ndarray:
    """`[K]`, with other numbers for classes that have no weight."""
    hits = right if weights is None else weights * right
    examples = np.bincount(source.labels, weights, source.classes)
    correct = np.bincount(source.labels, hits, source.classes)
    return np.divide(correct, examples, out=otherwise.copy(), where=examples > 0)


def _drawn_again(prevalence: Prevalence, random: np.random.Generator) -> np.ndarray:
    """Shares `[K]` as another sample might have had them, by the widths of the intervals."""
    deviation = (prevalence.high - prevalence.low) / (2 * norm.isf((1 - prevalence.level) / 2))
    deviation = np.nan_to_num(deviation, nan=0.0)
    errors = deviation * random.standard_normal(len(deviation))
    # Shares sum to 1: what one gains the others lose. The factor keeps each one's variance.
    classes = len(errors)
    errors = (errors - errors.mean()) * np.sqrt(classes / (classes - 1))
    shares = np.maximum(prevalence.estimate + errors, 0)
    return shares / shares.sum()
