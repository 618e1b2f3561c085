"""Labels as posteriors would have them: the null distribution of every test on a few labels."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.resampled_likelihood import maximise_resampled

__all__ = ["label_draws", "reestimated_posteriors"]


def label_draws(
    posteriors: np.ndarray, simulations: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """For each example, classes that it is drawn to be in each simulation.

    Args:
        posteriors: `[l, K]`.
        simulations: how many.
        rng: of the draws.

    Yields:
        `[simulations]` class numbers, l times.

    >>> next(label_draws(np.array([[0.0, 1.0, 0.0]]), 3, np.random.default_rng(0))).tolist()
    [1, 1, 1]
    """
    cumulated = np.cumsum(posteriors, axis=1)
    for chances in cumulated / cumulated[:, -1:]:
        # From the right: a class of probability 0 is never the first to exceed.
        yield np.searchsorted(chances, rng.random(simulations), side="right")


def reestimated_posteriors(
    probabilities: Any,
    target_probabilities: Any,
    source: Calibration,
    *,
    draws: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """Posteriors corrected for prevalence, as they could have come out from other examples.

    A corrected posterior is as uncertain as the prevalence that it was corrected by. Each draw
    estimates prior and prevalence from source and target examples drawn with replacement, and
    corrects by these. The tests on labels take the result as `estimates`.

    Args:
        probabilities: `[l, K]`, calibrated, of the labelled examples.
        target_probabilities: `[m, K]`, calibrated, of all target examples.
        source: calibrated probabilities of held-out source examples.
        draws: S.
        seed: for the draws.

    Returns:
        `[S, l, K]`.

    Raises:
        ValueError: what are no probabilities, or of other classes.

    >>> from flaxtransfer.shift.calibration import Calibration
    >>> rows = np.tile([[0.8, 0.2], [0.2, 0.8]], (50, 1))
    >>> source = Calibration("none", np.ones(2), np.zeros(2), rows, np.tile([0, 1], 50))
    >>> found = reestimated_posteriors(rows[:5], rows, source)
    >>> found.shape, round(float(found[:, 0, 0].mean()), 1)
    ((200, 5, 2), 0.8)
    """
    labelled = as_probabilities(probabilities, "probabilities")
    target = as_probabilities(target_probabilities, "target probabilities")
    validation = as_probabilities(source.probabilities, "source probabilities")
    same_width(labelled, "probabilities", target, "target probabilities")
    same_width(validation, "source probabilities", target, "target probabilities")
    if draws < 1:
        raise ValueError(f"draws={draws}: at least 1")
    rng = np.random.default_rng(seed)
    sources = rng.integers(len(validation), size=(draws, len(validation)))
    targets = rng.integers(len(target), size=(draws, len(target)))
    priors = np.stack([validation[rows].mean(0) for rows in sources])
    shares, _ = maximise_resampled(target, targets, priors)
    ratios = np.divide(shares, priors, out=np.zeros_like(shares), where=priors > 0)
    corrected = labelled * ratios[:, None]
    sums = corrected.sum(2, keepdims=True)
    # Where the only classes that an example can be of have no share, it stays as it was.
    return np.where(sums > 0, corrected / np.where(sums > 0, sums, 1), labelled)
