"""Posteriors corrected by an estimate, and the number of labels that a test needs.

Posteriors that were corrected by an estimate, and how else that estimate could have come out.

How many target labels would tell label shift from covariate shift?
"""

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.statistics import LEVEL, POWER, enough_repetitions

__all__ = ["EstimatedPosteriors", "LabelsNeeded", "corrected_posteriors", "labels_needed"]


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatedPosteriors:
    """Posteriors of labeled examples, with a bootstrap of what they were estimated from.

    Args:
        posteriors: `[l, K]`.
        rows: `[S, l]`, which of the l examples each draw consists of.
        estimates: `[S, l, K]`, the posteriors of these, as the draw estimates them.
    """

    posteriors: np.ndarray
    rows: np.ndarray
    estimates: np.ndarray

    @classmethod
    def known(cls, posteriors: np.ndarray) -> "EstimatedPosteriors":
        """Posteriors without an error: one draw, which is what they are."""
        return cls(posteriors, np.arange(len(posteriors))[None], posteriors[None])


def corrected_posteriors(
    labeled: Any,
    target_probabilities: Any,
    source: Calibration,
    *,
    draws: int = 200,
    seed: int = 0,
) -> EstimatedPosteriors:
    """Posteriors of labeled examples, corrected to the target's maximum-likelihood prevalence.

    A corrected posterior is as uncertain as the prevalence that it was corrected by, and that was
    estimated with the help of the labeled examples themselves. Each draw of the bootstrap takes
    source, labeled and unlabeled target examples with replacement, and estimates prior and
    prevalence anew.

    Args:
        labeled: `[l]`, which rows of the target are labeled.
        target_probabilities: `[m, K]`, calibrated, of all target examples.
        source: calibrated probabilities of held-out source examples.
        draws: S.
        seed: for the draws.

    Raises:
        ValueError: what are no probabilities, or of other classes; rows that the target lacks.

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
    chosen = np.asarray(labeled)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"labeled: numbers of target rows [l], not {chosen.dtype} of shape {chosen.shape}"
        )
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(target)):
        raise ValueError(
            f"labeled: rows {chosen.min()} .. {chosen.max()} of a target of {len(target)} rows"
        )
    if draws < 1:
        raise ValueError(f"draws={draws}: at least 1")

    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(len(target)), chosen)
    rows = rng.integers(max(1, len(chosen)), size=(draws, len(chosen)))
    everyone = np.arange(len(target))[None]
    targets = np.concatenate(
        [chosen[rows], others[rng.integers(max(1, len(others)), size=(draws, len(others)))]], axis=1
    )
    sources = rng.integers(len(validation), size=(draws, len(validation)))
    priors = np.stack([validation[drawn].mean(0) for drawn in sources])
    shares, _ = maximize_resampled(target, targets, priors)
    prior = validation.mean(0)
    share = maximize_resampled(target, everyone, prior)[0]
    return EstimatedPosteriors(
        _corrected(target[chosen][None], share, prior[None])[0],
        rows,
        _corrected(target[chosen][rows], shares, priors),
    )


def _corrected(probabilities: np.ndarray, shares: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """Bayes' rule for posteriors `[S, l, K]` with one prevalence `[S, K]` for each of S."""
    ratios = np.divide(shares, priors, out=np.zeros_like(shares), where=priors > 0)
    weighted = probabilities * ratios[:, None]
    sums = weighted.sum(2, keepdims=True)
    # Where all that an example can be has no share, it stays as it was.
    return np.where(sums > 0, weighted / np.where(sums > 0, sums, 1), probabilities)


_SMALLEST = 1e-300
_CHUNK = 4_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class LabelsNeeded:
    """The power of a likelihood-ratio test, by number of labels.

    Args:
        count: labels that suffice for `power`; None where none of `counts` does.
        power: that was asked for.
        level: of the test.
        counts: `[C]`, numbers of labels that were looked at.
        powers: `[C]`, of the worse of the two directions: rejecting the covariate hypothesis where
            the label hypothesis is true, and the other way round.
        reason: why there is no `count`; "" where there is one.
    """

    count: int | None
    power: float
    level: float
    counts: np.ndarray
    powers: np.ndarray
    reason: str = ""


def labels_needed(
    probabilities: Any,
    adjusted: Any,
    *,
    power: float = POWER,
    level: float = LEVEL,
    most: int = 1000,
    simulations: int = 2000,
    seed: int = 0,
) -> LabelsNeeded:
    """How many labels of random target examples `posterior_ratio_tests` needs.

    Ask before paying for labels. The answer holds as far as the model's posteriors do: examples
    are drawn from those given, and labels from their posteriors under either hypothesis. It is no
    number for detecting concept shift, whose size nobody knows beforehand.

    Args:
        probabilities: `[m, K]`, calibrated posteriors of unlabeled target examples.
        adjusted: `[m, K]`, the same, corrected to the target's prevalence.
        power: in either direction.
        level: of the tests.
        most: labels that are looked at; examples are drawn with replacement.
        simulations: sequences of examples and labels under either hypothesis.
        seed: for these.

    Raises:
        ValueError: what are no probabilities, or of other examples; a power or level that is no
            share.

    >>> raw, adjusted = np.tile([0.5, 0.5], (40, 1)), np.tile([0.9, 0.1], (40, 1))
    >>> labels_needed(raw, adjusted, most=50).count in range(9, 15)
    True
    >>> labels_needed(raw, raw).reason
    'both hypotheses have the same posteriors: no label tells them apart'
    """
    raw = as_probabilities(probabilities, "probabilities")
    changed = as_probabilities(adjusted, "adjusted probabilities")
    classes = same_width(raw, "probabilities", changed, "adjusted probabilities")
    if len(raw) != len(changed):
        raise ValueError(
            f"{len(raw)} rows of probabilities and {len(changed)} of adjusted probabilities; both "
            "are of the same examples"
        )
    for name, value in (("power", power), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name}={value!r}: a share between 0 and 1")
    enough_repetitions(simulations, "simulations")
    if most < 1:
        raise ValueError(f"most={most}: at least one label")
    if np.allclose(raw, changed, rtol=0, atol=1e-9):
        reason = "both hypotheses have the same posteriors: no label tells them apart"
        return LabelsNeeded(None, power, level, np.arange(0), np.zeros(0), reason)

    ratios = np.log(np.maximum(changed, _SMALLEST)) - np.log(np.maximum(raw, _SMALLEST))
    rng = np.random.default_rng(seed)
    counts = np.arange(1, most + 1)
    # Sums over the first l labels of a sequence, for all l at once.
    sums = {"raw": np.empty((simulations, most)), "adjusted": np.empty((simulations, most))}
    chunk = max(1, _CHUNK // (most * classes))
    for start in range(0, simulations, chunk):
        part = slice(start, min(start + chunk, simulations))
        for posteriors, name in ((raw, "raw"), (changed, "adjusted")):
            rows = rng.integers(len(raw), size=(part.stop - start, most))
            cumulated = np.cumsum(posteriors, axis=1)[rows]
            uniform = rng.random(rows.shape)[:, :, None] * cumulated[:, :, -1:]
            drawn = (uniform >= cumulated).sum(2)
            sums[name][part] = np.cumsum(ratios[rows, drawn], axis=1)
    powers = np.minimum(
        _power(sums["raw"], sums["adjusted"], level), _power(-sums["adjusted"], -sums["raw"], level)
    )
    # Power wobbles where labels are few and sums take few values: enough is where it stays.
    enough = np.flip(np.minimum.accumulate(np.flip(powers))) >= power
    if not enough.any():
        reason = f"{most} labels have a power of {powers[-1]:.2f}"
        return LabelsNeeded(None, power, level, counts, powers, reason)
    return LabelsNeeded(int(counts[np.argmax(enough)]), power, level, counts, powers)


def _power(null: np.ndarray, alternative: np.ndarray, level: float) -> np.ndarray:
    """Share of the alternative that is above all but `level` of the null, for each column."""
    ordered = np.sort(null, axis=0)
    critical = ordered[min(len(null) - 1, int(np.ceil((1 - level) * len(null))) - 1)]
    return (alternative > critical + 1e-9).mean(0)
