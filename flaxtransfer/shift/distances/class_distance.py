"""How far two labelled data sets lie apart: their classes, carried onto each other."""

from typing import Any

import numpy as np
from scipy.optimize import linprog

from flaxtransfer.shift.checks import as_labels
from flaxtransfer.shift.distances.frechet import (
    gaussian_factor,
    pooled_coordinates,
    squared_distance,
)
from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.nulls import Distance, orders, summary, two_samples

__all__ = ["class_distance"]

_MOST_CLASSES = 2**31


def class_distance(
    source: Any, source_labels: Any, target: Any, target_labels: Any, *,
    permutations: int = 99, seed: int = 0,
) -> Distance:  # fmt: skip
    """Squared cost of carrying the source's classes onto the target's, each a Gaussian.

    A class costs its squared Frechet distance to the classes it goes to; shares of classes have to
    be met. You want it to choose among source data sets for a labelled target, whose classes may be
    others: they are matched by where they lie, and not by number. The same features with other
    classes are apart here, and are not for `frechet_distance`. Classes are no Gaussians, and a
    class of few examples has a poor covariance: the null has the same, so read `excess`. Its
    p-value asks whether labelled examples are exchangeable, which supposes that a number stands for
    one class in both domains; where shares were balanced by design it is too large.

    Args:
        source: features ``[n, D]``.
        source_labels: ``[n]``, class numbers.
        target: features ``[m, D]``.
        target_labels: ``[m]``, class numbers of its own.
        permutations: random deals of the pooled examples, each with its label, to the domains.
        seed: of the deals.

    Returns:
        A `Distance` in squared units of the features. A deal costs as many singular value
        decompositions as there are pairs of classes.

    Raises:
        ValueError: see `two_samples`; labels that are no class numbers or of another count.

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
    source, target = two_samples(source, target)
    both = np.concatenate([source, target])
    pooled, split, width = pooled_coordinates(both), len(source), source.shape[1]
    found = [
        as_labels(labels, f"{name} labels", count=count, classes=_MOST_CLASSES)
        for labels, name, count in (
            (source_labels, "source", split), (target_labels, "target", len(target)),
        )
    ]  # fmt: skip
    classes = np.concatenate(found)

    def distance(order: np.ndarray) -> float:
        first = _mixture(pooled[order[:split]], classes[order[:split]], width)
        second = _mixture(pooled[order[split:]], classes[order[split:]], width)
        costs = np.array([
            [squared_distance(here - there, one, other) for there, other, _ in second]
            for here, one, _ in first
        ])  # fmt: skip
        return _carried(costs, [share for *_, share in first], [share for *_, share in second])

    value = distance(np.arange(len(pooled)))
    null = np.array([distance(order) for order in orders(len(pooled), permutations, seed)])
    notes = duplicate_notes(source, target)
    if set(found[0].tolist()) != set(found[1].tolist()):
        notes += ("the domains have other classes: the null has those of both in each",)
    single = sum(int((np.unique(own, return_counts=True)[1] == 1).sum()) for own in found)
    if single:
        notes += (f"{single} classes have one example, and no covariance",)
    return Distance(
        "class distance", counts=(split, len(target)), unit="squared units of the features",
        notes=notes, **summary(value, null),
    )  # fmt: skip


def _mixture(
    rows: np.ndarray, classes: np.ndarray, width: int
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Mean, factor of the covariance, and share of each class that occurs."""
    parts = [rows[classes == name] for name in np.unique(classes)]
    return [
        (own.mean(0), gaussian_factor(own, width, False)[0], len(own) / len(rows)) for own in parts
    ]


def _carried(costs: np.ndarray, given: list[float], wanted: list[float]) -> float:
    """The least cost of carrying the given shares to those that are wanted, exactly."""
    here, there = costs.shape
    sums = np.concatenate([
        np.kron(np.eye(here), np.ones(there)), np.kron(np.ones(here), np.eye(there)),
    ])  # fmt: skip
    scale = max(float(costs.max()), np.finfo(np.float64).tiny)
    # The last condition follows from the others; left in, rounding could make them contradict.
    plan = linprog(
        (costs / scale).ravel(), A_eq=sums[:-1], b_eq=np.concatenate([given, wanted])[:-1],
        method="highs",
    )  # fmt: skip
    if plan.status != 0:
        raise RuntimeError(f"the transport of {here} to {there} classes failed: {plan.message}")
    return float(plan.fun) * scale
