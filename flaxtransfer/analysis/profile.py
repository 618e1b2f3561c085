"""Linear probes per segment.

``probe_profile`` fits a linear probe on the features of every segment of a network. Use it to see
at which depth the features of a new data set are separable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flaxtransfer.features.checks import checked_examples, singleton_classes, standardization
from flaxtransfer.features.folds import cross_validate
from flaxtransfer.features.sweep import sweep_head

__all__ = ["Profile", "SegmentProbe", "probe_profile"]


Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class SegmentProbe:
    """Linear probe on one segment.

    Args:
        segment: name of the segment whose output is probed.
        features: channels, averaged over the image.
        accuracy: on held-out examples, at the best strength.
        standard_error: of the accuracy, binomial; segments closer than this are equal.
        loss: mean negative log-likelihood of the held-out examples, in nats. Ridge has no
            probabilities: its scores are used as logits at the best temperature.
        strength: the penalty with the smallest held-out loss.
    """

    segment: str
    features: int
    accuracy: float
    standard_error: float
    loss: float
    strength: float


@dataclass(frozen=True)
class Profile:
    """Linear probes of all segments, from the input to the output.

    Args:
        kind: of probe.
        examples: number of examples.
        majority: fraction of the largest class, the accuracy of a probe without information.
        probes: one per segment.
        seconds: time taken, without that for the features.
        notes: remarks on the data, in sentences.
    """

    kind: Kind
    examples: int
    majority: float
    probes: tuple[SegmentProbe, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> SegmentProbe:
        """The probe with the highest accuracy."""
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
    """Linear probe on the features of each segment, evaluated on held-out examples.

    Where the accuracy stops rising, later segments add nothing for these images; where it falls,
    they are specific to the pre-training task, and an earlier cut or deeper unfreezing is worth a
    trial.

    Args:
        features: by segment, ``[examples, channels]``; see ``segment_features``.
        labels: integers ``[examples]``. Classes without examples are ignored. The only example of a
            class counts as wrong with ridge and is never held out with logistic regression.
        kind: "ridge" is in closed form; "logistic" is slower. Both use the same stratified folds.
        classes: number of classes; default: the largest label plus 1.

    Raises:
        ValueError: no segment, another kind, one class, one example of every class, or features
            that are not finite or of another shape; the text names the segment.
        TypeError: labels that are not integers.

    References:
        G. Alain, Y. Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes",
        2016.

    >>> labels = np.arange(30) % 3
    >>> noise = np.random.default_rng(0).normal(size=(30, 4))
    >>> profile = probe_profile({"stem": noise, "pool": noise + 9 * np.eye(4)[labels]}, labels)
    >>> profile.best.segment, profile.best.accuracy
    ('pool', 1.0)
    """
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind must be 'ridge' or 'logistic', got {kind!r}")
    if not features:
        raise ValueError("features must have at least one segment, got none")
    began = time.perf_counter()
    probes, notes = [], []
    for name, values in features.items():
        try:
            matrix, label, number = checked_examples(values, labels, classes)
            present, label, counts = np.unique(label, return_inverse=True, return_counts=True)
            scaled = standardization(matrix)(matrix)
            if kind == "ridge":
                out = cross_validate(scaled, label)
                accuracy, loss, strength = out.accuracy, out.loss, out.strength
            else:
                swept = sweep_head(scaled, label, standardize=False)
                accuracy, strength = swept.accuracy, swept.strength
                loss = float(swept.losses[swept.best].mean())
        except ValueError as error:
            raise ValueError(f"the features of {name} cannot be probed: {error}") from error
        standard_error = math.sqrt(accuracy * (1 - accuracy) / len(label))
        probes.append(SegmentProbe(name, matrix.shape[1], accuracy, standard_error, loss, strength))
    if len(present) < number:
        notes.append(f"{number - len(present)} of {number} classes have no example.")
    if single := singleton_classes(label):
        how = "counts as wrong" if kind == "ridge" else "is never held out"
        notes.append(f"{len(single)} classes have one example, which {how}.")
    seconds, majority = time.perf_counter() - began, float(counts.max() / len(label))
    return Profile(kind, len(label), majority, tuple(probes), seconds, tuple(notes))
