"""Weight averaging: averages, WiSE-FT, model soups.

Averaged weights need new BatchNorm statistics: those of the inputs do not fit them. Give
``statistics`` (``ft.training.recalibrate`` on training images) for networks with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.paths import Variables, flatten, listing

__all__ = ["Soup", "average", "greedy_soup", "interpolate"]


Statistics = Callable[[Variables], Any]
"""``variables -> batch_stats``, measured on images."""


def average(
    several: Sequence[Variables],
    weights: Sequence[float] | None = None,
    *,
    statistics: Statistics | None = None,
) -> Variables:
    """Weight average: the weighted mean of every leaf.

    Args:
        several: variables of one architecture, one or more.
        weights: one per network, with a sum other than 0; default: equal. They are divided by their
            sum.
        statistics: measures the BatchNorm statistics of the average; without it they are averaged
            too.

    Returns:
        Variables with the dtypes of the first network. A leaf that is equal in all is the same in
        the average, bit for bit; integer leaves must be.

    Raises:
        ValueError: nothing to average, other leaves or shapes, invalid weights.

    References:
        P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
        2018.

    >>> average([{"params": {"w": np.ones(1)}}, {"params": {"w": np.full(1, 3.0)}}])
    {'params': {'w': array([2.])}}
    """
    if not several:
        raise ValueError("an average must have at least one network, got none")
    fractions = _fractions(len(several), weights)
    _check_alike(several)

    def mean(*leaves: Any) -> Any:
        first, *others = (np.asarray(leaf) for leaf in leaves)
        if all(np.array_equal(first, other, equal_nan=True) for other in others):
            return leaves[0]
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            raise ValueError(
                f"integer leaves must be equal, got different ones of dtype {first.dtype}"
            )
        # In float64, so that the order of the networks does not matter.
        total = sum(
            fraction * leaf.astype(np.float64)
            for fraction, leaf in zip(fractions, (first, *others), strict=True)
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
    """WiSE-FT: linear interpolation between two networks.

    Use it if a fine-tuned network has lost the robustness of the pre-trained one. Both need the
    same head: first fit it on the frozen network (``feature_extraction``), and use that as the
    pre-trained network.

    Args:
        pretrained: variables at ``amount`` 0.
        fine_tuned: variables at ``amount`` 1.
        amount: position between both, 0 to 1.
        statistics: as for ``average``.

    Raises:
        ValueError: an amount out of range, networks of another shape.

    References:
        M. Wortsman et al., "Robust Fine-Tuning of Zero-Shot Models", 2022.
    """
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be 0 to 1, got {amount!r}")
    return average([pretrained, fine_tuned], [1 - amount, amount], statistics=statistics)


@dataclass(frozen=True)
class Soup:
    """Result of ``greedy_soup``.

    Args:
        variables: the average.
        score: of the average.
        ingredients: indices of the averaged networks, best first.
        scores: of each network alone, in the given order.
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
    """Greedy model soup: averages the networks that do not lower the score, best first.

    Use it on the runs of a hyperparameter search that started from the same pre-trained weights. It
    is not for networks that started from different weights: they are in different basins, and
    their average is useless. It takes twice as many evaluations as networks; the result costs no
    more than one network.

    Args:
        several: variables of one architecture.
        score: higher is better; on validation data, because test data would be used for selection.
        statistics: as for ``average``; applied to averages of at least two networks.

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
        raise ValueError("an average must have at least one network, got none")
    _check_alike(several)
    scores = [float(score(variables)) for variables in several]
    if invalid := [n for n, value in enumerate(scores) if not np.isfinite(value)]:
        raise ValueError(
            f"scores must be finite; that of network {listing(map(str, invalid))} is not"
        )
    # Equal scores keep their order.
    first, *others = sorted(range(len(several)), key=lambda n: (-scores[n], n))
    best = Soup(several[first], scores[first], (first,), tuple(scores))
    for candidate in others:
        ingredients = (*best.ingredients, candidate)
        mixed = average([several[n] for n in ingredients], statistics=statistics)
        value = float(score(mixed))
        if value >= best.score:
            best = Soup(mixed, value, ingredients, tuple(scores))
    return best


def _fractions(count: int, weights: Sequence[float] | None) -> np.ndarray:
    given = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (count,) or not np.isfinite(given).all() or given.sum() == 0:
        raise ValueError(
            f"weights must be {count} finite numbers, one per network, with a sum other than 0, "
            f"got {given.tolist()}"
        )
    fractions: np.ndarray = given / given.sum()
    return fractions


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
        raise ValueError(
            "averaged networks must have the same leaves and shapes: " + "; ".join(problems)
        )
