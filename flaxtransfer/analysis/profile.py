"""Probes on the features of a network: by depth, and by number of labels.

``probe_profile`` fits a linear probe on the features of every segment of a network: at which depth
the features of a new data set are separable. ``learning_curve`` says how the error of a probe falls
with the number of labels, and how far it may. Two of its numbers are stable enough to be reported:
the error at the labels at hand, and what half of them would cost. The exponent is fixed, for three
parameters fitted to as many points say nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.optimize

from flaxtransfer.features.inputs import (
    checked_examples,
    singleton_classes,
    standardization,
    stratified_folds,
)
from flaxtransfer.features.ridge import cross_validate
from flaxtransfer.features.sweep import sweep_head

__all__ = [
    "LearningCurve",
    "Profile",
    "SegmentProbe",
    "learning_curve",
    "probe_profile",
]


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


FARTHEST = 4
"""Beyond this many times the labels at hand nothing is said."""

_PARTS = (8, 4, 2)
"""Into how many parts of equal size the labels are divided."""

_LEAST = 3
"""Examples of each class in a part, of which some are held out."""

_MISFIT = 0.015
"""Standard error of the law itself for each doubling beyond the labels at hand: that of 63 curves
of heads, fitted at a sixteenth, an eighth and a fourth, and judged at the whole."""


@dataclass(frozen=True)
class LearningCurve:
    """Held-out error of a head by number of labels, with the law ``floor + slope / sqrt(labels)``.

    Args:
        sizes: numbers of labels, ascending; the last is what there is.
        errors: mean held-out error at each size, over parts of the labels.
        deviations: standard deviation of the error between the parts; 0 for the whole.
        floor: error with labels without end, 0 or more.
        slope: how much of the error goes with the labels, 0 or more.
        covariance: of floor and slope, ``[[..], [..]]``.

    >>> none = (0.0, 0.0)
    >>> curve = LearningCurve((100, 400), (0.3, 0.2), none, 0.1, 2.0, (none, none))
    >>> curve.error_at(1600)[0], curve.labels_for(0.02)
    (0.15000000000000002, 225)
    """

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    deviations: tuple[float, ...]
    floor: float
    slope: float
    covariance: tuple[tuple[float, float], tuple[float, float]]

    @property
    def labels(self) -> int:
        """The labels at hand."""
        return self.sizes[-1]

    @property
    def error(self) -> float:
        """The error with the labels at hand, by the law."""
        return self.floor + self.slope / math.sqrt(self.labels)

    @property
    def cost_of_half(self) -> float:
        """Error that would be added if there were half as many labels."""
        return self.slope * (math.sqrt(2) - 1) / math.sqrt(self.labels)

    @property
    def fits(self) -> bool:
        """Whether the law describes the curve: no point is off by more than 3 points of accuracy,
        or two standard deviations between parts.
        """
        law = [self.floor + self.slope / math.sqrt(n) for n in self.sizes]
        bounds = [max(0.03, 2 * deviation) for deviation in self.deviations]
        pairs = zip(law, self.errors, bounds, strict=True)
        return all(abs(here - error) <= bound for here, error, bound in pairs)

    def error_at(self, labels: int) -> tuple[float, float, float]:
        """The error expected with so many labels, and an interval of 90 %.

        Raises:
            ValueError: more than four times the labels at hand, or none.
        """
        if not 0 < labels <= FARTHEST * self.labels:
            raise ValueError(
                f"labels must be from 1 to {FARTHEST} times the {self.labels} at hand, got {labels}"
            )
        direction = np.array([1, 1 / math.sqrt(labels)])
        variance = float(direction @ np.array(self.covariance) @ direction)
        doublings = abs(math.log2(labels / self.labels))
        error = self.floor + self.slope / math.sqrt(labels)
        half = 1.645 * math.sqrt(max(variance, 0.0) + (_MISFIT * doublings) ** 2)
        return error, max(error - half, 0.0), min(error + half, 1.0)

    def labels_for(self, gain: float) -> int | None:
        """How many more labels lower the error by ``gain``; None beyond four times those at hand.

        Raises:
            ValueError: a gain that is not above 0.
        """
        if not gain > 0:
            raise ValueError(f"gain must be > 0, got {gain}")
        rest = self.slope / math.sqrt(self.labels) - gain
        if rest <= 0 or (self.slope / rest) ** 2 > FARTHEST * self.labels:
            return None
        return math.ceil(round((self.slope / rest) ** 2, 6)) - self.labels

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "sizes": list(self.sizes),
            "errors": list(self.errors),
            "deviations": list(self.deviations),
            "floor": self.floor,
            "slope": self.slope,
            "cost_of_half": self.cost_of_half,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        lines = [f"{'labels':>8} {'error':>14}"]
        for size, error, deviation in zip(self.sizes, self.errors, self.deviations, strict=True):
            spread = f" ± {100 * deviation:.1f}" if deviation else ""
            lines.append(f"{size:>8} {100 * error:.1f}{spread} %".rstrip())
        if not self.fits:
            return "\n".join([*lines, "no law fits: nothing is said about more labels"])
        for times in (2, FARTHEST):
            error, low, high = self.error_at(times * self.labels)
            text = f"{100 * error:.1f} ({100 * low:.1f} .. {100 * high:.1f}) %"
            lines.append(f"{times * self.labels:>8} {text}, expected")
        lines.append(f"half the labels would cost {100 * self.cost_of_half:.1f} points")
        return "\n".join(lines)


def learning_curve(
    features: Any, labels: Any, *, classes: int | None = None, seed: int = 0
) -> LearningCurve:
    """Learning curve of a ridge head on features, from the labels at hand alone.

    The labels are divided into eight, four and two parts, stratified, and each part is judged by
    its own folds; so all labels take part in each size.

    Args:
        features: ``[examples, features]``, finite, standardized.
        labels: integers ``[examples]``, 0 .. classes - 1.
        classes: number of classes; default: the largest label plus 1.
        seed: of the parts and folds.

    Raises:
        ValueError: fewer than 6 examples of a class, with which there is only one size; and as
            ``cross_validate``.
        TypeError: labels that are not integers.

    References:
        D. Hoiem, T. Gupta, Z. Li, M. Shlapentokh-Rothman, "Learning Curves for Analysis of Deep
        Networks", 2021 (a fixed exponent of one half, and which numbers are stable).
        R. Mahmood et al., "How Much More Data Do I Need? Estimating Requirements for Downstream
        Tasks", 2022 (why not to look far).

    >>> labels = np.arange(200) % 4
    >>> random = np.random.default_rng(0)
    >>> curve = learning_curve(random.normal(size=(200, 30)) + np.eye(30)[labels], labels)
    >>> curve.sizes, curve.errors[0] > curve.errors[-1]
    ((25, 50, 100, 200), True)
    """
    matrix, label, number = checked_examples(features, labels, classes)
    smallest = int(np.bincount(label, minlength=number).min())
    if smallest < 2 * _LEAST:
        raise ValueError(
            f"a learning curve needs at least {2 * _LEAST} examples of each class, got {smallest}"
        )
    sizes, errors, deviations = [], [], []
    for parts in (*(parts for parts in _PARTS if smallest >= _LEAST * parts), 1):
        part_of = stratified_folds(label, parts, seed) if parts > 1 else np.zeros(len(label), int)
        found = [
            1 - cross_validate(matrix[chosen], label[chosen], classes=number, seed=seed).accuracy
            for chosen in (part_of == part for part in range(parts))
        ]
        sizes.append(round(len(label) / parts))
        errors.append(float(np.mean(found)))
        deviations.append(float(np.std(found, ddof=1)) if parts > 1 else 0.0)
    floor, slope, covariance = _law(np.array(sizes), np.array(errors), len(label))
    return LearningCurve(tuple(sizes), tuple(errors), tuple(deviations), floor, slope, covariance)


def _law(
    sizes: np.ndarray, errors: np.ndarray, labels: int
) -> tuple[float, float, tuple[tuple[float, float], tuple[float, float]]]:
    """Floor and slope by weighted least squares, both 0 or more, and their covariance.

    The mean error of all parts of one size is of all labels, whatever the size.
    """
    error = np.clip(errors, 0.5 / labels, 1 - 0.5 / labels)
    weights = np.sqrt(labels / (error * (1 - error)))
    design = np.stack([np.ones(len(sizes)), 1 / np.sqrt(sizes)], axis=1) * weights[:, None]
    (floor, slope), _ = scipy.optimize.nnls(design, errors * weights)
    (a, b), (c, d) = np.linalg.inv(design.T @ design)
    return float(floor), float(slope), ((float(a), float(b)), (float(c), float(d)))
