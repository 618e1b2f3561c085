"""Scores of a network on unlabeled images: confidence, estimated accuracy, prevalence.

Use them to choose between two networks, and to refuse an adaptation. Without labels there is no
certainty: all scores rest on the calibration on the source, which need not hold in another domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch
from flaxtransfer.shift.accuracy import ThresholdedConfidence
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.task import for_classes
from flaxtransfer.training.evaluation import predict

__all__ = [
    "MAX_SHIFT",
    "SIGNIFICANT",
    "Estimate",
    "ModelOutputs",
    "UnlabeledScores",
    "accuracy_change_z",
    "conflicting_class_shares",
    "exceeds_shift",
    "model_outputs",
    "single_class",
    "unlabeled_scores",
    "unreliable_predictions",
]


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """Logits and features of the same examples, in their order.

    Args:
        logits: float32 ``[examples, classes]``.
        features: float32 ``[examples, channels]``, the input of the head.
        labels: int ``[examples]``; meaningless for unlabeled images.
    """

    logits: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def model_outputs(network: Classifier, batches: Iterable[Batch]) -> ModelOutputs:
    """Logits and features of a network, from one pass with running statistics.

    Use it to get the arrays that ``ft.shift`` takes.

    Args:
        network: with its weights and preprocessing.
        batches: ``image``, ``label`` and, where there is padding, ``weight``.

    Raises:
        ValueError: no examples.
    """
    for_classes(network.task, "a comparison of class probabilities")
    found = predict(network, batches, features=True)
    return ModelOutputs(found.logits, np.asarray(found.features), found.labels)


Estimate = Callable[[np.ndarray, Calibration], Prevalence]
"""``(calibrated target probabilities, source) -> prevalence``."""

MAX_SHIFT = 0.25
"""Total variation between the class shares of target and source above which BatchNorm statistics of
the target reflect its classes more than its images."""

SIGNIFICANT = 2.0
"""Standard deviations by which an estimated accuracy must differ to count as a change."""

_MIN_RELATIVE_ACCURACY = 0.75
"""Predictions are unreliable below this fraction of the accuracy on the source."""

_MIN_EFFECTIVE_CLASSES = 1.5
"""Effective classes, exp(entropy), of two classes of which one is nearly absent: 0.86 to 0.14."""


@dataclass(frozen=True, eq=False)
class UnlabeledScores:
    """Scores of one network on unlabeled target images.

    Args:
        probabilities: float64 ``[images, classes]``, calibrated on the source.
        confident: bool ``[images]``, whether the largest probability reaches the threshold; the
            fraction of validation examples below the threshold is their error rate.
        prevalence: estimated from ``probabilities``.
    """

    probabilities: np.ndarray
    confident: np.ndarray
    prevalence: Prevalence

    @property
    def confidence(self) -> float:
        """Mean of the largest probabilities."""
        return float(self.probabilities.max(axis=1).mean())

    @property
    def accuracy(self) -> float:
        """Estimated accuracy: average thresholded confidence (Garg et al.)."""
        return float(self.confident.mean())

    def __str__(self) -> str:
        return (
            f"mean confidence {self.confidence:.3f}, estimated accuracy {100 * self.accuracy:.1f} "
            f"%, {self.prevalence.effective_classes:.1f} effective classes"
        )


def unlabeled_scores(
    logits: np.ndarray, source: Calibration, estimate: Estimate | None = None
) -> UnlabeledScores:
    """Scores a network by its logits on unlabeled target images.

    Args:
        logits: ``[images, classes]``.
        source: calibration of the source network on its validation examples.
        estimate: estimator of the prevalence; default: maximum likelihood.

    References:
        S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging Unlabeled Data to
        Predict Out-of-Distribution Performance", 2022 (average thresholded confidence).
    """
    probabilities = source.apply(logits)
    estimate = estimate or _maximum_likelihood
    scores, correct = source.probabilities.max(1), source.probabilities.argmax(1) == source.labels
    threshold, _ = ThresholdedConfidence(scores, correct, scores).threshold()
    confident = probabilities.max(axis=1) >= threshold
    return UnlabeledScores(probabilities, confident, estimate(probabilities, source))


def accuracy_change_z(before: UnlabeledScores, after: UnlabeledScores) -> float:
    """McNemar's z of the change of the estimated accuracy; negative where it fell.

    Both networks score the same images, so that only images that crossed the threshold count: if
    nothing changed, the difference of rises and falls among n of them has the standard deviation
    sqrt(n).

    References:
        Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
        percentages", 1947.
    """
    rose = int((after.confident & ~before.confident).sum())
    fell = int((before.confident & ~after.confident).sum())
    return (rose - fell) / np.sqrt(rose + fell) if rose + fell else 0.0


def unreliable_predictions(after: UnlabeledScores, source: Calibration) -> str:
    """Reason why the predictions of a network are unreliable; "" if they are not."""
    known = float((source.probabilities.argmax(axis=1) == source.labels).mean())
    if after.accuracy >= _MIN_RELATIVE_ACCURACY * known:
        return ""
    return (
        f"the estimated accuracy of the network is {100 * after.accuracy:.0f} % on the target, "
        f"against {100 * known:.0f} % on the source"
    )


def conflicting_class_shares(
    before: UnlabeledScores, after: UnlabeledScores, source: Calibration
) -> str:
    """Reason why label shift and covariate shift cannot be told apart; "" if they can.

    After adaptation classes always look balanced, and on images of another kind a network often
    predicts a single class. Where the two networks disagree about the class shares, the adapted
    one is trusted if it is significantly more confident, and nearly as accurate as on the source.
    """
    one, other = before.prevalence.estimate, after.prevalence.estimate
    apart = float(np.abs(one - other).sum() / 2)
    change = accuracy_change_z(before, after)
    if (
        apart <= MAX_SHIFT
        or change < -SIGNIFICANT
        or (change > SIGNIFICANT and not unreliable_predictions(after, source))
    ):
        return ""
    return (
        "the class shares estimated by the networks before and after differ by "
        f"{apart:.2f} in total variation, and the confidence of the adapted one does not decide: "
        "label shift and covariate shift cannot be told apart"
    )


def exceeds_shift(prevalence: Prevalence) -> str:
    """Reason why the class shares are too far from the source for plain statistics; "" if not.

    Few target images can be far from the source by chance; their statistics suffer just as much.
    """
    if not prevalence.identifiable or prevalence.total_variation <= MAX_SHIFT:
        return ""
    return (
        "the class shares of target and source differ by "
        f"{prevalence.total_variation:.2f} in total variation (more than {MAX_SHIFT}), with "
        f"{prevalence.effective_classes:.1f} effective classes"
    )


def single_class(prevalence: Prevalence) -> str:
    """Reason why the target has statistics of one class only; "" if it has more classes."""
    if not prevalence.identifiable or prevalence.effective_classes >= _MIN_EFFECTIVE_CLASSES:
        return ""
    top = int(prevalence.estimate.argmax())
    return (
        f"class {top} is estimated at {100 * prevalence.estimate[top]:.0f} % of the target: "
        "statistics of one class do not apply to the others"
    )


def _maximum_likelihood(probabilities: np.ndarray, source: Calibration) -> Prevalence:
    from flaxtransfer.shift.prevalence import estimate_prevalence

    return estimate_prevalence(probabilities, source, interval=None)
