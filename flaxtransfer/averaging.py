"""One network out of several of the same shape: averages of their weights.

An average of weights has never seen an image: its BatchNorm statistics are those of none of its
inputs. Give ``statistics`` (``ft.training.recalibrate`` with the images at hand) wherever there is
BatchNorm with statistics of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.paths import flatten, listing
from flaxtransfer.types import Variables

__all__ = ["Soup", "average", "greedy_soup", "interpolate"]


Statistics = Callable[[Variables], Any]
"""``variables -> batch_stats``, measured on images."""


def average(
    several: Sequence[Variables],
    weights: Sequence[float] | None = None,
    *,
    statistics: Statistics | None = None,
) -> Variables:
    """The weighted mean of every leaf.

    Args:
      several: variables of one architecture, one or more.
      weights: one each, of which the sum is not 0; equal by default. They are divided by their sum.
      statistics: measures the BatchNorm statistics of the average; without it they are averaged
        too.

    Returns:
      Variables of the first one's dtypes. A leaf that is the same in all is the same in the
      average, bit for bit; leaves of integers have to be.

    Raises:
      ValueError: nothing to average, other leaves or shapes, weights that are none.

    References:
      P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.

    >>> average([{"params": {"w": np.ones(1)}}, {"params": {"w": np.full(1, 3.0)}}])
    {'params': {'w': array([2.])}}
    """
    if not several:
        raise ValueError("there is nothing to average: give at least one network")
    shares = _shares(len(several), weights)
    _check_alike(several)

    def mean(*leaves: Any) -> Any:
        first, *others = (np.asarray(leaf) for leaf in leaves)
        if all(np.array_equal(first, other, equal_nan=True) for other in others):
            return leaves[0]
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            raise ValueError(f"leaves of {first.dtype} differ, and there is no mean of them")
        # In float64, so that the order of the networks is of no account.
        total = sum(
            share * leaf.astype(np.float64)
            for share, leaf in zip(shares, (first, *others), strict=True)
        )
        return np.asarray(total).astype(first.dtype)

    mixed = jax.tree.map(mean, *several)
    return mixed if statistics is None else {**mixed, "batch_stats": statistics(mixed)}


def interpolate(
    pretrained: Variables,
    fine_tuned: Variables,
    amount: float = 0.5,
    *,
    statistics: Statistics | None = None,
) -> Variables:
    """The point between two networks: WiSE-FT.

    Use it where a fine-tuned network has lost robustness that the pre-trained one had. Both need
    the same head: fit it first on the frozen network (``feature_extraction``), and call that one
    the pre-trained network.

    Args:
      pretrained: variables at ``amount`` 0.
      fine_tuned: variables at ``amount`` 1.
      amount: how far along, 0 to 1.
      statistics: as for ``average``.

    Raises:
      ValueError: an amount out of range, networks of another shape.

    References:
      M. Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", 2022.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is a share of the way, 0 to 1, not {amount!r}")
    return average([pretrained, fine_tuned], [1 - amount, amount], statistics=statistics)


@dataclass(frozen=True)
class Soup:
    """What ``greedy_soup`` made.

    Args:
      variables: the average.
      score: of the average.
      ingredients: which networks are in it, best first.
      scores: of each network alone, in the order given.
    """

    variables: Variables
    score: float
    ingredients: tuple[int, ...]
    scores: tuple[float, ...]


def greedy_soup(
    several: Sequence[Variables],
    score: Callable[[Variables], float],
    *,
    statistics: Statistics | None = None,
) -> Soup:
    """Averages the networks that do not make the average worse, the best first.

    Use it on the runs of a search, which all started from the same pre-trained weights: networks
    that started elsewhere are not in the same basin, and their average is none of them. It needs as
    many evaluations as twice the networks, and costs no more than one network afterwards.

    Args:
      several: variables of one architecture.
      score: higher is better, on validation data; test data would choose the soup.
      statistics: as for ``average``; applied to averages of two and more.

    Raises:
      ValueError: nothing to average, other leaves or shapes, a score that is not finite.

    References:
      M. Wortsman et al., "Model Soups: Averaging Weights of Multiple Fine-Tuned Models Improves
      Accuracy without Increasing Inference Time", 2022.

    >>> soup = greedy_soup(
    ...     [{"params": {"w": np.full(1, w)}} for w in (0.0, 3.0, 9.0)],
    ...     lambda variables: -abs(variables["params"]["w"][0] - 1.0),
    ... )
    >>> soup.ingredients, soup.variables["params"]["w"].tolist()
    ((0, 1), [1.5])
    """
    if not several:
        raise ValueError("there is nothing to average: give at least one network")
    _check_alike(several)
    scores = [float(score(variables)) for variables in several]
    if unfit := [n for n, value in enumerate(scores) if not np.isfinite(value)]:
        raise ValueError(f"the score of network {listing(map(str, unfit))} is not finite")
    # Of equals the earlier one comes first.
    first, *others = sorted(range(len(several)), key=lambda n: (-scores[n], n))
    best = Soup(several[first], scores[first], (first,), tuple(scores))
    for candidate in others:
        ingredients = (*best.ingredients, candidate)
        mixed = average([several[n] for n in ingredients], statistics=statistics)
        value = float(score(mixed))
        if value >= best.score:
            best = Soup(mixed, value, ingredients, tuple(scores))
    return best


def _shares(count: int, weights: Sequence[float] | None) -> np.ndarray:
    given = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (count,) or not np.isfinite(given).all() or given.sum() == 0:
        raise ValueError(
            f"weights are {count} finite numbers whose sum is not 0, one for each network; "
            f"not {given.tolist()}"
        )
    return given / given.sum()


def _check_alike(several: Sequence[Variables]) -> None:
    first = {path: np.shape(leaf) for path, leaf in flatten(several[0]).items()}
    problems = []
    for number, other in enumerate(several[1:], 1):
        shapes = {path: np.shape(leaf) for path, leaf in flatten(other).items()}
        differing = [
            f"{path} ({first.get(path, 'absent')} and {shapes.get(path, 'absent')})"
            for path in dict.fromkeys([*first, *shapes])
            if first.get(path) != shapes.get(path)
        ]
        if differing:
            problems.append(f"network {number} differs from network 0 in {listing(differing)}")
    if problems:
        raise ValueError("networks of another shape cannot be averaged: " + "; ".join(problems))
