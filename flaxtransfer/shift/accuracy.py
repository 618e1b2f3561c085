"""Estimates of accuracy without labels.

Estimates of an accuracy without labels, each with what it assumes; never one alone.

Accuracy under label shift: the recall of each class, weighted by its share of the target.

Average thresholded confidence: the share of a target that is surer than the source's errors.

Accuracy on a target without labels: several estimates, for none can be trusted alone.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.statistics import (
    checked_level,
    checked_replicates,
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


@dataclasses.dataclass(frozen=True)
class AccuracyEstimate:
    """One way to guess a target's accuracy.

    Args:
        name: of the method.
        value: between 0 and 1; None where the method has none.
        low: lower end of the bootstrap's interval, or of what is possible where `value` is None;
            None where nothing is known.
        high: upper end.
        assumes: what has to hold of the target.
        not_available: why there is no value; "" where there is one.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    assumes: str
    not_available: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.not_available):
            raise ValueError("an estimate has a value, or a reason why it has none")


@dataclasses.dataclass(frozen=True)
class AccuracyEstimates:
    """Several estimates of one accuracy, side by side: their spread is part of the answer.

    Args:
        source_accuracy: of the validation examples, which have labels.
        source_low: lower end of its Wilson interval.
        source_high: upper end.
        estimates: of the target's accuracy.
        counts: validation examples and target examples.
        level: of all intervals.
        notes: what a reader has to know.
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
        """Of the values."""
        return min(each.value for each in self.estimates if each.value is not None)

    @property
    def highest(self) -> float:
        """Of the values."""
        return max(each.value for each in self.estimates if each.value is not None)

    def __getitem__(self, name: str) -> AccuracyEstimate:
        for each in self.estimates:
            if each.name == name:
                return each
        names = ", ".join(repr(each.name) for each in self.estimates)
        raise KeyError(f"no estimate {name!r}; there are {names}")

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


def _interval(low: float | None, high: float | None) -> str:
    return " " * 16 if low is None or high is None else f"{low:.4f} to {high:.4f}"


RECALL_NAME = "prevalence-weighted recall"

_RECALL_ASSUMES = (
    "a class looks as it does at the source (label shift alone), and the prevalence is right"
)

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
        return AccuracyEstimate(RECALL_NAME, None, None, None, _RECALL_ASSUMES, reason)
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
        return AccuracyEstimate(RECALL_NAME, value, low, high, _RECALL_ASSUMES)
    named = ", ".join(str(k) for k in np.flatnonzero(unknown)[:10])
    reason = (
        f"class(es) {named} have no validation example, and so no recall, and are {share:.4f} of "
        f"the target: between {value:.4f} and {min(value + share, 1.0):.4f}, before sampling"
    )
    _, high = percentile_interval(drawn.sum(1), level)
    return AccuracyEstimate(RECALL_NAME, None, low, min(high, 1.0), _RECALL_ASSUMES, reason)


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


def negative_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Sum of p log p of each row `[n]` of probabilities `[n, K]`, in nats: 0 where it is sure.

    >>> negative_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(4).tolist()
    [0.0, -0.6931]
    """
    # Sorted, the sum has one rounding for every order of the classes, and ties stay ties.
    ordered = np.sort(probabilities, axis=1)
    logarithms = np.log(ordered, out=np.zeros_like(ordered), where=ordered > 0)
    return (ordered * logarithms).sum(1)


class ThresholdedConfidence:
    """The estimate for one score, for any weights of the examples.

    The threshold leaves as much of the source below it as there are errors, midway between two
    scores. Where several examples have the threshold's score, the share of them counts that makes
    the source's accuracy come out; a source that is its own target has it exactly.

    Args:
        source_scores: `[n]`, larger where the model is surer.
        right: bool `[n]`, whether it predicts the class.
        target_scores: `[m]`.

    >>> found = ThresholdedConfidence([0.5, 0.6, 0.8, 0.9], [False, True, True, True], [0.5, 0.7])
    >>> found.threshold(), found.estimate()
    ((0.55, 1.0), 0.5)

    References:
        S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging unlabeled data to
        predict out-of-distribution performance", 2022.
    """

    def __init__(
        self, source_scores: np.ndarray, right: np.ndarray, target_scores: np.ndarray
    ) -> None:
        self._order = np.argsort(source_scores, kind="stable")
        self._scores = np.asarray(source_scores)[self._order]
        self._wrong = ~np.asarray(right, bool)[self._order]
        self._target_order = np.argsort(target_scores, kind="stable")
        self._target = np.asarray(target_scores)[self._target_order]

    def threshold(self, weights: np.ndarray | None = None) -> tuple[float, float]:
        """The score, and the share that counts of examples that have exactly this score.

        Args:
            weights: `[n]`, whole numbers; 1 each if None.
        """
        scores = self._scores
        weight = np.ones(len(scores)) if weights is None else weights[self._order].astype(float)
        mass = np.cumsum(weight)
        errors, total = float(weight @ self._wrong), mass[-1]
        if errors == 0:
            place = scores[np.searchsorted(mass, 0, side="right")]
        elif errors == total:
            place = scores[np.searchsorted(mass, total, side="left")]
        else:
            below = scores[np.searchsorted(mass, errors, side="left")]
            place = (below + scores[np.searchsorted(mass, errors, side="right")]) / 2
        above, tied = _above_and_tied(scores, mass, place)
        return float(place), float((total - errors - above) / tied) if tied else 1.0

    def estimate(
        self, weights: np.ndarray | None = None, target_weights: np.ndarray | None = None
    ) -> float:
        """The target's accuracy.

        Args:
            weights: `[n]`, whole numbers; 1 each if None.
            target_weights: `[m]`, as well.
        """
        place, share = self.threshold(weights)
        count = len(self._target)
        mass = np.cumsum(
            np.ones(count) if target_weights is None else target_weights[self._target_order]
        )
        above, tied = _above_and_tied(self._target, mass, place)
        return float((above + share * tied) / mass[-1])


def _above_and_tied(ordered: np.ndarray, mass: np.ndarray, place: float) -> tuple[float, float]:
    """The mass above a score and at it, of sorted scores with cumulated masses."""
    padded = np.concatenate([[0.0], mass])
    first = padded[np.searchsorted(ordered, place, side="left")]
    last = padded[np.searchsorted(ordered, place, side="right")]
    return float(mass[-1] - last), float(last - first)


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

    >>> from flaxtransfer.shift.calibration import calibrate
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
