"""Posteriors that were corrected by an estimate, and how else that estimate could have come out."""

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.prevalence.resampled_likelihood import maximise_resampled

__all__ = ["EstimatedPosteriors", "corrected_posteriors"]


@dataclasses.dataclass(frozen=True, eq=False)
class EstimatedPosteriors:
    """Posteriors of labelled examples, with a bootstrap of what they were estimated from.

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
    labelled: Any,
    target_probabilities: Any,
    source: Calibration,
    *,
    draws: int = 200,
    seed: int = 0,
) -> EstimatedPosteriors:
    """Posteriors of labelled examples, corrected to the target's maximum-likelihood prevalence.

    A corrected posterior is as uncertain as the prevalence that it was corrected by, and that was
    estimated with the help of the labelled examples themselves. Each draw of the bootstrap takes
    source, labelled and unlabelled target examples with replacement, and estimates prior and
    prevalence anew.

    Args:
        labelled: `[l]`, which rows of the target are labelled.
        target_probabilities: `[m, K]`, calibrated, of all target examples.
        source: calibrated probabilities of held-out source examples.
        draws: S.
        seed: for the draws.

    Raises:
        ValueError: what are no probabilities, or of other classes; rows that the target lacks.

    >>> from flaxtransfer.shift.calibration.calibration import Calibration
    >>> rows = np.tile([[0.8, 0.2], [0.2, 0.8]], (50, 1))
    >>> source = Calibration("none", np.ones(2), np.zeros(2), rows, np.tile([0, 1], 50))
    >>> found = corrected_posteriors([0, 1, 2], rows, source)
    >>> found.posteriors.round(3).tolist(), found.estimates.shape
    ([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2]], (200, 3, 2))
    """
    target = as_probabilities(target_probabilities, "target probabilities")
    validation = as_probabilities(source.probabilities, "source probabilities")
    same_width(validation, "source probabilities", target, "target probabilities")
    chosen = np.asarray(labelled)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
        raise ValueError(
            f"labelled: numbers of target rows [l], not {chosen.dtype} of shape {chosen.shape}"
        )
    if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(target)):
        raise ValueError(
            f"labelled: rows {chosen.min()} .. {chosen.max()} of a target of {len(target)} rows"
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
    shares, _ = maximise_resampled(target, targets, priors)
    prior = validation.mean(0)
    share = maximise_resampled(target, everyone, prior)[0]
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
