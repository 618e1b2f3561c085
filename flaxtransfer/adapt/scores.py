"""Scores of a network on unlabeled images: confidence, estimated accuracy, prevalence.

How a network stands on unlabeled images: confidence, estimated accuracy, prevalence.

No labels, no certainty: each of these is an indication and rests on the source's calibration, which
need not hold in another domain. They are good at telling which of two networks to prefer.

What a network makes of images, as the arrays that the room of shifts takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from flaxtransfer.data.loader import Batch
from flaxtransfer.models.model import Model
from flaxtransfer.shift.accuracy import ThresholdedConfidence
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.training.evaluation import predict
from flaxtransfer.types import Variables
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "CLEAR",
    "FAR",
    "Estimate",
    "ModelOutputs",
    "UnlabeledScores",
    "contradiction",
    "exceeds_shift",
    "is_weak",
    "model_outputs",
    "one_class",
    "support",
    "unlabeled_scores",
]


Estimate = Callable[[np.ndarray, Calibration], Prevalence]
"""``(calibrated target probabilities, source) -> prevalence``."""

FAR = 0.25
"""Total variation between class shares of target and source above which BatchNorm statistics of the
target say more about its classes than about its images."""

CLEAR = 2.0
"""Standard deviations by which an estimated accuracy has to differ to count."""

_WEAK = 0.75
"""Share of its accuracy at the source below which a network's predictions say too little."""

_ONE_CLASS = 1.5
"""exp(entropy) of two classes of which one is nearly absent: 0.86 to 0.14."""


@dataclass(frozen=True, eq=False)
class UnlabeledScores:
    """What one network says about the target's images.

    Args:
      probabilities: float64 [images, classes], by the source's calibration.
      confident: bool [images], whether the largest probability reaches the threshold below which
        as large a share of the validation examples lies as are wrong among them.
      prevalence: estimated from `probabilities`.
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
        """Average thresholded confidence, an estimate of the accuracy (Garg et al.)."""
        return float(self.confident.mean())

    def __str__(self) -> str:
        return (
            f"mean confidence {self.confidence:.3f}, estimated accuracy {100 * self.accuracy:.1f} "
            f"%, {self.prevalence.effective_classes:.1f} effective classes"
        )


def unlabeled_scores(
    logits: np.ndarray, source: Calibration, estimate: Estimate | None = None
) -> UnlabeledScores:
    """What can be told of a network by its logits on the target.

    Args:
      logits: ``[images, classes]``.
      source: calibration of the source's network, with its validation.
      estimate: of the prevalence; by default maximum likelihood.

    References:
      S. Garg, S. Balakrishnan, Z. Lipton, B. Neyshabur, H. Sedghi, "Leveraging Unlabeled Data to
      Predict Out-of-Distribution Performance", 2022 (average thresholded confidence).
    """
    probabilities = source.apply(logits)
    estimate = estimate or _maximum_likelihood
    scores, right = source.probabilities.max(1), source.probabilities.argmax(1) == source.labels
    threshold, _ = ThresholdedConfidence(scores, right, scores).threshold()
    confident = probabilities.max(axis=1) >= threshold
    return UnlabeledScores(probabilities, confident, estimate(probabilities, source))


def support(before: UnlabeledScores, after: UnlabeledScores) -> float:
    """How many standard deviations the estimated accuracy rose by; negative where it fell.

    The same images are compared twice, so that only those count which crossed the threshold: among
    n of them the difference of rises and falls has a deviation of sqrt(n) where nothing changed.

    References:
      Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
      percentages", 1947.
    """
    rose = int((after.confident & ~before.confident).sum())
    fell = int((before.confident & ~after.confident).sum())
    return (rose - fell) / np.sqrt(rose + fell) if rose + fell else 0.0


def is_weak(after: UnlabeledScores, source: Calibration) -> str:
    """Why a network's predictions are no ground to stand on; "" where they are."""
    known = float((source.probabilities.argmax(axis=1) == source.labels).mean())
    if after.accuracy >= _WEAK * known:
        return ""
    return (
        f"by its confidence the network is right about {100 * after.accuracy:.0f} % of the target, "
        f"against {100 * known:.0f} % at the source"
    )


def contradiction(before: UnlabeledScores, after: UnlabeledScores, source: Calibration) -> str:
    """Why it cannot be told whether classes or images have changed; "" where it can.

    After adaptation classes look balanced, whatever they are, and a network that meets images of
    another kind often sees one class in all of them. Where the two contradict each other, the
    adapted one is believed if it is clearly surer, and nearly as sure as at the source.
    """
    one, other = before.prevalence.estimate, after.prevalence.estimate
    apart = float(np.abs(one - other).sum() / 2)
    change = support(before, after)
    if apart <= FAR or change < -CLEAR or (change > CLEAR and not is_weak(after, source)):
        return ""
    return (
        f"the networks before and after are {apart:.2f} apart in total variation about the class "
        "shares, and the adapted one is not well supported: whether the classes have changed or "
        "the images cannot be told"
    )


def exceeds_shift(prevalence: Prevalence) -> str:
    """Why class shares are too far from the source's for plain statistics; "" where they are not.

    A target of few images is far by its draw alone, and its statistics suffer as much from that.
    """
    if not prevalence.identifiable or prevalence.total_variation <= FAR:
        return ""
    return (
        f"the target's class shares are {prevalence.total_variation:.2f} from the source's in total"
        f" variation (more than {FAR}), with {prevalence.effective_classes:.1f} effective classes"
    )


def one_class(prevalence: Prevalence) -> str:
    """Why no statistics of a balanced target exist: it has one class; "" where it has more."""
    if not prevalence.identifiable or prevalence.effective_classes >= _ONE_CLASS:
        return ""
    top = int(prevalence.estimate.argmax())
    return (
        f"class {top} seems to make up {100 * prevalence.estimate[top]:.0f} % of the target: "
        "statistics of one class say nothing about the others"
    )


def _maximum_likelihood(probabilities: np.ndarray, source: Calibration) -> Prevalence:
    from flaxtransfer.shift.prevalence import estimate_prevalence

    return estimate_prevalence(probabilities, source, interval=None)


@dataclass(frozen=True, eq=False)
class ModelOutputs:
    """Logits and features of the same examples, in their order.

    Args:
      logits: float32 [examples, classes].
      features: float32 [examples, channels], what the head sees.
      labels: int [examples]; not to be looked at where nobody said them.
    """

    logits: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def model_outputs(
    model: Model, variables: Variables, batches: Iterable[Batch], preprocessing: Preprocessing
) -> ModelOutputs:
    """Runs the network once over the batches, with running statistics.

    Raises:
      ValueError: no example at all.
    """
    found = predict(model, variables, batches, preprocessing, features=True)
    return ModelOutputs(found.logits, np.asarray(found.features), found.labels)
