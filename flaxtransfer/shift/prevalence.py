"""Estimators of prevalence (label shift), with their intervals.

How common each class is: the one type that every estimator of it returns.

Estimates of prevalence with their intervals, and whether the data determine them.

One door to all estimators of prevalence.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift import bootstrap, confusion
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_labels, as_probability_rows, same_width
from flaxtransfer.shift.likelihood import blocks, maximize
from flaxtransfer.shift.precision import Sample, observed_information, precision, weakest_direction
from flaxtransfer.shift.prevalence_intervals import score_intervals

__all__ = [
    "METHODS",
    "Prevalence",
    "Resampling",
    "by_confusion",
    "by_likelihood",
    "estimate_prevalence",
]


_ROWS = 20
"""Classes that are printed, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prevalence:
    """Estimated shares of the classes in a target population.

    Args:
        method: which estimator, "maximum likelihood", "BBSE, soft".
        estimate: `[K]`, non-negative, sums to 1.
        low: `[K]`, lower ends of the intervals; NaN where there are none.
        high: `[K]`, upper ends.
        level: of the intervals, 0.95.
        source: `[K]`, the prior that the estimate is relative to: q / p are the weights.
        counts: validation examples and target examples.
        gap: optimality certificate of a likelihood: what the mean log-likelihood can still rise
            by, at most; None for estimators that are no maximum.
        identifiable: whether the target's data determine the estimate at all.
        reason: why not; "" where they do.
        notes: what a reader has to know: negative raw solutions, the pair of classes that are
            confused most, classes that were left out.
        likelihood_ratio: 2 m times the rise of the mean log-likelihood over that of the source
            prior; about chi-squared with K - 1 degrees of freedom where nothing has shifted.
        raw: `[K]`, the shares by the inverse of the confusion matrix, negative ones included.
        condition: of the confusion matrix; infinite where it has no inverse.
        smallest_singular_value: of the confusion matrix: errors are multiplied by its inverse.
        confused: the two classes that can be told apart least.
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
            raise ValueError("an estimate is identifiable, or there is a reason why it is not")

    @property
    def total_variation(self) -> float:
        """Distance of the estimate from the source prior, between 0 and 1."""
        return float(np.abs(self.estimate - self.source).sum() / 2)

    @property
    def effective_classes(self) -> float:
        """exp(entropy): 1 where one class is all there is, K where all are equally common."""
        shares = self.estimate[self.estimate > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def __str__(self) -> str:
        validation, target = self.counts
        lines = [f"prevalence by {self.method}: {target} targets, {validation} validation examples"]
        if not self.identifiable:
            lines.append(f"NOT IDENTIFIABLE: {self.reason}")
        lines.append(f"{'class':>7} {'source':>8} {'target':>8}   {self.level:.0%} interval")
        largest = np.sort(np.argsort(-self.estimate, kind="stable")[:_ROWS])
        for k in largest.tolist():
            row = f"{k:>7} {self.source[k]:>8.4f} {self.estimate[k]:>8.4f}"
            if np.isfinite(self.low[k]):
                row += f"   {self.low[k]:.4f} to {self.high[k]:.4f}"
            lines.append(row)
        if len(self.estimate) > _ROWS:
            lines.append(f"    and {len(self.estimate) - _ROWS} smaller ones")
        gap = "" if self.gap is None else f", certificate {self.gap:.1e}"
        lines.append(f"total variation from the source {self.total_variation:.4f}{gap}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


_CERTAIN = 0.999
"""A row this sure of its class is as good as a label."""


@dataclasses.dataclass(frozen=True, eq=False)
class Resampling:
    """How many times data are drawn again, and by whom."""

    replicates: int
    random: np.random.Generator


def by_likelihood(
    sample: Sample,
    notes: list[str],
    *,
    interval: str | None,
    level: float,
    tolerance: float,
    resampling: Resampling,
) -> Prevalence:
    """Maximum likelihood, or the maximum a posteriori of a sample with pseudo-examples."""
    found, source, prior = sample.probabilities, sample.source, bool(sample.pseudo.any())
    maximum = maximize(
        found, source.prior, counts=sample.counts, weights=sample.weights, tolerance=tolerance
    )
    if maximum.gap > tolerance:
        notes.append(f"the certificate ends at {maximum.gap:.1e}, not {tolerance:.1e}")
    observed = observed_information(sample, maximum)
    weakest, way = weakest_direction(sample, maximum, observed)
    if weakest >= 0.5:
        # Some rows of a large target may all miss a rare class; the whole decides.
        weakest, way = weakest_direction(sample, maximum)
    reason, confused = _unidentified(sample, weakest, way)
    low = high = np.full(source.classes, np.nan)
    if interval == "asymptotic" and not reason:
        precise = precision(sample, maximum, observed)
        low, high = score_intervals(sample, maximum, precise, level)
    elif interval == "bootstrap" and not reason:
        drawn = bootstrap.likelihood_replicates(
            sample, maximum, resampling.replicates, resampling.random
        )
        low, high = bootstrap.percentiles(drawn, level)
    if prior and interval is not None and not reason:
        notes.append("the intervals are those of the data with the prior's pseudo-examples")
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


def _unidentified(
    sample: Sample, weakest: float, way: np.ndarray
) -> tuple[str, tuple[int, int] | None]:
    """Why the target does not determine its prevalence, "" if it does, and what it confuses."""
    pair = None
    if way.any():
        pair = (int(np.argmin(way)), int(np.argmax(way)))
        pair = (min(pair), max(pair))
    first = sample.probabilities[:1]
    rows = len(sample.probabilities)
    if not sample.labeled.any() and (first.max() < _CERTAIN or rows < 2):
        same = rows < 2 or all((part == first).all() for part, _ in blocks(sample.probabilities))
        if same:
            return (
                f"all {rows} target rows are the same, and one observation determines no mixture",
                pair,
            )
    if weakest >= 1 and pair is not None:
        return (
            f"classes {pair[0]} and {pair[1]} can be exchanged for each other almost unseen: "
            f"the standard error of their shares is {min(weakest, 999):.3g}; merge them, give "
            "labeled targets, or use a better model",
            pair,
        )
    return "", pair


def by_confusion(
    found: np.ndarray,
    source: Calibration,
    *,
    hard: bool,
    regularization: float | None,
    level: float,
    resampling: Resampling | None,
) -> Prevalence:
    """BBSE, or RLLS where there is a regularization."""
    box = confusion.black_box(found, source.probabilities, source.labels, hard=hard)
    name = "RLLS" if regularization is not None else f"BBSE, {'hard' if hard else 'soft'}"
    strength = (regularization or 0.0) * confusion.regularization_radius(
        source.classes, len(source.labels)
    )

    def solve(matrix: np.ndarray, predicted: np.ndarray, raw: np.ndarray) -> np.ndarray:
        if regularization is None:
            conditional = confusion.rates(matrix, matrix.sum(0))
            return confusion.shares(conditional, predicted, raw)
        weights = confusion.regularized_weights(matrix, predicted - matrix.sum(1), strength)
        share = weights * matrix.sum(0)
        return share / share.sum()

    notes, reason = [], ""
    absent = np.flatnonzero(box.frequency == 0)
    unpredicted = np.flatnonzero(box.matrix.sum(1) == 0)
    if (box.raw < 0).any():
        worst = int(np.argmin(box.raw))
        notes.append(
            f"the raw solution is negative for {int((box.raw < 0).sum())} classes, as "
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
    elif box.weakest >= 1:
        reason = (
            f"classes {first} and {second} can be exchanged for each other almost unseen: the "
            f"standard error of their shares is {min(box.weakest, 999):.3g}; merge them, or use a "
            "better model"
        )
    low = high = np.full(source.classes, np.nan)
    if resampling is not None and not reason:
        matrices, means = bootstrap.confusion_replicates(
            found, source, resampling.replicates, resampling.random, hard=hard
        )
        raws = _raw_replicates(matrices, means)
        drawn = np.stack([solve(*each) for each in zip(matrices, means, raws, strict=True)])
        low, high = bootstrap.percentiles(drawn, level)
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


def _raw_replicates(matrices: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Raw shares of every replicate, NaN where a class was not drawn or not predicted."""
    frequencies = matrices.sum(1)
    raws = np.full(means.shape, np.nan)
    whole = (frequencies > 0).all(1) & (matrices.sum(2) > 0).all(1)
    if whole.any():
        conditional = matrices[whole] / frequencies[whole, None, :]
        with contextlib.suppress(np.linalg.LinAlgError):
            raws[whole] = np.linalg.solve(conditional, means[whole, :, None])[..., 0]
    return raws


METHODS = ("maximum_likelihood", "map", "bbse_soft", "bbse_hard", "rlls")
"""What `estimate_prevalence` can do."""


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
    """How common each class is in a target without labels.

    Right where the classes look the same on source and target and only their shares differ (label
    shift). Where the inputs have changed as well, no number here means anything, and none can say
    so by itself.

    Args:
        probabilities: `[m, K]`, of the target, calibrated: ``source.apply(logits)``. float32 and
            float64 are not copied.
        source: the calibration, with its validation.
        method: "maximum_likelihood", the most precise on calibrated probabilities; "map", the same
            with a Dirichlet prior; "bbse_soft" and "bbse_hard", from the confusion matrix, which
            need no calibration; "rlls", the same held near the source prior where data are few.
        labeled: row numbers and classes of a few target examples, drawn at random from the target
            ("maximum_likelihood" and "map").
        interval: "asymptotic" (likelihoods), "bootstrap", or None; "auto" is the first that the
            method has. Both count the noise of target and validation; percentiles of a bootstrap
            are too short near a share of 0.
        level: of the intervals.
        concentration: of the Dirichlet prior of "map", at least 1; a number or `[K]`. A class gets
            this minus 1 pseudo-examples.
        regularization: of "rlls", times its bound on the error of the confusion matrix.
        tolerance: of the certificate, down to 1e-10.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Shares, intervals and what has to be said about them. Print it.

    Raises:
        ValueError: what is asked does not exist, or the arrays do not fit.

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
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    if interval is not None and interval not in ("auto", *kinds):
        raise ValueError(f"{method} has no interval {interval!r}; it has {', '.join(kinds)}, None")
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, not {level!r}")
    if not tolerance >= 1e-12:
        raise ValueError(f"rounding ends above a tolerance of {tolerance!r}; 1e-10 is the least")
    if replicates < 20:
        raise ValueError(f"percentiles of {replicates} replicates are no interval; 500 are enough")
    if labeled is not None and not likelihood:
        raise ValueError(f"{method} has no place for labeled targets; use maximum_likelihood")
    found = as_probability_rows(probabilities, "target probabilities")
    same_width(found, "target probabilities", source.probabilities, "validation probabilities")
    if len(source.labels) < 2:
        raise ValueError("one validation example says nothing about its variance; give more")
    chosen = kinds[0] if interval == "auto" else interval
    again = Resampling(replicates, np.random.default_rng(seed))
    if likelihood:
        pseudo = np.zeros(source.classes)
        if method == "map":
            pseudo = _pseudo_counts(concentration, source.classes)
        sample, notes = _sample(found, source, labeled, pseudo)
        return by_likelihood(
            sample, notes, interval=chosen, level=level, tolerance=tolerance, resampling=again
        )
    if not regularization >= 0:
        raise ValueError(f"regularization is not negative, as {regularization!r} is")
    return by_confusion(
        found,
        source,
        hard=method == "bbse_hard",
        regularization=regularization if method == "rlls" else None,
        level=level,
        resampling=None if chosen is None else again,
    )


def _pseudo_counts(concentration: Any, classes: int) -> np.ndarray:
    found = np.asarray(concentration, np.float64)
    if found.shape not in ((), (classes,)) or not np.isfinite(found).all() or (found < 1).any():
        raise ValueError(
            f"concentration is a number or {classes} numbers, each at least 1, not {concentration}"
        )
    return np.broadcast_to(found - 1, (classes,)).copy()


def _sample(
    found: np.ndarray, source: Calibration, labeled: tuple[Any, Any] | None, pseudo: np.ndarray
) -> tuple[Sample, list[str]]:
    """Which rows count how, and what was left out."""
    notes, weights, counts = [], None, np.zeros(source.classes)
    if labeled is not None:
        numbers = as_labels(
            labeled[0], "labeled rows", count=np.size(labeled[0]), classes=len(found)
        )
        classes = as_labels(
            labeled[1], "labels of the target", count=len(numbers), classes=source.classes
        )
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError("labeled rows name a row twice; each has one label")
        counts = np.bincount(classes, minlength=source.classes).astype(np.float64)
        weights = np.ones(len(found))
        weights[numbers] = 0.0
    never = source.prior == 0
    if never.any():
        seen = np.zeros(source.classes)
        lost = np.zeros(len(found), bool)
        for part, rows in blocks(found):
            seen += part.sum(0)
            lost[rows] = part[:, ~never].max(1) == 0
        some = np.flatnonzero(never)
        notes.append(
            f"classes {some[:10].tolist()} have probability 0 throughout the validation and are "
            f"left out; the target gives them {seen[never].sum() / len(found):.3g} of its "
            f"probability, and {int(lost.sum())} rows nothing else"
        )
        if lost.any():
            weights = np.ones(len(found)) if weights is None else weights
            weights[lost] = 0.0
    if weights is not None and not weights.any():
        raise ValueError("no target row without a label is left that the source can explain")
    absent = np.flatnonzero(np.bincount(source.labels, minlength=source.classes) == 0)
    if len(absent):
        notes.append(
            f"classes {absent[:10].tolist()} have no validation label: nothing checks them"
        )
    return Sample(found, source, counts, pseudo, weights), notes
