"""Sample size: the number of target labels that a test needs, and uncertain posteriors.

``labels_needed`` computes the power of ``posterior_ratio_tests`` by number of labels.
``corrected_posteriors`` are the prior-corrected posteriors of labeled examples with a bootstrap of
their error, which the tests on a few labels take into account.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.statistics import LEVEL, POWER, check_repetitions

__all__ = [
    "EstimatedPosteriors",
    "LabelsNeeded",
    "corrected_posteriors",
    "labels_needed",
]

_MIN_PROBABILITY = 1e-300

_CHUNK_SIZE = 4_000_000


def labels_needed(
    probabilities: Any,
    adjusted: Any,
    *,
    power: float = POWER,
    level: float = LEVEL,
    max_labels: int = 1000,
    simulations: int = 2000,
    seed: int = 0,
) -> LabelsNeeded:
    """Target labels that ``posterior_ratio_tests`` needs to decide between the two shifts.

    The two are label shift and covariate shift. Use it before paying for labels. The answer is as
    reliable as the model's posteriors: examples are drawn from those given, and labels from their
    posteriors under either hypothesis. It is not the number needed to detect concept shift, whose
    size is unknown beforehand.

    Args:
        probabilities: ``[m, K]``, calibrated posteriors of unlabeled target examples.
        adjusted: ``[m, K]``, the same, corrected to the target's prevalence.
        power: Required in either direction.
        level: Significance level of the tests.
        max_labels: Most labels that are tried; examples are drawn with replacement.
        simulations: Sequences of examples and labels under either hypothesis.
        seed: Of the simulations.

    Raises:
        ValueError: Invalid probabilities, different examples, or a power or level outside of 0
            and 1.

    >>> raw, adjusted = np.tile([0.5, 0.5], (40, 1)), np.tile([0.9, 0.1], (40, 1))
    >>> labels_needed(raw, adjusted, max_labels=50).count in range(9, 15)
    True
    >>> labels_needed(raw, raw).reason
    'both hypotheses have the same posteriors: no label tells them apart'
    """
    raw = as_probabilities(probabilities, "probabilities")
    changed = as_probabilities(adjusted, "adjusted probabilities")
    classes = same_width(raw, "probabilities", changed, "adjusted probabilities")
    if len(raw) != len(changed):
        raise ValueError(
            "probabilities and adjusted probabilities must be of the same examples, got "
            f"{len(raw)} and {len(changed)} rows"
        )
    for name, value in (("power", power), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    check_repetitions(simulations, "simulations")
    if max_labels < 1:
        raise ValueError(f"max_labels must be >= 1, got {max_labels}")
    if np.allclose(raw, changed, rtol=0, atol=1e-9):
        reason = "both hypotheses have the same posteriors: no label tells them apart"
        return LabelsNeeded(None, power, level, np.arange(0), np.zeros(0), reason)

    ratios = np.log(np.maximum(changed, _MIN_PROBABILITY)) - np.log(
        np.maximum(raw, _MIN_PROBABILITY)
    )
    rng = np.random.default_rng(seed)
    counts = np.arange(1, max_labels + 1)
    # Sums over the first l labels of a sequence, for all l at once.
    sums = {
        "raw": np.empty((simulations, max_labels)),
        "adjusted": np.empty((simulations, max_labels)),
    }
    chunk = max(1, _CHUNK_SIZE // (max_labels * classes))
    for start in range(0, simulations, chunk):
        part = slice(start, min(start + chunk, simulations))
        for posteriors, name in ((raw, "raw"), (changed, "adjusted")):
            rows = rng.integers(len(raw), size=(part.stop - start, max_labels))
            cumulated = np.cumsum(posteriors, axis=1)[rows]
            uniform = rng.random(rows.shape)[:, :, None] * cumulated[:, :, -1:]
            drawn = (uniform >= cumulated).sum(2)
            sums[name][part] = np.cumsum(ratios[rows, drawn], axis=1)
    powers = np.minimum(
        _power(sums["raw"], sums["adjusted"], level), _power(-sums["adjusted"], -sums["raw"], level)
    )
    # Power is not monotone with few labels: require it for all larger numbers too.
    sufficient = np.flip(np.minimum.accumulate(np.flip(powers))) >= power
    if not sufficient.any():
        reason = f"{max_labels} labels have a power of {powers[-1]:.2f}"
        return LabelsNeeded(None, power, level, counts, powers, reason)
    return LabelsNeeded(int(counts[np.argmax(sufficient)]), power, level, counts, powers)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelsNeeded:
    """Power of a likelihood-ratio test by number of labels.

    Args:
        count: Labels that suffice for ``power``; None where none of ``counts`` does.
        power: The power asked for.
        level: Significance level of the test.
        counts: ``[C]``, the numbers of labels that were tried.
        powers: ``[C]``, the lower power of the two directions: rejecting the covariate hypothesis
            where the label hypothesis is true, and vice versa.
        reason: Why there is no ``count``; "" where there is one.
    """

    count: int | None
    power: float
    level: float
    counts: np.ndarray
    powers: np.ndarray
    reason: str = ""


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


def _corrected(
    probabilities: np.ndarray, proportions: np.ndarray, priors: np.ndarray
) -> np.ndarray:
    """Bayes' rule for posteriors ``[S, l, K]`` with one prevalence ``[S, K]`` per draw."""
    ratios = np.divide(proportions, priors, out=np.zeros_like(proportions), where=priors > 0)
    weighted = probabilities * ratios[:, None]
    sums = weighted.sum(2, keepdims=True)
    # An example whose possible classes all have proportion 0 is left unchanged.
    return np.where(sums > 0, weighted / np.where(sums > 0, sums, 1), probabilities)


def _power(null: np.ndarray, alternative: np.ndarray, level: float) -> np.ndarray:
    """Fraction of the alternative above the (1 - level) quantile of the null, per column."""
    ordered = np.sort(null, axis=0)
    critical = ordered[min(len(null) - 1, int(np.ceil((1 - level) * len(null))) - 1)]
    powers: np.ndarray = (alternative > critical + 1e-9).mean(0)
    return powers
