"""Distances between two samples of features: Frechet, sliced Wasserstein, class-wise.

Each is reported with its permutation null, because distances of finite samples are above 0 even
for one distribution. Use them to see how far a target domain is from a source.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linprog

from flaxtransfer.shift.checks import as_labels, duplicate_row_notes
from flaxtransfer.shift.statistics import (
    Distance,
    bit_generator,
    check_two_samples,
    null_summary,
    random_permutations,
)
from flaxtransfer.shift.two_sample import ledoit_wolf as _ledoit_wolf

__all__ = [
    "bures_wasserstein",
    "class_distance",
    "frechet_distance",
    "gaussian_factor",
    "pooled_coordinates",
    "random_directions",
    "sliced_wasserstein",
    "squared_distance",
    "wasserstein_on_lines",
]


def frechet_distance(
    source: Any, target: Any, *, shrinkage: bool = False, permutations: int = 199, seed: int = 0
) -> Distance:
    """Frechet distance: squared distance of Gaussians with the moments of two samples.

    Use it to compare with published values ("FID"), or for one number that covers means and
    covariances. Read ``excess``, not ``value``: two samples of 100 examples of one distribution
    with 512 features of variance 1 have a distance of about 660. It ignores everything beyond
    second moments, and depends on the scale of each feature.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        shrinkage: Ledoit-Wolf shrinkage of each covariance: less noise, and somewhat less power.
            Otherwise covariances are those of ``numpy.cov``.
        permutations: random permutations of the pooled examples.
        seed: of the permutations.

    Returns:
        A ``Distance`` in squared units of the features. Each permutation costs a singular value
        decomposition of a matrix with no more rows and columns than n, m and D: 200 against 200
        examples of 2048 features take a second or two, 1000 against 1000 of 512 half a minute.
        With shrinkage, D counts as n + m where it is more: ten times as long for the former.

    Raises:
        ValueError: see ``two_samples``; fewer than 19 permutations.

    >>> one, other = np.arange(12.0).reshape(6, 2), np.arange(12.0).reshape(6, 2) + [3, 4]
    >>> round(frechet_distance(one, other).value, 9)
    25.0

    References:
        M. Heusel, H. Ramsauer, T. Unterthiner, B. Nessler, S. Hochreiter, "GANs trained by a two
        time-scale update rule converge to a local Nash equilibrium", 2017.
        M. J. Chong, D. Forsyth, "Effectively unbiased FID and Inception Score and where to find
        them", 2020, on the bias.
    """
    source, target = check_two_samples(source, target)
    width, split = source.shape[1], len(source)
    both = np.concatenate([source, target])
    pooled = pooled_coordinates(both)

    def distance(order: np.ndarray) -> float:
        first, floor_a = gaussian_factor(pooled[order[:split]], width, shrinkage)
        second, floor_b = gaussian_factor(pooled[order[split:]], width, shrinkage)
        gap = pooled[order[:split]].mean(0) - pooled[order[split:]].mean(0)
        # Outside the span of the pooled sample both are spherical, and commute.
        outside = (width - pooled.shape[1]) * (floor_a - floor_b) ** 2
        return squared_distance(gap, first, second) + float(outside)

    value = distance(np.arange(len(pooled)))
    null = np.array(
        [distance(order) for order in random_permutations(len(pooled), permutations, seed)]
    )
    notes = duplicate_row_notes(source, target)
    fewest = min(split, len(target))
    if np.ptp(both, axis=0).any() and fewest <= width and not shrinkage:
        notes += (
            f"{fewest} examples of {width} features: their covariance does not have full rank",
        )
    return Distance(
        "Frechet",
        counts=(len(source), len(target)),
        unit="squared units of the features",
        notes=notes,
        **null_summary(value, null),
    )


def sliced_wasserstein(
    source: Any, target: Any, *, projections: int = 128, permutations: int = 199, seed: int = 0
) -> Distance:
    """Sliced Wasserstein distance: root mean square of Wasserstein-2 along random lines.

    Use it where distributions may differ in shape and not only in moments: it has no bandwidth and
    no matrix to invert. A change of one feature among a thousand is diluted; ``proxy_a_distance``
    detects it earlier.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        projections: number of lines; the same for the value and its null.
        permutations: random permutations of the pooled examples.
        seed: of lines and permutations.

    Returns:
        A ``Distance`` in units of the features, as they are scaled.

    Raises:
        ValueError: see ``two_samples``; fewer than 19 permutations; no projection.

    >>> one, other = np.arange(6.0)[:, None], np.arange(6.0)[:, None] + 2
    >>> round(sliced_wasserstein(one, other).value, 9)
    2.0

    References:
        N. Bonneel, J. Rabin, G. Peyre, H. Pfister, "Sliced and Radon Wasserstein barycenters of
        measures", 2015.
    """
    source, target = check_two_samples(source, target)
    directions = random_directions(source.shape[1], projections, seed)
    pooled, split = np.concatenate([source, target]), len(source)
    along = (pooled - pooled.mean(0)) @ directions
    # Sorted once: any subset of sorted numbers is sorted.
    ranks = np.argsort(along, axis=0, kind="stable").T
    along = np.take_along_axis(along.T, ranks, axis=1)
    grid = _grid(split, len(pooled) - split)

    def distance(order: np.ndarray) -> float:
        first = np.zeros(len(pooled), bool)
        first[order[:split]] = True
        chosen = first[ranks]
        return _rms_wasserstein(
            along[chosen].reshape(projections, -1), along[~chosen].reshape(projections, -1), grid
        )

    value = distance(np.arange(len(pooled)))
    null = np.array(
        [distance(order) for order in random_permutations(len(pooled), permutations, seed)]
    )
    return Distance(
        "sliced Wasserstein-2",
        counts=(len(source), len(target)),
        unit="units of the features",
        notes=duplicate_row_notes(source, target),
        **null_summary(value, null),
    )


def class_distance(
    source: Any,
    source_labels: Any,
    target: Any,
    target_labels: Any,
    *,
    permutations: int = 99,
    seed: int = 0,
) -> Distance:
    """Class-wise distance: optimal transport between the classes of two labeled data sets.

    Each class is a Gaussian; the cost between two classes is their squared Frechet distance, and
    the class shares are the marginals. Use it to choose among source data sets for a labeled
    target with other classes: they are matched by their features, not by number. The same features
    with other classes differ here, but not for ``frechet_distance``. Classes are not Gaussian, and
    the covariance of a small class is poor; the null has the same errors, so read ``excess``. The
    p-value tests whether labeled examples are exchangeable, which assumes that a number means the
    same class in both domains; it is too large if shares were balanced by design.

    Args:
        source: features ``[n, D]``.
        source_labels: ``[n]``, class numbers.
        target: features ``[m, D]``.
        target_labels: ``[m]``, class numbers of its own.
        permutations: random permutations of the pooled examples, each with its label.
        seed: of the permutations.

    Returns:
        A ``Distance`` in squared units of the features. Each permutation costs one singular value
        decomposition per pair of classes.

    Raises:
        ValueError: see ``two_samples``; labels that are not class numbers, or of another length.

    >>> features = [[0.0], [0.0], [5.0], [5.0]]
    >>> round(class_distance(features, [0, 0, 1, 1], features, [8, 8, 3, 3]).value, 9)
    0.0
    >>> round(class_distance(features, [0, 0, 1, 1], features, [0, 1, 1, 0]).value, 9)
    18.75

    References:
        D. Alvarez-Melis, N. Fusi, "Geometric dataset distances via optimal transport", 2020.
        J. Delon, A. Desolneux, "A Wasserstein-type distance in the space of Gaussian mixture
        models", 2020.
    """
    source, target = check_two_samples(source, target)
    both = np.concatenate([source, target])
    pooled, split, width = pooled_coordinates(both), len(source), source.shape[1]
    found = [
        as_labels(labels, f"{name} labels", count=count, classes=_MAX_LABEL)
        for labels, name, count in (
            (source_labels, "source", split),
            (target_labels, "target", len(target)),
        )
    ]
    classes = np.concatenate(found)

    def distance(order: np.ndarray) -> float:
        first = _mixture(pooled[order[:split]], classes[order[:split]], width)
        second = _mixture(pooled[order[split:]], classes[order[split:]], width)
        costs = np.array(
            [
                [squared_distance(here - there, one, other) for there, other, _ in second]
                for here, one, _ in first
            ]
        )
        return _transport_cost(
            costs, [share for *_, share in first], [share for *_, share in second]
        )

    value = distance(np.arange(len(pooled)))
    null = np.array(
        [distance(order) for order in random_permutations(len(pooled), permutations, seed)]
    )
    notes = duplicate_row_notes(source, target)
    if set(found[0].tolist()) != set(found[1].tolist()):
        notes += ("the domains have different classes: the null has those of both in each",)
    single = sum(int((np.unique(own, return_counts=True)[1] == 1).sum()) for own in found)
    if single:
        notes += (f"{single} classes have one example, and no covariance",)
    return Distance(
        "class distance",
        counts=(split, len(target)),
        unit="squared units of the features",
        notes=notes,
        **null_summary(value, null),
    )


def bures_wasserstein(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """Bures-Wasserstein distance: the exact Wasserstein-2 distance between two Gaussians.

    Its square is the "Frechet distance" of two means and covariances. Use it for known moments; for
    samples see ``frechet_distance``.

    Args:
        mean_a: ``[D]``.
        cov_a: ``[D, D]``, symmetric, no negative eigenvalues; need not have full rank.
        mean_b: ``[D]``.
        cov_b: ``[D, D]``.

    Returns:
        The distance, in units of the features.

    Raises:
        ValueError: other shapes; NaN; invalid covariances.

    >>> round(bures_wasserstein([0, 0], [[1, 0], [0, 4]], [3, 0], [[1, 0], [0, 4]]), 9)
    3.0

    References:
        D. C. Dowson, B. V. Landau, "The Frechet distance between multivariate normal
        distributions", 1982.
    """
    first, second = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"means must both have shape [D], got {first.shape} and {second.shape}")
    root_a = _root(cov_a, "cov_a", len(first))
    root_b = _root(cov_b, "cov_b", len(first))
    if not np.isfinite(first - second).all():
        raise ValueError("means must be finite")
    return float(np.sqrt(squared_distance(first - second, root_a, root_b)))


def wasserstein_on_lines(source: Any, target: Any, directions: Any) -> float:
    """Root mean square of the exact Wasserstein-2 distances along given lines, without a null.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        directions: ``[D, P]``, columns of length 1.

    >>> wasserstein_on_lines([[0.0]] * 4, [[0.0], [0.0], [2.0], [2.0], [1.0]], [[1.0]]) ** 2
    1.8
    """
    source, target = check_two_samples(source, target)
    lines = np.asarray(directions, np.float64)
    if lines.ndim != 2 or lines.shape[0] != source.shape[1] or not lines.shape[1]:
        raise ValueError(
            f"directions must have shape [{source.shape[1]}, projections], got {lines.shape}"
        )
    first, second = np.sort((source @ lines).T, axis=1), np.sort((target @ lines).T, axis=1)
    return _rms_wasserstein(first, second, _grid(len(source), len(target)))


_SYMMETRIC = 1e-8
_MAX_LABEL = 2**31


def pooled_coordinates(pooled: np.ndarray) -> np.ndarray:
    """Centered rows in coordinates of their span: ``[n, min(n, D)]``.

    Distances and angles do not change.

    >>> pooled_coordinates(np.array([[0.0, 3.0, 4.0], [0.0, 0.0, 0.0]])).shape
    (2, 2)
    """
    centered: np.ndarray = pooled - pooled.mean(0)
    if centered.shape[0] >= centered.shape[1]:
        return centered
    return _factor(centered @ centered.T).T


def gaussian_factor(rows: np.ndarray, width: int, shrink: bool) -> tuple[np.ndarray, float]:
    """F with F.T @ F the covariance, and the standard deviation outside the span of the columns.

    For a single row, F is 0.
    """
    centered = rows - rows.mean(0)
    if not shrink:
        return _shorten(centered / np.sqrt(max(1, len(rows) - 1))), 0.0
    intensity, variance = _ledoit_wolf(centered, width)
    floor = float(np.sqrt(intensity * variance))
    scaled = centered * np.sqrt((1 - intensity) / len(rows))
    return _shorten(np.concatenate([scaled, floor * np.eye(rows.shape[1])])), floor


def squared_distance(gap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """|gap|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2, for A and B given as F.T @ F."""
    # The trace of the root is the sum of the singular values of the product of the factors: no
    # root is taken of an eigenvalue that is rounding, and with few rows the product is small.
    overlap = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    traces = (first**2).sum() + (second**2).sum()
    return max(0.0, float(gap @ gap + traces - 2 * overlap))


def _shorten(factor: np.ndarray) -> np.ndarray:
    """A factor with at most as many rows as columns and the same F.T @ F."""
    rows, columns = factor.shape
    return factor if rows <= columns else np.asarray(np.linalg.qr(factor, mode="r"))


def _root(cov: Any, name: str, width: int) -> np.ndarray:
    found = np.asarray(cov, np.float64)
    if found.shape != (width, width):
        raise ValueError(
            f"{name} must have shape ({width}, {width}), as the means, got {found.shape}"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"{name} must be finite")
    scale = np.abs(found).max(initial=0.0)
    if np.abs(found - found.T).max(initial=0.0) > _SYMMETRIC * scale:
        raise ValueError(f"{name} must be symmetric")
    smallest = np.linalg.eigvalsh((found + found.T) / 2).min(initial=0.0)
    if smallest < -_SYMMETRIC * scale:
        raise ValueError(f"{name} must have no negative eigenvalues, got {smallest:.3g}")
    return _factor((found + found.T) / 2)


def _factor(product: np.ndarray) -> np.ndarray:
    """F with F.T @ F the product, whose negative eigenvalues are rounding."""
    variances, vectors = np.linalg.eigh(product)
    # A rounding error of 1e-16 would become 1e-8 after the root.
    rounding = len(product) * np.finfo(np.float64).eps * variances.max(initial=0.0)
    scales = np.sqrt(np.where(variances > rounding, variances, 0))
    factor: np.ndarray = scales[:, None] * vectors.T
    return factor


def _mixture(
    rows: np.ndarray, classes: np.ndarray, width: int
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Mean, factor of the covariance, and share of each class."""
    parts = [rows[classes == name] for name in np.unique(classes)]
    return [
        (own.mean(0), gaussian_factor(own, width, False)[0], len(own) / len(rows)) for own in parts
    ]


def _transport_cost(costs: np.ndarray, given: list[float], required: list[float]) -> float:
    """Cost of the optimal transport between the given and the required shares."""
    here, there = costs.shape
    sums = np.concatenate(
        [
            np.kron(np.eye(here), np.ones(there)),
            np.kron(np.ones(here), np.eye(there)),
        ]
    )
    scale = max(float(costs.max()), np.finfo(np.float64).tiny)
    # The last constraint follows from the others; with rounding it could contradict them.
    plan = linprog(
        (costs / scale).ravel(),
        A_eq=sums[:-1],
        b_eq=np.concatenate([given, required])[:-1],
        method="highs",
    )
    if plan.status != 0:
        raise RuntimeError(f"the transport of {here} to {there} classes failed: {plan.message}")
    return float(plan.fun) * scale


def random_directions(features: int, projections: int, seed: int) -> np.ndarray:
    """Uniform random unit vectors, ``[features, projections]``.

    >>> random_directions(1, 3, seed=0).tolist()
    [[1.0, 1.0, -1.0]]
    """
    if projections < 1:
        raise ValueError(f"projections must be >= 1 (better 50 or more), got {projections}")
    found = (
        np.random.Generator(bit_generator(seed, "lines")).standard_normal((projections, features)).T
    )
    directions: np.ndarray = found / np.linalg.norm(found, axis=0)
    return directions


def _grid(first: int, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Intervals on which both quantile functions are constant: widths, and ranks per sample."""
    # Steps of 1 / first and 1 / second, in units of 1 / (first * second): integers, so that equal
    # steps are exactly equal.
    ends = np.union1d(
        np.arange(1, first + 1, dtype=np.int64) * second,
        np.arange(1, second + 1, dtype=np.int64) * first,
    )
    widths = np.diff(ends, prepend=0) / (first * second)
    return widths, (ends - 1) // second, (ends - 1) // first


def _rms_wasserstein(
    first: np.ndarray, second: np.ndarray, grid: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> float:
    """Root mean square over lines of the distance of sorted projections ``[P, n]``, ``[P, m]``."""
    widths, here, there = grid
    return float(np.sqrt((((first[:, here] - second[:, there]) ** 2) @ widths).mean()))
