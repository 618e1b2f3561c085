"""A likelihood of prevalence along one direction for each share: how it falls, and how surely.

The score of a share is zero on average where the share is right. What it varies by there, and how
skewed it is, are averages too, over the examples of target and validation together, each as likely
as the share makes it: the target alone knows little of a class that it hardly shows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from flaxtransfer.shift.prevalence.likelihood import Maximum, blocks
from flaxtransfer.shift.prevalence.precision import Sample

__all__ = ["Point", "Profiles", "profiles"]

_ROWS = 20_000
"""That are looked at together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
    """The likelihood where each of `D` shares has been moved along its direction; arrays `[D]`.

    Args:
        score: slope of the target's log-likelihood.
        information: its variance.
        third: its third moment.
        fall: of the log-likelihood below its maximum.
        possible: whether the target can be seen there at all.
    """

    score: np.ndarray
    information: np.ndarray
    third: np.ndarray
    fall: np.ndarray
    possible: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """`[D]`, of the share: the inverse of the information."""
        return 1 / np.where(self.information > 0, self.information, np.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class Profiles:
    """What `profiles` has made of a sample: densities of its examples, and their growth.

    Args:
        density: `[m + n]`, of target and validation, relative to the source's.
        growth: `[m + n, D]`, of the density for a step along each direction.
        mixture: `[m + n]`, density of all examples together, per target example.
        rows: m, of the target.
        known: `[L]`, shares that labels or a prior count for.
        ways: `[L, D]`, their growth.
        counts: `[L]`.
    """

    density: np.ndarray
    growth: np.ndarray
    mixture: np.ndarray
    rows: int
    known: np.ndarray
    ways: np.ndarray
    counts: np.ndarray

    def at(self, step: np.ndarray) -> Point:
        """After a step `[D]` from the estimate, along each of the directions."""
        directions = self.growth.shape[1]
        score, information, third, fall = np.zeros((4, directions))
        possible = np.ones(directions, bool)
        for begin in range(0, len(self.density), _ROWS):
            block = slice(begin, begin + _ROWS)
            target = slice(0, max(0, self.rows - begin))
            growth, here = self.growth[block], self.density[block, None]
            there = here + step * growth
            possible &= (there[target] > 0).all(0)
            there = np.where(there > 0, there, np.inf)
            pull = growth / there
            weighted = pull * growth / self.mixture[block, None]
            score += pull[target].sum(0)
            information += weighted.sum(0)
            third += (weighted * pull).sum(0)
            fall -= np.log(there[target] / here[target]).sum(0)
        moved = self.known[:, None] + step * self.ways
        possible &= (moved > 0).all(0)
        moved = np.where(moved > 0, moved, np.inf)
        pull, counts = self.ways / moved, self.counts[:, None]
        return Point(
            score=score + (counts * pull).sum(0),
            information=information + (counts * pull**2).sum(0),
            third=third + (counts * pull**3).sum(0),
            fall=fall - (counts * np.log(moved / self.known[:, None])).sum(0),
            possible=possible,
        )


def profiles(sample: Sample, maximum: Maximum, directions: np.ndarray) -> Profiles:
    """The likelihood along `directions`, `[K, D]`."""
    q = maximum.estimate
    density, growth = _along(sample.probabilities, sample, q, directions)
    if sample.weights is not None:
        density, growth = density[sample.weights > 0], growth[sample.weights > 0]
    source, source_growth = _along(sample.source.probabilities, sample, q, directions)
    rows, seen = len(density), sample.counts > 0
    density = np.concatenate([density, source])
    return Profiles(
        density=density,
        growth=np.concatenate([growth, source_growth]),
        mixture=density + len(source) / rows,
        rows=rows,
        known=q[seen],
        ways=directions[seen],
        counts=sample.counts[seen],
    )


def _along(
    probabilities: np.ndarray, sample: Sample, q: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    ratios, slopes = q / sample.divisor, directions / sample.divisor[:, None]
    density = np.empty(len(probabilities))
    growth = np.empty((len(probabilities), directions.shape[1]))
    for part, rows in blocks(probabilities, 8):
        density[rows], growth[rows] = part @ ratios, part @ slopes
    return density, growth
