"""Prior correction: predictions under another prevalence, guarded.

Predictions under another prevalence, by Bayes' rule.

Predictions corrected for a target's prevalence, unless there is a reason to leave them alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_prior, as_probabilities
from flaxtransfer.shift.label_shift import residual_test
from flaxtransfer.shift.prevalence import Prevalence, estimate_prevalence
from flaxtransfer.shift.statistics import HypothesisTest, holm

__all__ = ["LEAST_TARGETS", "TARGETS_PER_CLASS", "PriorCorrection", "adjust_prior", "correct_prior"]


def adjust_prior(
    probabilities: Any,
    prevalence: Prevalence | Any,
    *,
    source_prior: Any = None,
    force: bool = False,
) -> np.ndarray:
    """Calibrated probabilities as they are where the classes are differently common.

    ``f_k q_k / p_k``, made to sum to 1: right if the classes look the same as at the source and are
    only more or less common. Where the inputs themselves have changed it does harm: calibrate, and
    look at the diagnosis first. The most probable class changes only where it was in doubt.

    Args:
        probabilities: `[m, K]`, calibrated at the source.
        prevalence: an estimate, which knows its source prior, or the target's prior `[K]`.
        source_prior: `[K]`, the prior that `probabilities` are right for; has to be given with a
            prior, and not with an estimate.
        force: take an estimate that the data do not determine.

    Returns:
        `[m, K]`, float64. Classes of prevalence 0 get exactly 0.

    Raises:
        ValueError: an estimate that is not identifiable; a source prior that is missing or given
            twice; a class that the source never has and the target does; a row that only classes
            without prevalence could explain.

    >>> adjust_prior([[0.5, 0.5]], [0.9, 0.1], source_prior=[0.5, 0.5])
    array([[0.9, 0.1]])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
    """
    found = as_probabilities(probabilities, "probabilities")
    classes = found.shape[1]
    if isinstance(prevalence, Prevalence):
        if not prevalence.identifiable and not force:
            raise ValueError(
                f"the target does not determine its prevalence: {prevalence.reason}; a correction "
                "by it would be arbitrary (force=True makes it all the same)"
            )
        if source_prior is not None:
            raise ValueError("a Prevalence has its source prior; source_prior is for plain arrays")
        target, source_prior = prevalence.estimate, prevalence.source
    elif source_prior is None:
        raise ValueError(
            "source_prior is missing: a target's prior corrects relative to the source's, "
            "Calibration.prior"
        )
    else:
        target = prevalence
    q = as_prior(target, "the target's prior", classes=classes)
    p = as_prior(source_prior, "the source's prior", classes=classes)
    new = np.flatnonzero((p == 0) & (q > 0))
    if len(new):
        raise ValueError(
            f"the source's prior of classes {new.tolist()} is 0 and the target's is not: a model "
            "that has never seen a class cannot be corrected to see it"
        )
    with np.errstate(divide="ignore"):
        scores = np.log(found) + np.log(np.where(q > 0, q / np.where(p > 0, p, 1), 0))
    top = scores.max(1, keepdims=True)
    lost = np.isneginf(top[:, 0])
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} rows, first row {int(np.argmax(lost))}, hold nothing but classes "
            f"whose prevalence is 0, {np.flatnonzero(q == 0).tolist()[:10]}; a floor under the "
            "prevalence, as 1e-6, keeps them possible"
        )
    weighted = np.exp(scores - top)
    return weighted / weighted.sum(1, keepdims=True)


LEAST_TARGETS = 30
"""Fewer say next to nothing about shares: a half has a standard error of a tenth."""

TARGETS_PER_CLASS = 5
"""On average; with fewer, some class has none by chance and would be corrected away."""

_FLOOR = 1e-9
"""Log-probabilities below this one's differ by nothing that a calibration could know."""


@dataclasses.dataclass(frozen=True, eq=False)
class PriorCorrection:
    """Corrected predictions, or why they are not.

    Args:
        adjusted: whether `probabilities` are corrected.
        refusals: why not; with ``guard="warn"``, what would have been a reason.
        probabilities: `[m, K]`, what to use.
        calibrated: `[m, K]`, before the correction.
        prevalence: of the target; None where there are too few examples to estimate it.
        residuals: tests of label shift, on log-probabilities and on features where those are
            given, corrected for their number; none where not asked for or not reached.
    """

    adjusted: bool
    refusals: tuple[str, ...]
    probabilities: np.ndarray
    calibrated: np.ndarray
    prevalence: Prevalence | None
    residuals: tuple[HypothesisTest, ...]

    @property
    def changed(self) -> int:
        """Examples whose most probable class is another than before."""
        return int((self.probabilities.argmax(1) != self.calibrated.argmax(1)).sum())

    def __str__(self) -> str:
        lines = [] if self.prevalence is None else [str(self.prevalence)]
        lines += [
            f"H0, {test.hypothesis}: p = {test.p:.3g}"
            for test in self.residuals
            if test.p is not None
        ]
        word = "reason against it" if self.adjusted else "not corrected"
        lines += [f"{word}: {reason}" for reason in self.refusals]
        if self.adjusted:
            lines.append(f"{self.changed} of {len(self.calibrated)} predictions changed")
        return "\n".join(lines)


def correct_prior(
    logits: Any,
    source: Calibration,
    *,
    features: tuple[Any, Any] | None = None,
    method: str = "maximum_likelihood",
    guard: Literal["refuse", "warn"] = "refuse",
    level: float = 0.01,
    simulations: int = 499,
    seed: int = 0,
) -> PriorCorrection:
    """Calibrates a target's predictions, estimates its prevalence, and corrects them by it.

    You want it where classes are differently common and look the same. It is gated on just that: a
    correction by shares that were estimated on images of another kind makes good predictions bad.
    Refused are too few examples, a prevalence that the data do not determine, and a target that no
    mixture of the source's classes explains (`residual_test`, on calibrated log-probabilities and
    on features). Give features: they show changes of the images that predictions hide. One that
    leaves them within such a mixture is not seen by any test.

    Args:
        logits: `[m, K]`, of the target.
        source: calibration of this model, with its validation.
        features: `[n, D]` of the validation examples and `[m, D]` of the target, in their orders;
            what the model's last layer sees, say.
        method: of `estimate_prevalence`.
        guard: "refuse" leaves calibrated probabilities as they are where there is a reason, "warn"
            corrects and reports it.
        level: of the residual tests together; 0 leaves them out.
        simulations: of each.
        seed: of them.

    Raises:
        ValueError: logits or features that do not fit, options that do not exist.

    >>> rng = np.random.default_rng(0)
    >>> def draw(shares, count):
    ...     labels = rng.choice(2, count, p=shares)
    ...     score = rng.normal(2 * labels - 1)
    ...     return np.stack([-score, score], 1), labels
    >>> from flaxtransfer.shift.calibration import calibrate
    >>> source = calibrate(*draw([0.5, 0.5], 2000))
    >>> logits, labels = draw([0.95, 0.05], 500)
    >>> found = correct_prior(logits, source)
    >>> before, after = found.calibrated.argmax(1), found.probabilities.argmax(1)
    >>> bool(np.mean(before == labels) < np.mean(after == labels))
    True
    """
    if guard not in ("refuse", "warn"):
        raise ValueError(f"guard is 'refuse' or 'warn', not {guard!r}")
    if features is not None and not (isinstance(features, tuple | list) and len(features) == 2):
        raise ValueError("features are a pair: of the validation examples, and of the target")
    calibrated = source.apply(logits)
    count, classes = calibrated.shape
    least = max(LEAST_TARGETS, TARGETS_PER_CLASS * classes)
    refusals = []
    if count < least:
        refusals.append(
            f"{count} examples say too little about the shares of {classes} classes: give {least} "
            "or more, or the prior itself"
        )
        if guard == "refuse":
            return PriorCorrection(False, tuple(refusals), calibrated, calibrated, None, ())
    prevalence = estimate_prevalence(calibrated, source, method=method)
    if not prevalence.identifiable:
        refusals.append(f"the data do not determine the prevalence: {prevalence.reason}")
    residuals: tuple[HypothesisTest, ...] = ()
    if level > 0:
        residuals = _residual_tests(calibrated, source, features, simulations, level, seed)
        unexplained = [
            f"{what} (residual test, p = {test.p:.3g})"
            for what, test in zip(("predictions", "features"), residuals, strict=False)
            if test.rejected(level)
        ]
        if unexplained:
            refusals.append(
                f"no shares of the source's classes explain these {' or '.join(unexplained)}: the "
                "images themselves have changed, and shares estimated on them are wrong"
            )
    adjusted = not refusals or guard == "warn"
    probabilities = (
        adjust_prior(calibrated, prevalence, force=guard == "warn") if adjusted else calibrated
    )
    return PriorCorrection(
        adjusted, tuple(refusals), probabilities, calibrated, prevalence, residuals
    )


def _residual_tests(
    calibrated: np.ndarray,
    source: Calibration,
    features: tuple[Any, Any] | None,
    simulations: int,
    level: float,
    seed: int,
) -> tuple[HypothesisTest, ...]:
    """Of log-probabilities, then of features where there are any."""
    pairs = [(_logs(source.probabilities), _logs(calibrated))]
    if features is not None:
        pairs.append(features)
    least = math.ceil(len(pairs) / level) - 1
    if simulations < least:
        raise ValueError(
            f"{simulations} simulations cannot reject at a level of {level:g}: the least p-value "
            f"is {len(pairs)} / {simulations + 1}; give {least} or more"
        )
    return holm(
        [
            residual_test(*pair, calibrated, source, simulations=simulations, seed=seed)
            for pair in pairs
        ]
    )


def _logs(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, _FLOOR))
