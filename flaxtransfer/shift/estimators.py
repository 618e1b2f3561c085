"""Estimates of prevalence with their intervals, and whether the data determine them."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np

from flaxtransfer.shift import bootstrap, confusion, rlls
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.likelihood import blocks, maximise
from flaxtransfer.shift.precision import Sample, observed_information, precision, weakest_direction
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.score_intervals import score_intervals

__all__ = ["Resampling", "by_confusion", "by_likelihood"]

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
    maximum = maximise(
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
    if not sample.labelled.any() and (first.max() < _CERTAIN or rows < 2):
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
            "labelled targets, or use a better model",
            pair,
        )
    return "", pair


def by_confusion(
    found: np.ndarray,
    source: Calibration,
    *,
    hard: bool,
    regularisation: float | None,
    level: float,
    resampling: Resampling | None,
) -> Prevalence:
    """BBSE, or RLLS where there is a regularisation."""
    box = confusion.black_box(found, source.probabilities, source.labels, hard=hard)
    name = "RLLS" if regularisation is not None else f"BBSE, {'hard' if hard else 'soft'}"
    strength = (regularisation or 0.0) * rlls.regularisation_radius(
        source.classes, len(source.labels)
    )

    def solve(matrix: np.ndarray, predicted: np.ndarray, raw: np.ndarray) -> np.ndarray:
        if regularisation is None:
            conditional = confusion.rates(matrix, matrix.sum(0))
            return confusion.shares(conditional, predicted, raw)
        weights = rlls.regularised_weights(matrix, predicted - matrix.sum(1), strength)
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
