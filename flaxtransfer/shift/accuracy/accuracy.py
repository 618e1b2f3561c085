"""Accuracy on a target without labels: several estimates, for none can be trusted alone."""

from typing import Any

import numpy as np

from flaxtransfer.shift.accuracy.accuracy_estimates import AccuracyEstimate, AccuracyEstimates
from flaxtransfer.shift.accuracy.recall import class_recall, prevalence_weighted_recall
from flaxtransfer.shift.accuracy.thresholded_confidence import (
    ThresholdedConfidence,
    negative_entropy,
)
from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.intervals import (
    checked_level,
    checked_replicates,
    percentile_interval,
    wilson_interval,
)
from flaxtransfer.shift.prevalence.prevalence import Prevalence

__all__ = ["accuracy_without_labels"]

_ASSUMES = {
    "ATC, maximum confidence": "errors are as many as the largest probabilities under the "
    "threshold, as at the source",
    "ATC, negative entropy": "errors are as many as the negative entropies under the threshold, as "
    "at the source",
    "difference of confidences": "confidence exceeds accuracy by as much as at the source",
    "average confidence": "probabilities are calibrated on the target too (for reference)",
}


def accuracy_without_labels(
    source: Calibration,
    target_probabilities: Any,
    prevalence: Prevalence | None = None,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> AccuracyEstimates:
    """What a model's accuracy on a target would be, under assumptions that no data can check.

    The accuracy is that of the class with the largest calibrated probability, without correction
    for a new prior. Estimates that agree may be right; where they do not, their assumptions cannot
    all hold, and labels are needed. Without labels no method is right for every shift.

    Args:
        source: the calibration, with the validation examples it was fitted on.
        target_probabilities: `[m, K]`, of `source.apply`.
        prevalence: of the target, for the estimate that is exact under label shift; None leaves
            it out.
        replicates: of the bootstrap: validation and target examples are drawn again, the
            calibration is kept, so that the interval of the average confidence is too narrow.
        level: of the intervals.
        seed: of the bootstrap.

    Raises:
        ValueError: probabilities are broken, numbers of classes differ, no replicates, a level
            outside of 0 and 1.

    >>> from flaxtransfer.shift.calibration.calibrating import calibrate
    >>> logits = np.array([[2.0, 0.0]] * 8 + [[0.0, 2.0]] * 8)
    >>> source = calibrate(logits, [0] * 6 + [1] * 2 + [1] * 6 + [0] * 2, method="temperature")
    >>> found = accuracy_without_labels(source, source.apply(logits[:5]))
    >>> round(found.lowest, 4), round(found.highest, 4)
    (0.75, 0.75)

    References:
        S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging unlabeled data to
        predict out-of-distribution performance", 2022: ATC.
        D. Guillory, V. Shankar, S. Ebrahimi, T. Darrell, L. Schmidt, "Predicting with confidence on
        unseen distributions", 2021: difference of confidences.
    """
    target = as_probabilities(target_probabilities, "target probabilities")
    same_width(source.probabilities, "the source's probabilities", target, "target probabilities")
    replicates = checked_replicates(replicates)
    right = source.probabilities.argmax(1) == source.labels
    low, high = wilson_interval(int(right.sum()), len(right), checked_level(level))
    estimates = _from_confidence(source, right, target, replicates, level, seed)
    notes = _notes(source, right)
    if prevalence is None:
        notes.append("without a prevalence, there is no estimate that is made for label shift")
    else:
        estimates.append(
            prevalence_weighted_recall(
                source, prevalence, replicates=replicates, level=level, seed=seed
            )
        )
        if prevalence.identifiable and np.isnan(prevalence.low + prevalence.high).any():
            notes.append("the prevalence has no intervals: that of its recall counts it as known")
    return AccuracyEstimates(
        source_accuracy=float(right.mean()),
        source_low=low,
        source_high=high,
        estimates=tuple(estimates),
        counts=(len(right), len(target)),
        level=level,
        notes=(*notes, *_disagreement(estimates)),
    )


def _from_confidence(
    source: Calibration,
    right: np.ndarray,
    target: np.ndarray,
    replicates: int,
    level: float,
    seed: int,
) -> list[AccuracyEstimate]:
    """What needs the probabilities alone."""
    confidence, target_confidence = source.probabilities.max(1), target.max(1)
    by_confidence = ThresholdedConfidence(confidence, right, target_confidence)
    by_entropy = ThresholdedConfidence(
        negative_entropy(source.probabilities), right, negative_entropy(target)
    )
    excess = right - confidence

    def values(weights: np.ndarray, target_weights: np.ndarray) -> tuple[float, ...]:
        average = float(target_weights @ target_confidence / target_weights.sum())
        difference = average + float(weights @ excess / weights.sum())
        return (
            by_confidence.estimate(weights, target_weights),
            by_entropy.estimate(weights, target_weights),
            min(max(difference, 0.0), 1.0),
            average,
        )

    random = np.random.default_rng(seed)
    count, size = len(right), len(target)
    drawn = np.array(
        [
            values(
                np.bincount(random.integers(count, size=count), minlength=count),
                np.bincount(random.integers(size, size=size), minlength=size),
            )
            for _ in range(replicates)
        ]
    )
    found = values(np.ones(count), np.ones(size))
    return [
        AccuracyEstimate(name, value, *percentile_interval(column, level), assumes)
        for (name, assumes), value, column in zip(_ASSUMES.items(), found, drawn.T, strict=True)
    ]


def _notes(source: Calibration, right: np.ndarray) -> list[str]:
    notes = []
    if source.method == "none":
        notes.append(
            "the probabilities are not calibrated, and all estimates but the recall rest on them"
        )
    if right.all():
        notes.append(
            "every validation example is right: ATC counts as wrong what is less sure than all of "
            "them, and does not know where errors begin"
        )
    absent = int(np.isnan(class_recall(source)).sum())
    if absent:
        notes.append(f"{absent} class(es) have no validation example")
    return notes


def _disagreement(estimates: list[AccuracyEstimate]) -> list[str]:
    intervals = [
        (each.low, each.high, each.name)
        for each in estimates
        if each.low is not None and each.high is not None and each.name != "average confidence"
    ]
    lower = min(intervals, key=lambda interval: interval[1])
    upper = max(intervals, key=lambda interval: interval[0])
    if lower[1] >= upper[0]:
        return []
    return [
        f"{lower[2]!r} and {upper[2]!r} differ by more than chance: their assumptions do not both "
        "hold, and labels would tell"
    ]
