"""What each depth of a network already knows: a linear probe on every segment's features."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.optimize
import scipy.special

from flaxtransfer.features.checks import examples, singles, standardization
from flaxtransfer.features.ridge import ridge_path
from flaxtransfer.features.sweep import rarest, sweep_head

__all__ = ["Profile", "SegmentProbe", "probe_profile"]


Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class SegmentProbe:
    """One depth.

    Args:
      segment: whose output is probed.
      features: channels, after averaging over the image.
      accuracy: on examples that were held out, at the best strength.
      standard_error: of the accuracy, binomial; segments closer than this are level.
      loss: mean negative log-likelihood of the examples that were held out, in nats. Ridge has no
        probabilities: its scores are taken as logits at the temperature that suits them best.
      strength: the best of those tried, by the loss on what was held out.
    """

    segment: str
    features: int
    accuracy: float
    standard_error: float
    loss: float
    strength: float


@dataclass(frozen=True)
class Profile:
    """A probe for each segment, from the input to the output.

    Args:
      kind: of probe.
      examples: how many there were.
      majority: share of the largest class: what a probe reaches that knows nothing.
      probes: one a segment.
      seconds: it took, features not included.
      notes: what a reader should know, in sentences.
    """

    kind: Kind
    examples: int
    majority: float
    probes: tuple[SegmentProbe, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> SegmentProbe:
        """The segment that knows most."""
        return max(self.probes, key=lambda probe: probe.accuracy)

    def __str__(self) -> str:
        lines = [f"{'segment':<8} {'features':>8} {'accuracy':>14} {'nats':>7} {'strength':>9}"]
        for probe in self.probes:
            accuracy = f"{100 * probe.accuracy:.1f} ± {100 * probe.standard_error:.1f} %"
            lines.append(
                f"{probe.segment:<8} {probe.features:>8} {accuracy:>14} {probe.loss:>7.3f} "
                f"{probe.strength:>9.3g}"
            )
        last = f"{self.kind} on {self.examples} examples, each held out once"
        last += f"; largest class {100 * self.majority:.1f} %; {self.seconds:.1f} s"
        return "\n".join([*lines, last, *self.notes])


def probe_profile(
    features: Mapping[str, Any],
    labels: Any,
    *,
    kind: Kind = "ridge",
    classes: int | None = None,
) -> Profile:
    """A probe on each segment's features, judged on examples that were held out.

    Where the curve stops rising the network has nothing more to say about these images; where it
    falls, later segments belong to the task of the pre-training, and an earlier cut or deeper
    unfreezing is worth a trial.

    Args:
      features: by segment, ``[examples, channels]``; see ``segment_features``.
      labels: integers ``[examples]``. Classes without examples have no say. The only example of a
        class counts as wrong with ridge and is never held out with logistic regression.
      kind: "ridge" leaves out one by one, in closed form; "logistic" uses folds, and is slower.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: no segment, another kind, one class, one example of every class, features that are
        not finite or of another shape; the segment named.
      TypeError: labels that are no integers.

    References:
      G. Alain, Y. Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes", 2016.

    >>> labels = np.arange(30) % 3
    >>> noise = np.random.default_rng(0).normal(size=(30, 4))
    >>> profile = probe_profile({"stem": noise, "layer1": noise + 9 * np.eye(4)[labels]}, labels)
    >>> profile.best.segment, profile.best.accuracy
    ('layer1', 1.0)
    """
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind is 'ridge' or 'logistic', not {kind!r}")
    if not features:
        raise ValueError("there is no segment to probe")
    began = time.perf_counter()
    probe = _ridge if kind == "ridge" else _logistic
    probes, notes = [], []
    for name, values in features.items():
        try:
            matrix, label, number = examples(values, labels, classes)
            rarest(label)
            present, label, counts = np.unique(label, return_inverse=True, return_counts=True)
            accuracy, loss, strength, said = probe(standardization(matrix)(matrix), label)
        except ValueError as error:
            raise ValueError(f"the features of {name} cannot be probed: {error}") from error
        notes += [note for note in said if note not in notes]
        spread = math.sqrt(accuracy * (1 - accuracy) / len(label))
        probes.append(SegmentProbe(name, matrix.shape[1], accuracy, spread, loss, strength))
    if len(present) < number:
        notes.append(f"{number - len(present)} of {number} classes have no example.")
    if single := singles(label):
        how = "counts as wrong" if kind == "ridge" else "is never held out"
        notes.append(f"{len(single)} classes have one example, which {how}.")
    seconds, majority = time.perf_counter() - began, float(counts.max() / len(label))
    return Profile(kind, len(label), majority, tuple(probes), seconds, tuple(notes))


def _ridge(matrix: np.ndarray, label: np.ndarray) -> tuple[float, float, float, list[str]]:
    """Accuracy, loss, strength, and what to tell."""
    path = ridge_path(matrix, label)

    def loss(power: float) -> float:
        log_probs = scipy.special.log_softmax(math.exp(power) * path.left_out, axis=1)
        return -float(log_probs[np.arange(len(label)), label].mean())

    # One number is fitted to all examples: of the scores' order it changes nothing.
    found = scipy.optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded")
    return path.accuracy, float(found.fun), path.strength, []


def _logistic(matrix: np.ndarray, label: np.ndarray) -> tuple[float, float, float, list[str]]:
    found = sweep_head(matrix, label, standardize=False)
    said = [note for note in found.notes if "folds" in note]
    return found.accuracy, float(found.losses[found.best].mean()), found.strength, said
