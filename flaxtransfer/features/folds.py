"""Examples that are held out: stratified folds."""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxtransfer.features.checks import class_labels, singles

__all__ = ["deal", "rarest", "stratified_folds"]


def stratified_folds(labels: Any, folds: int, seed: int = 0) -> np.ndarray:
    """The fold in which each example is held out, int64 ``[examples]``.

    Folds differ by at most one example, in all and within every class.

    Raises:
      TypeError: labels that are no integers.
      ValueError: labels of another shape; a class with fewer examples than folds.

    >>> np.bincount(stratified_folds([0, 0, 0, 1, 1, 1, 1], 3)).tolist()
    [3, 2, 2]
    """
    label = class_labels(labels)
    if label.ndim != 1 or not label.size:
        raise ValueError(f"labels have shape {label.shape}, wanted [examples], one or more")
    names, counts = np.unique(label, return_counts=True)
    if small := {int(c): int(n) for c, n in zip(names, counts, strict=True) if n < folds}:
        raise ValueError(f"{folds} folds want as many examples of each class; there are {small}")
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(label))
    # Class after class is dealt out in turn, the next where the last one ended.
    dealt = np.empty(len(label), np.int64)
    dealt[np.lexsort([keys, label])] = np.arange(len(label)) % folds
    return dealt


def deal(label: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """As ``stratified_folds``, but -1 for the only example of a class, which is never held out.

    >>> deal(np.array([0, 0, 1, 2, 2]), 2).tolist().count(-1)
    1
    """
    several = ~np.isin(label, singles(label))
    dealt = np.full(len(label), -1)
    dealt[several] = stratified_folds(label[several], folds, seed)
    return dealt


def rarest(label: np.ndarray) -> tuple[int, int]:
    """Of the classes with several examples the one with the fewest, and how many: most folds.

    Raises:
      ValueError: every class has one example.

    >>> rarest(np.array([0, 0, 0, 1, 1, 2]))
    (1, 2)
    """
    names, counts = np.unique(label, return_counts=True)
    if (counts == 1).all():
        raise ValueError(
            "every class has one example, so that none can be held out; nearest_mean and "
            "logistic_path can be fitted to them, but not judged"
        )
    n = np.where(counts > 1, counts, counts.max() + 1).argmin()
    return int(names[n]), int(counts[n])
