"""Prior correction: predictions adjusted to another prevalence by Bayes' rule.

``adjust_prior`` applies the rule; ``correct_prior`` also calibrates, estimates the prevalence, and
refuses where the data contradict label shift. ``corrected_posteriors`` are those of labeled
examples with a bootstrap of their error, which the tests on a few labels take into account.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_prior, as_probabilities, same_width
from flaxtransfer.shift.label_shift import residual_test
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.prevalence import Prevalence, estimate_prevalence
from flaxtransfer.shift.statistics import HypothesisTest, holm

__all__ = [
    "MIN_TARGETS",
    "TARGETS_PER_CLASS",
    "EstimatedPosteriors",
    "PriorCorrection",
    "adjust_prior",
    "correct_prior",
    "corrected_posteriors",
]

MIN_TARGETS = 30
"""With fewer, a proportion of one half has a standard error of about one tenth."""

TARGETS_PER_CLASS = 5
"""On average; with fewer, a class without examples by chance would be corrected to 0."""

_MIN_PROBABILITY = 1e-9
"""Smaller probabilities are raised to this: their differences are not calibrated."""


def adjust_prior(
    probabilities: Any,
    prevalence: Prevalence | Any,
    *,
    source_prior: Any = None,
    force: bool = False,
) -> np.ndarray:
    """Prior correction of calibrated probabilities by Bayes' rule.

    ``f_k q_k / p_k``, normalized to sum to 1: correct if the classes look the same as at the source
    and only their prevalence differs. It does harm where the inputs themselves have changed:
    calibrate, and look at the diagnosis first. Only predictions that were uncertain change.

    Args:
        probabilities: ``[m, K]``, calibrated at the source.
        prevalence: An estimate, which holds its source prior, or the target's prior ``[K]``.
        source_prior: ``[K]``, the prior that ``probabilities`` are correct for; required with a
            target prior, not allowed with an estimate.
        force: Use an estimate that the data do not determine.

    Returns:
        ``[m, K]``, float64. Classes of prevalence 0 get exactly 0.

    Raises:
        ValueError: An estimate that is not identifiable; a source prior that is missing or given
            twice; a class with prior 0 at the source and not at the target; a row that only classes
            of prevalence 0 explain.

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
                f"prevalence must be identifiable, got one that is not: {prevalence.reason}; a "
                "correction by it would be arbitrary (force=True applies it anyway)"
            )
        if source_prior is not None:
            raise ValueError(
                "source_prior must be None with a Prevalence, which holds its source prior"
            )
        target, source_prior = prevalence.estimate, prevalence.source
    elif source_prior is None:
        raise ValueError(
            "source_prior must be given with the target's prior, got None; use Calibration.prior"
        )
    else:
        target = prevalence
    q = as_prior(target, "the target's prior", classes=classes)
    p = as_prior(source_prior, "the source's prior", classes=classes)
    unseen = np.flatnonzero((p == 0) & (q > 0))
    if len(unseen):
        raise ValueError(
            f"the source's prior must be > 0 where the target's is, got 0 for classes "
            f"{unseen.tolist()}; a model that has never seen a class cannot predict it"
        )
    with np.errstate(divide="ignore"):
        scores = np.log(found) + np.log(np.where(q > 0, q / np.where(p > 0, p, 1), 0))
    top = scores.max(1, keepdims=True)
    lost = np.isneginf(top[:, 0])
    if lost.any():
        raise ValueError(
            "every row must have a class of positive prevalence, got "
            f"{int(lost.sum())} rows without one, first row {int(np.argmax(lost))}; the prevalence "
            f"of classes {np.flatnonzero(q == 0).tolist()[:10]} is 0; raise it to 1e-6, for example"
        )
    weighted = np.exp(scores - top)
    result: np.ndarray = weighted / weighted.sum(1, keepdims=True)
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class PriorCorrection:
    """Prior-corrected predictions, or the reasons for not correcting them.

    Args:
        adjusted: Whether ``probabilities`` are corrected.
        refusals: Reasons against the correction; with ``guard="warn"`` it is applied anyway.
        probabilities: ``[m, K]``, the ones to use.
        calibrated: ``[m, K]``, before the correction.
        prevalence: Of the target; None where there are too few examples to estimate it.
        residuals: Tests of label shift on log-probabilities, and on features where those are given,
            with Holm's correction; empty if not asked for or not reached.
    """

    adjusted: bool
    refusals: tuple[str, ...]
    probabilities: np.ndarray
    calibrated: np.ndarray
    prevalence: Prevalence | None
    residuals: tuple[HypothesisTest, ...]

    @property
    def changed(self) -> int:
        """Number of examples whose most probable class has changed."""
        return int((self.probabilities.argmax(1) != self.calibrated.argmax(1)).sum())

    def __str__(self) -> str:
        lines = [] if self.prevalence is None else [str(self.prevalence)]
        lines += [
            f"H0, {test.hypothesis}: p = {test.p:.3g}"
            for test in self.residuals
            if test.p is not None
        ]
        prefix = "reason against it" if self.adjusted else "not corrected"
        lines += [f"{prefix}: {reason}" for reason in self.refusals]
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
    """Guarded prior correction of a target's predictions.

    Calibrates the logits, estimates the target's prevalence, and corrects the predictions by it.
    Use it where the classes differ in prevalence and look the same. It tests just that: a
    correction by proportions that were estimated on images of another kind makes good predictions
    bad. It refuses on too few examples, on a prevalence that the data do not determine, and on a
    target that no mixture of the source's classes explains (``residual_test``, on calibrated
    log-probabilities and on features). Pass features: they show changes of the images that
    predictions hide. No test sees a change that keeps the target within such mixtures.

    Args:
        logits: ``[m, K]``, of the target.
        source: Calibration of this model, with its validation examples.
        features: ``[n, D]`` of the validation examples and ``[m, D]`` of the target, in the same
            order as those; for example the input of the model's last layer.
        method: Of ``estimate_prevalence``.
        guard: "refuse" returns calibrated probabilities without correction if there is a reason
            against it; "warn" corrects and reports the reason.
        level: Significance level of the residual tests together; 0 leaves them out.
        simulations: Per test.
        seed: Of the tests.

    Raises:
        ValueError: Logits or features that do not fit, or unknown options.

    >>> rng = np.random.default_rng(0)
    >>> def draw(prevalence, count):
    ...     labels = rng.choice(2, count, p=prevalence)
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
        raise ValueError(f"guard must be 'refuse' or 'warn', got {guard!r}")
    if features is not None and not (isinstance(features, tuple | list) and len(features) == 2):
        raise ValueError(
            "features must be a pair, of the validation examples and of the target, "
            f"got {type(features).__name__}"
        )
    calibrated = source.apply(logits)
    count, classes = calibrated.shape
    required = max(MIN_TARGETS, TARGETS_PER_CLASS * classes)
    refusals = []
    if count < required:
        refusals.append(
            f"{count} examples are too few to estimate the prevalence of {classes} classes: use "
            f"{required} or more, or give the prior itself"
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
            f"{kind} (residual test, p = {test.p:.3g})"
            for kind, test in zip(("predictions", "features"), residuals, strict=False)
            if test.rejected(level)
        ]
        if unexplained:
            refusals.append(
                f"no mixture of the source's classes explains these {' or '.join(unexplained)}: "
                "the images themselves have changed, and the estimated prevalence is wrong"
            )
    adjusted = not refusals or guard == "warn"
    probabilities = (
        adjust_prior(calibrated, prevalence, force=guard == "warn") if adjusted else calibrated
    )
    return PriorCorrection(
        adjusted, tuple(refusals), probabilities, calibrated, prevalence, residuals
    )


def corrected_posteriors(
    labeled: Any,
    target_probabilities: Any,
    source: Calibration,
    *,
    draws: int = 200,
    seed: int = 0,
) -> EstimatedPosteriors:
    """Posteriors of labeled examples, corrected to the target's maximum-likelihood prevalence.

    A corrected posterior is as uncertain as the prevalence used, which was estimated with the help
    of the labeled examples themselves. Each bootstrap draw resamples source, labeled and unlabeled
    target examples, and estimates prior and prevalence again.

    Args:
        labeled: ``[l]``, the labeled rows of the target.
        target_probabilities: ``[m, K]``, calibrated, of all target examples.
        source: Calibrated probabilities of held-out source examples.
        draws: S, the number of bootstrap draws.
        seed: Of the draws.

    Raises:
        ValueError: Invalid probabilities, different classes, or rows outside of the target.

    >>> from flaxtransfer.shift.calibration import Calibration
    >>> rows = np.tile([[0.8, 0.2], [0.2, 0.8]], (50, 1))
    >>> source = Calibration("none", np.ones(2), np.zeros(2), rows, np.tile([0, 1], 50))
    >>> found = corrected_posteriors([0, 1, 2], rows, source)
    >>> found.posteriors.round(3).tolist(), found.estimates.shape
    ([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2]], (200, 3, 2))
    """
    target = as_probabilities(target_probabilities, "target probabilities")
    validation = as_probabilities(source.probabilities, "source probabilities")
    same_width(validation, "source probabilities", target, "target probabilities")
    labeled_rows = np.asarray(labeled)
    if labeled_rows.ndim != 1 or labeled_rows.dtype.kind not in "iu":
        raise ValueError(
            "labeled must be row numbers [l] of the target, got "
            f"{labeled_rows.dtype} of shape {list(labeled_rows.shape)}"
        )
    if len(labeled_rows) and not (labeled_rows.min() >= 0 and labeled_rows.max() < len(target)):
        raise ValueError(
            f"labeled must be within 0 .. {len(target) - 1}, got rows "
            f"{labeled_rows.min()} .. {labeled_rows.max()}"
        )
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")

    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(target)), labeled_rows)
    rows = rng.integers(max(1, len(labeled_rows)), size=(draws, len(labeled_rows)))
    all_rows = np.arange(len(target))[None]
    targets = np.concatenate(
        [labeled_rows[rows], others[rng.integers(max(1, len(others)), size=(draws, len(others)))]],
        axis=1,
    )
    sources = rng.integers(len(validation), size=(draws, len(validation)))
    priors = np.stack([validation[drawn].mean(0) for drawn in sources])
    proportions, _ = maximize_resampled(target, targets, priors)
    prior = validation.mean(0)
    proportion = maximize_resampled(target, all_rows, prior)[0]
    return EstimatedPosteriors(
        _corrected(target[labeled_rows][None], proportion, prior[None])[0],
        rows,
        _corrected(target[labeled_rows][rows], proportions, priors),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatedPosteriors:
    """Posteriors of labeled examples, with a bootstrap of their estimation error.

    Args:
        posteriors: ``[l, K]``.
        rows: ``[S, l]``, which of the l examples each bootstrap draw consists of.
        estimates: ``[S, l, K]``, their posteriors as estimated in that draw.
    """

    posteriors: np.ndarray
    rows: np.ndarray
    estimates: np.ndarray

    @classmethod
    def known(cls, posteriors: np.ndarray) -> EstimatedPosteriors:
        """Posteriors without estimation error: one draw, equal to them."""
        return cls(posteriors, np.arange(len(posteriors))[None], posteriors[None])


def _residual_tests(
    calibrated: np.ndarray,
    source: Calibration,
    features: tuple[Any, Any] | None,
    simulations: int,
    level: float,
    seed: int,
) -> tuple[HypothesisTest, ...]:
    """Residual tests of log-probabilities, then of features where there are any."""
    pairs = [(_log_probabilities(source.probabilities), _log_probabilities(calibrated))]
    if features is not None:
        pairs.append(features)
    required = math.ceil(len(pairs) / level) - 1
    if simulations < required:
        raise ValueError(
            f"simulations must be >= {required} to reject at level {level:g}, got {simulations}: "
            f"the smallest p-value is {len(pairs)} / {simulations + 1}"
        )
    return holm(
        [
            residual_test(*pair, calibrated, source, simulations=simulations, seed=seed)
            for pair in pairs
        ]
    )


def _log_probabilities(probabilities: np.ndarray) -> np.ndarray:
    logs: np.ndarray = np.log(np.maximum(probabilities, _MIN_PROBABILITY))
    return logs


def _corrected(
    probabilities: np.ndarray, proportions: np.ndarray, priors: np.ndarray
) -> np.ndarray:
    """Bayes' rule for posteriors ``[S, l, K]`` with one prevalence ``[S, K]`` per draw."""
    ratios = np.divide(proportions, priors, out=np.zeros_like(proportions), where=priors > 0)
    weighted = probabilities * ratios[:, None]
    sums = weighted.sum(2, keepdims=True)
    # An example whose possible classes all have proportion 0 is left unchanged.
    return np.where(sums > 0, weighted / np.where(sums > 0, sums, 1), probabilities)
