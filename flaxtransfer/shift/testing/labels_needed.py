"""How many target labels would tell label shift from covariate shift?"""

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.hypotheses import LEVEL, POWER, enough_repetitions

__all__ = ["LabelsNeeded", "labels_needed"]

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
        probabilities: `[m, K]`, calibrated posteriors of unlabelled target examples.
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
