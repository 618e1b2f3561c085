"""The H-score: how much of the features' variance lies between classes, in all directions alike."""

from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_features
from flaxtransfer.shift.distances.frechet import pooled_coordinates
from flaxtransfer.shift.duplicates import repetition_notes
from flaxtransfer.shift.nulls import Transferability, labelled, orders, summary
from flaxtransfer.shift.shrinkage import shrinkage

__all__ = ["h_score"]


def h_score(
    features: Any, labels: Any, *, regularised: bool = True, permutations: int = 199, seed: int = 0
) -> Transferability:
    """tr(cov(features)^-1 cov(class means)), with the covariance shrunk; between 0 and C - 1.

    You want it as the quickest look at which features tell classes apart, with nothing fitted but
    means. Without shrinkage every set of features is perfect once there are as many as examples:
    C - 1 for noise and for signal. It weighs small and large directions alike, and so may reward
    ones that no head trained by gradients would find.

    Args:
        features: ``[N, D]``.
        labels: ``[N]``, class numbers; classes without examples are left out.
        regularised: (1 - s) tr(cov_s^-1 cov(class means)), with s of Ledoit and Wolf; else the
            score of Bao et al. with a pseudo-inverse.
        permutations: random deals of the labels.
        seed: of the deals.

    Returns:
        A `Transferability` without unit. All covariances are divided by N.

    Raises:
        ValueError: fewer than 4 examples, one class, NaN, features that are the same for all
            examples.

    >>> features = np.array([[0.0, 1], [1, 0], [4, 5], [5, 4], [0, 0], [4, 4]])
    >>> round(h_score(features, [0, 0, 1, 1, 0, 1], regularised=False).value, 3)
    0.986

    References:
        Y. Bao, Y. Li, S. Huang, L. Zhang, L. Zheng, A. Zamir, L. Guibas, "An information-theoretic
        approach to transferability in task transfer learning", 2019.
        S. Ibrahim, N. Ponomareva, R. Mazumder, "Newer is not always better: rethinking
        transferability metrics, their peculiarities, stability and performance", 2021.
    """
    features = as_features(features, "features")
    classes, count = labelled(labels, len(features))
    examples, width = features.shape
    if not np.ptp(features, axis=0).any():
        raise ValueError("features are the same for all examples: they tell no class from another")
    centred = pooled_coordinates(features)
    variances, vectors = np.linalg.eigh(centred.T @ centred / examples)
    kept = variances > 1e-12 * variances[-1]
    rotated, variances = centred @ vectors[:, kept], variances[kept]
    intensity, floor = shrinkage(centred, width) if regularised else (0.0, 0.0)
    # What (1 - s) leaves of each direction is one number, so that whitening does it all.
    white = rotated * np.sqrt(
        (1 - intensity) / ((1 - intensity) * variances + intensity * floor) / examples
    )
    one_hot = np.eye(count)[classes] / np.sqrt(np.bincount(classes))

    def score(order: np.ndarray) -> float:
        means = one_hot[order].T @ white
        return float(np.einsum("ij,ij->", means, means))

    value = score(np.arange(examples))
    null = np.array([score(order) for order in orders(examples, permutations, seed)])
    notes = repetition_notes(features, "feature")
    if regularised:
        notes += (f"shrinkage {intensity:.3g}",)
    elif kept.sum() == examples - 1:
        notes += (f"{examples} examples of {width} features: C - 1 for any labels",)
    return Transferability(
        "H-score, regularised" if regularised else "H-score", counts=(examples, width, count),
        notes=notes, **summary(value, null),
    )  # fmt: skip
