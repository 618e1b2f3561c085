"""Learning curves: how the error of a head falls with the number of labels, and how far it may.

Two numbers are stable enough to be reported: the error at the labels at hand, and what half of them
would cost. The exponent is fixed, for three parameters fitted to as many points say nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize

from flaxtransfer.features.checks import checked_examples
from flaxtransfer.features.folds import cross_validate, stratified_folds

__all__ = ["LearningCurve", "learning_curve"]

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
