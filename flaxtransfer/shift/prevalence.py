"""Estimators of prevalence under label shift, with their intervals.

``estimate_prevalence`` is the entry point to all of them: maximum likelihood and maximum a
posteriori on calibrated probabilities, and confusion-matrix methods that need no calibration.
Every method returns a ``Prevalence``, which records whether the data determine it at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift import confusion, uncertainty
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_labels, as_probability_rows, same_width
from flaxtransfer.shift.likelihood import maximize_likelihood, row_blocks
from flaxtransfer.shift.prevalence_intervals import score_intervals
from flaxtransfer.shift.uncertainty import (
    Sample,
    observed_information,
    precision,
    weakest_direction,
)

__all__ = [
    "METHODS",
    "Prevalence",
    "Resampling",
    "confusion_prevalence",
    "estimate_prevalence",
    "likelihood_prevalence",
]

_MAX_ROWS = 20
"""Most classes that are printed."""

_CERTAIN = 0.999
"""A row with a probability this high counts as labeled."""

METHODS = ("maximum_likelihood", "map", "bbse_soft", "bbse_hard", "rlls")
"""Methods of ``estimate_prevalence``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prevalence:
    """Estimated class proportions of a target population.

    Args:
        method: Name of the estimator, such as "maximum likelihood" or "BBSE, soft".
        estimate: ``[K]``, non-negative, sums to 1.
        low: ``[K]``, lower ends of the intervals; NaN where there are none.
        high: ``[K]``, upper ends.
        level: Confidence level of the intervals, such as 0.95.
        source: ``[K]``, the prior that the estimate is relative to: q / p are the importance
            weights.
        counts: Numbers of validation examples and target examples.
        gap: Optimality certificate of a likelihood: the most that the mean log-likelihood can still
            increase; None for other estimators.
        identifiable: Whether the target's data determine the estimate at all.
        reason: Why not; "" where they do.
        notes: What the reader must know: negative raw solutions, the most confused pair of classes,
            classes that were left out.
        likelihood_ratio: 2 m times the increase of the mean log-likelihood over that of the source
            prior; approximately chi-squared with K - 1 degrees of freedom without a shift.
        raw: ``[K]``, proportions by the inverse of the confusion matrix, negative ones included.
        condition: Condition number of the confusion matrix; infinite where it has no inverse.
        smallest_singular_value: Of the confusion matrix; errors are multiplied by its inverse.
        confused: The two classes that are hardest to tell apart.
    """

    method: str
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    source: np.ndarray
    counts: tuple[int, int]
    gap: float | None = None
    identifiable: bool = True
    reason: str = ""
    notes: tuple[str, ...] = ()
    likelihood_ratio: float | None = None
    raw: np.ndarray | None = None
    condition: float | None = None
    smallest_singular_value: float | None = None
    confused: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.identifiable == bool(self.reason):
            raise ValueError(
                "reason must be given exactly where identifiable is False, "
                f"got identifiable={self.identifiable} and reason={self.reason!r}"
            )

    @property
    def total_variation(self) -> float:
        """Total variation distance of the estimate from the source prior, between 0 and 1."""
        return float(np.abs(self.estimate - self.source).sum() / 2)

    @property
    def effective_classes(self) -> float:
        """exp(entropy): 1 where one class has all examples, K where all are equally common."""
        proportions = self.estimate[self.estimate > 0]
        return float(np.exp(-(proportions * np.log(proportions)).sum()))

    def __str__(self) -> str:
        validation, target = self.counts
        lines = [
            f"prevalence by {self.method}: {target} target and {validation} validation examples"
        ]
        if not self.identifiable:
            lines.append(f"NOT IDENTIFIABLE: {self.reason}")
        lines.append(f"{'class':>7} {'source':>8} {'target':>8}   {self.level:.0%} interval")
        largest = np.sort(np.argsort(-self.estimate, kind="stable")[:_MAX_ROWS])
        for k in largest.tolist():
            row = f"{k:>7} {self.source[k]:>8.4f} {self.estimate[k]:>8.4f}"
            if np.isfinite(self.low[k]):
                row += f"   {self.low[k]:.4f} to {self.high[k]:.4f}"
            lines.append(row)
        if len(self.estimate) > _MAX_ROWS:
            lines.append(f"    and {len(self.estimate) - _MAX_ROWS} smaller ones")
        gap = "" if self.gap is None else f", certificate {self.gap:.1e}"
        lines.append(f"total variation from the source {self.total_variation:.4f}{gap}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def estimate_prevalence(
    probabilities: Any,
    source: Calibration,
    *,
    method: str = "maximum_likelihood",
    labeled: tuple[Any, Any] | None = None,
    interval: str | None = "auto",
    level: float = 0.95,
    concentration: Any = 2.0,
    regularization: float = 0.01,
    tolerance: float = 1e-6,
    replicates: int = 500,
    seed: int = 0,
) -> Prevalence:
    """Prevalence of each class in a target without labels, under label shift.

    Use it where the classes look the same on source and target and only their proportions differ
    (label shift). Where the inputs have changed as well, the estimate is meaningless, and nothing
    in it shows that; see ``residual_test`` and ``correct_prior``.

    Args:
        probabilities: ``[m, K]``, of the target, calibrated: ``source.apply(logits)``. float32 and
            float64 are not copied.
        source: The calibration, with its validation examples.
        method: "maximum_likelihood", the most precise on calibrated probabilities; "map", the same
            with a Dirichlet prior; "bbse_soft" and "bbse_hard", from the confusion matrix, which
            need no calibration; "rlls", the same regularized toward the source prior.
        labeled: Row numbers and classes of a few target examples, drawn at random from the target
            ("maximum_likelihood" and "map" only).
        interval: "asymptotic" (likelihoods only), "bootstrap", or None; "auto" is the first that
            the method has. Both include the noise of target and validation; bootstrap percentiles
            are too short near a proportion of 0.
        level: Confidence level of the intervals.
        concentration: Of the Dirichlet prior of "map", at least 1; a number or ``[K]``. A class
            gets this minus 1 pseudo-examples.
        regularization: Of "rlls", as a multiple of its bound on the error of the confusion matrix.
        tolerance: Of the optimality certificate, at least 1e-12; 1e-10 is practical.
        replicates: Bootstrap replicates.
        seed: Of the bootstrap.

    Returns:
        Proportions, intervals and notes. Print it.

    Raises:
        ValueError: Unknown options, or arrays that do not fit together.

    >>> import numpy as np
    >>> validation = np.array([[0.8, 0.2], [0.2, 0.8]] * 50)
    >>> labels = np.array([0, 1, 0, 1, 0, 1, 0, 1, 1, 0] * 10)
    >>> source = Calibration("none", np.ones(2), np.zeros(2), validation, labels)
    >>> target = np.array([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.2, 0.8]] * 100)
    >>> estimate_prevalence(target, source).estimate.round(4)
    array([0.9167, 0.0833])

    References:
        A. Alexandari, A. Kundaje, A. Shrikumar, "Maximum likelihood with bias-corrected calibration
        is hard-to-beat at label shift adaptation", 2020.
    """
    likelihood = method in ("maximum_likelihood", "map")
    kinds = ("asymptotic", "bootstrap") if likelihood else ("bootstrap",)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if interval is not None and interval not in ("auto", *kinds):
        raise ValueError(
            f"interval of {method} must be one of auto, {', '.join(kinds)}, None, got {interval!r}"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    if not tolerance >= 1e-12:
        raise ValueError(
            f"tolerance must be >= 1e-12, got {tolerance!r}; below 1e-10 rounding errors dominate"
        )
    if replicates < 20:
        raise ValueError(f"replicates must be >= 20, got {replicates}; 500 are enough")
    if labeled is not None and not likelihood:
        raise ValueError(
            f"labeled must be None with {method}; use maximum_likelihood or map with it"
        )
    found = as_probability_rows(probabilities, "target probabilities")
    same_width(found, "target probabilities", source.probabilities, "validation probabilities")
    if len(source.labels) < 2:
        raise ValueError(f"source must have >= 2 validation examples, got {len(source.labels)}")
    chosen = kinds[0] if interval == "auto" else interval
    resampling = Resampling(replicates, np.random.default_rng(seed))
    if likelihood:
        pseudo = np.zeros(source.classes)
        if method == "map":
            pseudo = _pseudo_counts(concentration, source.classes)
        sample, notes = _sample(found, source, labeled, pseudo)
        return likelihood_prevalence(
            sample, notes, interval=chosen, level=level, tolerance=tolerance, resampling=resampling
        )
    if not regularization >= 0:
        raise ValueError(f"regularization must be >= 0, got {regularization!r}")
    return confusion_prevalence(
        found,
        source,
        hard=method == "bbse_hard",
        regularization=regularization if method == "rlls" else None,
        level=level,
        resampling=None if chosen is None else resampling,
    )


def likelihood_prevalence(
    sample: Sample,
    notes: list[str],
    *,
    interval: str | None,
    level: float,
    tolerance: float,
    resampling: Resampling,
) -> Prevalence:
    """Maximum likelihood, or maximum a posteriori for a sample with pseudo-counts."""
    found, source, prior = sample.probabilities, sample.source, bool(sample.pseudo.any())
    maximum = maximize_likelihood(
        found, source.prior, counts=sample.counts, weights=sample.weights, tolerance=tolerance
    )
    if maximum.gap > tolerance:
        notes.append(f"the certificate is {maximum.gap:.1e}, above the tolerance {tolerance:.1e}")
    observed = observed_information(sample, maximum)
    weakest, direction = weakest_direction(sample, maximum, observed)
    if weakest >= 0.5:
        # A subset of the rows of a large target may lack a rare class; use all rows.
        weakest, direction = weakest_direction(sample, maximum)
    reason, confused = _identifiability(sample, weakest, direction)
    low = high = np.full(source.classes, np.nan)
    if interval == "asymptotic" and not reason:
        variances = precision(sample, maximum, observed)
        low, high = score_intervals(sample, maximum, variances, level)
    elif interval == "bootstrap" and not reason:
        drawn = uncertainty.likelihood_replicates(
            sample, maximum, resampling.replicates, resampling.random
        )
        low, high = uncertainty.percentiles(drawn, level)
    if prior and interval is not None and not reason:
        notes.append("the intervals include the pseudo-examples of the prior")
    return Prevalence(
        method="maximum a posteriori" if prior else "maximum likelihood",
        estimate=maximum.estimate,
        low=low,
        high=high,
        level=level,
        source=source.prior,
        counts=(len(source.labels), len(found)),
        gap=maximum.gap,
        identifiable=not reason,
        reason=reason,
        notes=tuple(notes),
        likelihood_ratio=None if prior else 2 * maximum.log_likelihood * sample.total,
        confused=confused,
    )


def confusion_prevalence(
    found: np.ndarray,
    source: Calibration,
    *,
    hard: bool,
    regularization: float | None,
    level: float,
    resampling: Resampling | None,
) -> Prevalence:
    """Black-box shift estimation, or RLLS with a regularization."""
    box = confusion.solve_confusion(found, source.probabilities, source.labels, hard=hard)
    name = "RLLS" if regularization is not None else f"BBSE, {'hard' if hard else 'soft'}"
    strength = (regularization or 0.0) * confusion.regularization_radius(
        source.classes, len(source.labels)
    )

    def solve(matrix: np.ndarray, predicted: np.ndarray, raw: np.ndarray) -> np.ndarray:
        if regularization is None:
            conditional = confusion.conditional_confusion(matrix, matrix.sum(0))
            return confusion.solve_proportions(conditional, predicted, raw)
        weights = confusion.regularized_weights(matrix, predicted - matrix.sum(1), strength)
        proportion = weights * matrix.sum(0)
        result: np.ndarray = proportion / proportion.sum()
        return result

    notes, reason = [], ""
    absent = np.flatnonzero(box.frequency == 0)
    unpredicted = np.flatnonzero(box.matrix.sum(1) == 0)
    if (box.raw < 0).any():
        worst = int(np.argmin(box.raw))
        notes.append(
            f"the raw solution is negative for {int((box.raw < 0).sum())} classes, such as "
            f"{box.raw[worst]:.3f} for class {worst}: noise, or not a label shift"
        )
    first, second = box.confused
    notes.append(
        f"classes {first} and {second} are confused most; smallest singular value "
        f"{box.smallest:.2g}, condition number {box.condition:.3g}"
    )
    if len(absent):
        reason = f"classes {absent[:10].tolist()} have no validation label, so no confusion rates"
    elif len(unpredicted):
        reason = f"classes {unpredicted[:10].tolist()} are never predicted on the validation"
    elif box.largest_error >= 1:
        reason = (
            f"classes {first} and {second} are almost indistinguishable: the standard error of "
            f"their proportions is {min(box.largest_error, 999):.3g}; merge them, or use a better "
            "model"
        )
    low = high = np.full(source.classes, np.nan)
    if resampling is not None and not reason:
        matrices, means = uncertainty.confusion_replicates(
            found, source, resampling.replicates, resampling.random, hard=hard
        )
        raws = _raw_replicates(matrices, means)
        drawn = np.stack([solve(*each) for each in zip(matrices, means, raws, strict=True)])
        low, high = uncertainty.percentiles(drawn, level)
    return Prevalence(
        method=name,
        estimate=solve(box.matrix, box.predicted, box.raw),
        low=low,
        high=high,
        level=level,
        source=source.prior,
        counts=(len(source.labels), len(found)),
        identifiable=not reason,
        reason=reason,
        notes=tuple(notes),
        raw=box.raw,
        condition=box.condition,
        smallest_singular_value=box.smallest,
        confused=box.confused,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Resampling:
    """Number of bootstrap replicates and their random generator."""

    replicates: int
    random: np.random.Generator


def _identifiability(
    sample: Sample, weakest: float, direction: np.ndarray
) -> tuple[str, tuple[int, int] | None]:
    """Why the target does not determine its prevalence, "" if it does; the confused classes."""
    pair = None
    if direction.any():
        pair = (int(np.argmin(direction)), int(np.argmax(direction)))
        pair = (min(pair), max(pair))
    first = sample.probabilities[:1]
    rows = len(sample.probabilities)
    if not sample.labeled.any() and (first.max() < _CERTAIN or rows < 2):
        same = rows < 2 or all(
            (part == first).all() for part, _ in row_blocks(sample.probabilities)
        )
        if same:
            return (
                f"all {rows} target rows are the same, and one observation determines no mixture",
                pair,
            )
    if weakest >= 1 and pair is not None:
        return (
            f"classes {pair[0]} and {pair[1]} are almost indistinguishable: the standard error of "
            f"their proportions is {min(weakest, 999):.3g}; merge them, label some target "
            "examples, or use a better model",
            pair,
        )
    return "", pair


def _raw_replicates(matrices: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Raw proportions of every replicate; NaN where a class was not drawn or not predicted."""
    frequencies = matrices.sum(1)
    raws = np.full(means.shape, np.nan)
    whole = (frequencies > 0).all(1) & (matrices.sum(2) > 0).all(1)
    if whole.any():
        conditional = matrices[whole] / frequencies[whole, None, :]
        with contextlib.suppress(np.linalg.LinAlgError):
            raws[whole] = np.linalg.solve(conditional, means[whole, :, None])[..., 0]
    return raws


def _pseudo_counts(concentration: Any, classes: int) -> np.ndarray:
    found = np.asarray(concentration, np.float64)
    if found.shape not in ((), (classes,)) or not np.isfinite(found).all() or (found < 1).any():
        raise ValueError(
            f"concentration must be a number or {classes} numbers, each >= 1, got {concentration}"
        )
    return np.broadcast_to(found - 1, (classes,)).copy()


def _sample(
    found: np.ndarray, source: Calibration, labeled: tuple[Any, Any] | None, pseudo: np.ndarray
) -> tuple[Sample, list[str]]:
    """Row weights and label counts, and notes on what was left out."""
    notes, weights, counts = [], None, np.zeros(source.classes)
    if labeled is not None:
        numbers = as_labels(
            labeled[0], "labeled rows", count=np.size(labeled[0]), classes=len(found)
        )
        classes = as_labels(
            labeled[1], "labels of the target", count=len(numbers), classes=source.classes
        )
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError("labeled rows must be different, got a row twice")
        counts = np.bincount(classes, minlength=source.classes).astype(np.float64)
        weights = np.ones(len(found))
        weights[numbers] = 0.0
    never = source.prior == 0
    if never.any():
        seen = np.zeros(source.classes)
        lost = np.zeros(len(found), bool)
        for part, rows in row_blocks(found):
            seen += part.sum(0)
            lost[rows] = part[:, ~never].max(1) == 0
        ignored = np.flatnonzero(never)
        notes.append(
            f"classes {ignored[:10].tolist()} have probability 0 throughout the validation and are "
            f"left out; they have {seen[never].sum() / len(found):.3g} of the target's "
            f"probability, and all of it in {int(lost.sum())} rows"
        )
        if lost.any():
            weights = np.ones(len(found)) if weights is None else weights
            weights[lost] = 0.0
    if weights is not None and not weights.any():
        raise ValueError(
            "probabilities must have unlabeled rows of classes with positive prior, got none"
        )
    absent = np.flatnonzero(np.bincount(source.labels, minlength=source.classes) == 0)
    if len(absent):
        notes.append(
            f"classes {absent[:10].tolist()} have no validation label: their errors are unknown"
        )
    return Sample(found, source, counts, pseudo, weights), notes
