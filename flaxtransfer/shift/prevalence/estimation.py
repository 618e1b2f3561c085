"""One door to all estimators of prevalence."""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.checks import as_labels, as_probability_rows, same_width
from flaxtransfer.shift.prevalence.estimators import Resampling, by_confusion, by_likelihood
from flaxtransfer.shift.prevalence.likelihood import blocks
from flaxtransfer.shift.prevalence.precision import Sample
from flaxtransfer.shift.prevalence.prevalence import Prevalence

__all__ = ["METHODS", "estimate_prevalence"]

METHODS = ("maximum_likelihood", "map", "bbse_soft", "bbse_hard", "rlls")
"""What `estimate_prevalence` can do."""


def estimate_prevalence(
    probabilities: Any,
    source: Calibration,
    *,
    method: str = "maximum_likelihood",
    labelled: tuple[Any, Any] | None = None,
    interval: str | None = "auto",
    level: float = 0.95,
    concentration: Any = 2.0,
    regularisation: float = 0.01,
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
        labelled: row numbers and classes of a few target examples, drawn at random from the target
            ("maximum_likelihood" and "map").
        interval: "asymptotic" (likelihoods), "bootstrap", or None; "auto" is the first that the
            method has. Both count the noise of target and validation; percentiles of a bootstrap
            are too short near a share of 0.
        level: of the intervals.
        concentration: of the Dirichlet prior of "map", at least 1; a number or `[K]`. A class gets
            this minus 1 pseudo-examples.
        regularisation: of "rlls", times its bound on the error of the confusion matrix.
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
    if labelled is not None and not likelihood:
        raise ValueError(f"{method} has no place for labelled targets; use maximum_likelihood")
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
        sample, notes = _sample(found, source, labelled, pseudo)
        return by_likelihood(
            sample, notes, interval=chosen, level=level, tolerance=tolerance, resampling=again
        )
    if not regularisation >= 0:
        raise ValueError(f"regularisation is not negative, as {regularisation!r} is")
    return by_confusion(
        found,
        source,
        hard=method == "bbse_hard",
        regularisation=regularisation if method == "rlls" else None,
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
    found: np.ndarray, source: Calibration, labelled: tuple[Any, Any] | None, pseudo: np.ndarray
) -> tuple[Sample, list[str]]:
    """Which rows count how, and what was left out."""
    notes, weights, counts = [], None, np.zeros(source.classes)
    if labelled is not None:
        numbers = as_labels(
            labelled[0], "labelled rows", count=np.size(labelled[0]), classes=len(found)
        )
        classes = as_labels(
            labelled[1], "labels of the target", count=len(numbers), classes=source.classes
        )
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError("labelled rows name a row twice; each has one label")
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
