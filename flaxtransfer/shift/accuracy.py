"""Estimates of accuracy without labels.

Several methods side by side, each with the assumption that it needs: average thresholded
confidence (ATC), difference of confidences, and prevalence-weighted recall, which is exact under
label shift. None of them is reliable alone; their spread is part of the answer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.statistics import (
    check_level,
    check_replicates,
    percentile_interval,
    wilson_interval,
)

__all__ = [
    "AccuracyEstimate",
    "AccuracyEstimates",
    "ThresholdedConfidence",
    "accuracy_without_labels",
    "class_recall",
    "negative_entropy",
    "prevalence_weighted_recall",
]

RECALL_NAME = "prevalence-weighted recall"

_RECALL_ASSUMES = (
    "the classes look as they do at the source (pure label shift), and the prevalence is correct"
)

_NEGLIGIBLE = 1e-9
"""Classes rarer than this are ignored."""

_ASSUMES = {
    "ATC, maximum confidence": "errors are as frequent as the largest probabilities below the "
    "threshold, as at the source",
    "ATC, negative entropy": "errors are as frequent as the negative entropies below the "
    "threshold, as at the source",
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
    """Estimates of a model's accuracy on a target without labels.

    The accuracy is that of the class with the largest calibrated probability, without prior
    correction. Every estimate rests on an assumption that no unlabeled data can check. Estimates
    that agree may be correct; where they differ, not all assumptions hold, and labels are needed.
    No method is correct for every shift.

    Args:
        source: The calibration with the validation examples that it was fitted on.
        target_probabilities: ``[m, K]``, from ``source.apply``.
        prevalence: Of the target, for the estimate that is exact under label shift; None leaves
            that estimate out.
        replicates: Bootstrap replicates of validation and target examples. The calibration is not
            refitted, so that the interval of the average confidence is too narrow.
        level: Confidence level of the intervals.
        seed: Of the bootstrap.

    Raises:
        ValueError: Invalid probabilities, different numbers of classes, no replicates, or a level
            outside of 0 and 1.

    >>> from flaxtransfer.shift.calibration import calibrate
    >>> logits = np.array([[2.0, 0.0]] * 8 + [[0.0, 2.0]] * 8)
    >>> source = calibrate(logits, [0] * 6 + [1] * 2 + [1] * 6 + [0] * 2, method="temperature")
    >>> found = accuracy_without_labels(source, source.apply(logits[:5]))
    >>> round(found.lowest, 4), round(found.highest, 4)
    (0.75, 0.75)

    References:
        S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging unlabeled data to
        predict out-of-distribution performance", 2022 (ATC).
        D. Guillory, V. Shankar, S. Ebrahimi, T. Darrell, L. Schmidt, "Predicting with confidence on
        unseen distributions", 2021 (difference of confidences).
    """
    target = as_probabilities(target_probabilities, "target probabilities")
    same_width(source.probabilities, "the source's probabilities", target, "target probabilities")
    replicates = check_replicates(replicates)
    correct = source.probabilities.argmax(1) == source.labels
    low, high = wilson_interval(int(correct.sum()), len(correct), check_level(level))
    estimates = _confidence_estimates(source, correct, target, replicates, level, seed)
    notes = _notes(source, correct)
    if prevalence is None:
        notes.append("without a prevalence there is no estimate for label shift")
    else:
        estimates.append(
            prevalence_weighted_recall(
                source, prevalence, replicates=replicates, level=level, seed=seed
            )
        )
        if prevalence.identifiable and np.isnan(prevalence.low + prevalence.high).any():
            notes.append(
                "the prevalence has no intervals: the recall's interval treats it as known"
            )
    return AccuracyEstimates(
        source_accuracy=float(correct.mean()),
        source_low=low,
        source_high=high,
        estimates=tuple(estimates),
        counts=(len(correct), len(target)),
        level=level,
        notes=(*notes, *_disagreement(estimates)),
    )


@dataclasses.dataclass(frozen=True)
class AccuracyEstimates:
    """Several estimates of one accuracy; their spread is part of the answer.

    Args:
        source_accuracy: Of the validation examples, which have labels.
        source_low: Lower end of its Wilson interval.
        source_high: Upper end of it.
        estimates: Estimates of the target's accuracy.
        counts: Numbers of validation examples and target examples.
        level: Confidence level of all intervals.
        notes: What the reader must know.
    """

    source_accuracy: float
    source_low: float
    source_high: float
    estimates: tuple[AccuracyEstimate, ...]
    counts: tuple[int, int]
    level: float
    notes: tuple[str, ...] = ()

    @property
    def lowest(self) -> float:
        """The smallest value."""
        return min(each.value for each in self.estimates if each.value is not None)

    @property
    def highest(self) -> float:
        """The largest value."""
        return max(each.value for each in self.estimates if each.value is not None)

    def __getitem__(self, name: str) -> AccuracyEstimate:
        for each in self.estimates:
            if each.name == name:
                return each
        names = ", ".join(repr(each.name) for each in self.estimates)
        raise KeyError(f"name must be one of {names}, got {name!r}")

    def __str__(self) -> str:
        count, size = self.counts
        width = max(len(each.name) for each in self.estimates)
        lines = [
            f"accuracy without labels, {size} target example(s); intervals of {self.level:.0%}",
            f"{'validation':{width}}  {self.source_accuracy:8.4f}  "
            f"{_interval(self.source_low, self.source_high)}  {count} example(s) with labels",
        ]
        for each in self.estimates:
            value = "       -" if each.value is None else f"{each.value:8.4f}"
            interval = _interval(each.low, each.high)
            lines.append(f"{each.name:{width}}  {value}  {interval}  if {each.assumes}")
            if each.not_available:
                lines.append(f"{'':{width}}  {each.not_available}")
        lines.append(f"{'spread':{width}}  {'':8}  {_interval(self.lowest, self.highest)}")
        return "\n".join([*lines, *self.notes])


@dataclasses.dataclass(frozen=True)
class AccuracyEstimate:
    """One estimate of a target's accuracy.

    Args:
        name: Name of the method.
        value: Between 0 and 1; None where the method gives none.
        low: Lower end of the bootstrap interval, or of the possible range where ``value`` is None;
            None where nothing is known.
        high: Upper end.
        assumes: What must hold for the target.
        not_available: Why there is no value; "" where there is one.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    assumes: str
    not_available: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.not_available):
            raise ValueError(
                "exactly one of value and not_available must be given, "
                f"got value={self.value!r} and not_available={self.not_available!r}"
            )


def prevalence_weighted_recall(
    source: Calibration,
    prevalence: Prevalence,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> AccuracyEstimate:
    """Prevalence-weighted recall: the accuracy under label shift.

    The sum over classes of prevalence times recall, which is exact under label shift. The interval
    resamples the validation examples, and draws prevalences from their intervals. Where a class of
    the target has no validation examples its recall is unknown: there is no value then, and the
    interval gives the possible range.

    Args:
        source: The calibration with its validation examples.
        prevalence: Of the target.
        replicates: Bootstrap replicates.
        level: Confidence level.
        seed: Of the bootstrap.

    Raises:
        ValueError: Different numbers of classes, no replicates, or a level outside of 0 and 1.

    References:
        Z. Lipton, Y. Wang, A. Smola, "Detecting and correcting for label shift with black box
        predictors", 2018.
    """
    check_level(level)
    replicates = check_replicates(replicates)
    if prevalence.estimate.shape != (source.classes,):
        raise ValueError(
            f"prevalence must have the source's {source.classes} classes, got "
            f"{len(prevalence.estimate)}"
        )
    if not prevalence.identifiable:
        reason = f"the prevalence is not identifiable: {prevalence.reason}"
        return AccuracyEstimate(RECALL_NAME, None, None, None, _RECALL_ASSUMES, reason)
    recall = class_recall(source)
    unknown = np.isnan(recall)
    recall[unknown] = 0
    random = np.random.default_rng(seed)
    count = len(source.labels)
    correct = _correct(source)
    drawn = np.empty((replicates, 2))
    for row in drawn:
        weights = np.bincount(random.integers(count, size=count), minlength=count)
        proportions = _resampled_prevalence(prevalence, random)
        row[:] = proportions @ _recall(source, correct, weights, recall), proportions[unknown].sum()
    value = float(prevalence.estimate @ recall)
    low, high = percentile_interval(drawn[:, 0], level)
    fraction = float(prevalence.estimate[unknown].sum())
    if fraction <= _NEGLIGIBLE:
        return AccuracyEstimate(RECALL_NAME, value, low, high, _RECALL_ASSUMES)
    named = ", ".join(str(k) for k in np.flatnonzero(unknown)[:10])
    reason = (
        f"class(es) {named} have no validation example, hence no recall, and are {fraction:.4f} of "
        f"the target: between {value:.4f} and {min(value + fraction, 1.0):.4f}, before sampling"
    )
    _, high = percentile_interval(drawn.sum(1), level)
    return AccuracyEstimate(RECALL_NAME, None, low, min(high, 1.0), _RECALL_ASSUMES, reason)


def class_recall(source: Calibration) -> np.ndarray:
    """Recall of each class on the validation examples, ``[K]``; NaN for classes without examples.

    >>> predicted, labels = np.eye(2)[[0, 0, 1]], np.zeros(3, int)
    >>> source = Calibration("none", np.ones(2), np.zeros(2), predicted, labels)
    >>> class_recall(source).round(4).tolist()
    [0.6667, nan]
    """
    return _recall(source, _correct(source), None, np.full(source.classes, np.nan))


class ThresholdedConfidence:
    """Average thresholded confidence (ATC) for one score, with any weights of the examples.

    As much of the source lies below the threshold as there are errors; it is midway between two
    scores. Where several examples have exactly that score, the fraction of them counts that
    reproduces the source's accuracy, so that a target identical to the source gets exactly that
    accuracy.

    Args:
        source_scores: ``[n]``, larger where the model is more confident.
        correct: Boolean ``[n]``, whether the prediction is correct.
        target_scores: ``[m]``.

    >>> found = ThresholdedConfidence([0.5, 0.6, 0.8, 0.9], [False, True, True, True], [0.5, 0.7])
    >>> found.threshold(), found.estimate()
    ((0.55, 1.0), 0.5)

    References:
        S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging unlabeled data to
        predict out-of-distribution performance", 2022.
    """

    def __init__(
        self, source_scores: np.ndarray, correct: np.ndarray, target_scores: np.ndarray
    ) -> None:
        self._order = np.argsort(source_scores, kind="stable")
        self._scores = np.asarray(source_scores)[self._order]
        self._wrong = ~np.asarray(correct, bool)[self._order]
        self._target_order = np.argsort(target_scores, kind="stable")
        self._target = np.asarray(target_scores)[self._target_order]

    def threshold(self, weights: np.ndarray | None = None) -> tuple[float, float]:
        """The threshold, and the fraction counted of examples that have exactly this score.

        Args:
            weights: ``[n]``, whole numbers; 1 each if None.
        """
        scores = self._scores
        weight = np.ones(len(scores)) if weights is None else weights[self._order].astype(float)
        mass = np.cumsum(weight)
        errors, total = float(weight @ self._wrong), mass[-1]
        if errors == 0:
            threshold = scores[np.searchsorted(mass, 0, side="right")]
        elif errors == total:
            threshold = scores[np.searchsorted(mass, total, side="left")]
        else:
            below = scores[np.searchsorted(mass, errors, side="left")]
            threshold = (below + scores[np.searchsorted(mass, errors, side="right")]) / 2
        above, tied = _above_and_tied(scores, mass, threshold)
        return float(threshold), float((total - errors - above) / tied) if tied else 1.0

    def estimate(
        self, weights: np.ndarray | None = None, target_weights: np.ndarray | None = None
    ) -> float:
        """The target's estimated accuracy.

        Args:
            weights: ``[n]``, whole numbers; 1 each if None.
            target_weights: ``[m]``, likewise.
        """
        threshold, fraction = self.threshold(weights)
        count = len(self._target)
        mass = np.cumsum(
            np.ones(count) if target_weights is None else target_weights[self._target_order]
        )
        above, tied = _above_and_tied(self._target, mass, threshold)
        return float((above + fraction * tied) / mass[-1])


def negative_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Negative entropy of each row, ``[n]``, in nats: the sum of p log p, 0 for certain rows.

    >>> negative_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4).tolist()
    [0.0, -0.6931]
    """
    # Sorted, so that rounding does not depend on the order of the classes and ties stay ties.
    ordered = np.sort(probabilities, axis=1)
    logarithms = np.log(ordered, out=np.zeros_like(ordered), where=ordered > 0)
    result: np.ndarray = (ordered * logarithms).sum(1)
    return result


def _interval(low: float | None, high: float | None) -> str:
    return " " * 16 if low is None or high is None else f"{low:.4f} to {high:.4f}"


def _correct(source: Calibration) -> np.ndarray:
    result: np.ndarray = (source.probabilities.argmax(1) == source.labels).astype(float)
    return result


def _recall(
    source: Calibration, correct: np.ndarray, weights: np.ndarray | None, fallback: np.ndarray
) -> np.ndarray:
    """Recall ``[K]``, with ``fallback`` for classes without weight."""
    correct_weights = correct if weights is None else weights * correct
    examples = np.bincount(source.labels, weights, source.classes)
    correct = np.bincount(source.labels, correct_weights, source.classes)
    result: np.ndarray = np.divide(correct, examples, out=fallback.copy(), where=examples > 0)
    return result


def _resampled_prevalence(prevalence: Prevalence, random: np.random.Generator) -> np.ndarray:
    """Proportions ``[K]`` as another sample might give them, from the widths of the intervals."""
    deviation = (prevalence.high - prevalence.low) / (2 * norm.isf((1 - prevalence.level) / 2))
    deviation = np.nan_to_num(deviation, nan=0.0)
    errors = deviation * random.standard_normal(len(deviation))
    # Proportions sum to 1, so the errors are centered. The factor keeps the variance of each.
    classes = len(errors)
    errors = (errors - errors.mean()) * np.sqrt(classes / (classes - 1))
    proportions = np.maximum(prevalence.estimate + errors, 0)
    result: np.ndarray = proportions / proportions.sum()
    return result


def _above_and_tied(ordered: np.ndarray, mass: np.ndarray, threshold: float) -> tuple[float, float]:
    """The mass above a score and at it, from sorted scores with cumulative masses."""
    padded = np.concatenate([[0.0], mass])
    first = padded[np.searchsorted(ordered, threshold, side="left")]
    last = padded[np.searchsorted(ordered, threshold, side="right")]
    return float(mass[-1] - last), float(last - first)


def _confidence_estimates(
    source: Calibration,
    correct: np.ndarray,
    target: np.ndarray,
    replicates: int,
    level: float,
    seed: int,
) -> list[AccuracyEstimate]:
    """The estimates that need the probabilities only."""
    confidence, target_confidence = source.probabilities.max(1), target.max(1)
    by_confidence = ThresholdedConfidence(confidence, correct, target_confidence)
    by_entropy = ThresholdedConfidence(
        negative_entropy(source.probabilities), correct, negative_entropy(target)
    )
    excess = correct - confidence

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
    count, size = len(correct), len(target)
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


def _notes(source: Calibration, correct: np.ndarray) -> list[str]:
    notes = []
    if source.method == "none":
        notes.append(
            "the probabilities are not calibrated, and all estimates except the recall use them"
        )
    if correct.all():
        notes.append(
            "every validation example is predicted correctly: ATC counts as wrong what is less "
            "confident than all of them, and does not know where errors begin"
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
        f"{lower[2]!r} and {upper[2]!r} differ by more than chance: their assumptions cannot both "
        "hold, and labels are needed to decide"
    ]
