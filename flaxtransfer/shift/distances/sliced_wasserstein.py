"""The sliced Wasserstein distance: samples compared line by line, by their quantiles."""

from typing import Any

import numpy as np

from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.nulls import Distance, orders, stream, summary, two_samples

__all__ = ["random_directions", "sliced_wasserstein", "wasserstein_on_lines"]


def sliced_wasserstein(
    source: Any, target: Any, *, projections: int = 128, permutations: int = 199, seed: int = 0
) -> Distance:
    """The root mean square, over random lines, of the Wasserstein-2 distance along each.

    You want it where shapes may differ and not only moments: it sees all of a distribution, with no
    bandwidth to choose and no matrix to invert. One feature that moved among a thousand that did
    not is diluted; `proxy_a_distance` finds that sooner.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        projections: lines; the same for the value and its null.
        permutations: random deals of the pooled examples.
        seed: of lines and deals.

    Returns:
        A `Distance` in units of the features, as they are scaled.

    Raises:
        ValueError: see `two_samples`; fewer than 19 permutations; no projection.

    >>> one, other = np.arange(6.0)[:, None], np.arange(6.0)[:, None] + 2
    >>> round(sliced_wasserstein(one, other).value, 9)
    2.0

    References:
        N. Bonneel, J. Rabin, G. Peyre, H. Pfister, "Sliced and Radon Wasserstein barycenters of
        measures", 2015.
    """
    source, target = two_samples(source, target)
    directions = random_directions(source.shape[1], projections, seed)
    pooled, split = np.concatenate([source, target]), len(source)
    along = (pooled - pooled.mean(0)) @ directions
    # Sorted once: any part of sorted numbers is sorted.
    ranks = np.argsort(along, axis=0, kind="stable").T
    along = np.take_along_axis(along.T, ranks, axis=1)
    grid = _grid(split, len(pooled) - split)

    def distance(order: np.ndarray) -> float:
        first = np.zeros(len(pooled), bool)
        first[order[:split]] = True
        chosen = first[ranks]
        return _between(
            along[chosen].reshape(projections, -1), along[~chosen].reshape(projections, -1), grid
        )

    value = distance(np.arange(len(pooled)))
    null = np.array([distance(order) for order in orders(len(pooled), permutations, seed)])
    return Distance(
        "sliced Wasserstein-2", counts=(len(source), len(target)), unit="units of the features",
        notes=duplicate_notes(source, target), **summary(value, null),
    )  # fmt: skip


def wasserstein_on_lines(source: Any, target: Any, directions: Any) -> float:
    """The root mean square of exact Wasserstein-2 distances along given lines; no null.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        directions: ``[D, P]``, columns of length 1.

    >>> wasserstein_on_lines([[0.0]] * 4, [[0.0], [0.0], [2.0], [2.0], [1.0]], [[1.0]]) ** 2
    1.8
    """
    source, target = two_samples(source, target)
    lines = np.asarray(directions, np.float64)
    if lines.ndim != 2 or lines.shape[0] != source.shape[1] or not lines.shape[1]:
        raise ValueError(
            f"directions have shape {lines.shape}, wanted [{source.shape[1]}, projections]"
        )
    first, second = np.sort((source @ lines).T, axis=1), np.sort((target @ lines).T, axis=1)
    return _between(first, second, _grid(len(source), len(target)))


def random_directions(features: int, projections: int, seed: int) -> np.ndarray:
    """Directions of the unit sphere, uniformly: ``[features, projections]``.

    >>> random_directions(1, 3, seed=0).tolist()
    [[1.0, 1.0, -1.0]]
    """
    if projections < 1:
        raise ValueError(f"{projections} projections show nothing; take 50 or more")
    found = np.random.Generator(stream(seed, "lines")).standard_normal((projections, features)).T
    return found / np.linalg.norm(found, axis=0)


def _grid(first: int, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where both quantile functions are constant: the shares, and either sample's rank there."""
    # Steps of 1 / first and 1 / second, in units of 1 / (first * second): whole numbers, so that
    # steps that fall together do so exactly.
    ends = np.union1d(
        np.arange(1, first + 1, dtype=np.int64) * second,
        np.arange(1, second + 1, dtype=np.int64) * first,
    )
    shares = np.diff(ends, prepend=0) / (first * second)
    return shares, (ends - 1) // second, (ends - 1) // first


def _between(
    first: np.ndarray, second: np.ndarray, grid: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float:
    """Of sorted projections ``[P, n]`` and ``[P, m]``."""
    shares, here, there = grid
    return float(np.sqrt((((first[:, here] - second[:, there]) ** 2) @ shares).mean()))
