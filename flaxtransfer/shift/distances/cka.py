"""How alike two representations of the same examples are, with no bias from few examples."""

from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_features
from flaxtransfer.shift.distances.frechet import pooled_coordinates
from flaxtransfer.shift.nulls import Similarity, orders, summary

__all__ = ["debiased_cka"]

_FEWEST_ROWS = 4
_LARGEST_GRAM = 5000
"""Rows: beyond, the matrices of all pairs take more than 200 MB each."""


def debiased_cka(x: Any, y: Any, *, permutations: int = 199, seed: int = 0) -> Similarity:
    """Linear centred kernel alignment of two representations of the same examples, debiased.

    1 for representations that differ by a rotation, a shift and a scale; near 0 for those that
    have nothing to do with each other, where the usual, biased CKA of 50 examples and 2048
    features is 0.975. You want it to ask what fine-tuning did to a layer. It is a similarity,
    and for one set of examples: it is no distance between domains.

    Args:
        x: features ``[n, D]`` of n examples, n >= 4.
        y: features ``[n, E]`` of the same examples, in the same order.
        permutations: random deals of y's rows to x's.
        seed: of the deals.

    Returns:
        A `Similarity`, at most 1; slightly negative by chance. A small
        p says that y knows something of x.

    Raises:
        ValueError: fewer than 4 rows, other counts of rows, NaN, a representation that is the same
            for all examples.

    >>> x = np.random.default_rng(0).normal(size=(20, 3))
    >>> round(debiased_cka(x, 5 - 2 * x[:, ::-1]).value, 9)
    1.0

    References:
        S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of neural network representations
        revisited", 2019.
        L. Song, A. Smola, A. Gretton, J. Bedo, K. Borgwardt, "Feature selection via dependence
        maximization", 2012, HSIC_1.
        T. Nguyen, M. Raghu, S. Kornblith, "Do wide and deep networks learn the same things?", 2021.
    """
    x, y = as_features(x, "x"), as_features(y, "y")
    count = len(x)
    if len(y) != count:
        raise ValueError(f"x has {count} rows and y {len(y)}; they are of the same examples")
    if count < _FEWEST_ROWS:
        raise ValueError(f"there are {count} examples; CKA without bias wants {_FEWEST_ROWS}")
    first, second = _scaled(x, "x"), _scaled(y, "y")
    lengths, others = (first**2).sum(1), (second**2).sum(1)
    norms = np.sqrt(
        _hsic(_overlap(first, first), lengths, lengths)
        * _hsic(_overlap(second, second), others, others)
    )

    # |X' Y|^2 is also the sum over pairs of K * L. Gathering a number takes as long as some 250
    # multiplications, which pays where features are many.
    gram = 250 * count < first.shape[1] * second.shape[1] and count <= _LARGEST_GRAM
    if gram:
        pairs, other_pairs = first @ first.T, second @ second.T

    def alignment(order: np.ndarray) -> float:
        if gram:
            overlap = float(np.einsum("ij,ij->", pairs, other_pairs[np.ix_(order, order)]))
        else:
            overlap = _overlap(first, second[order])
        return _hsic(overlap, lengths, others[order]) / norms

    value = alignment(np.arange(count))
    null = np.array([alignment(order) for order in orders(count, permutations, seed)])
    return Similarity(
        "debiased linear CKA", counts=(count,), unit="at most 1",
        **summary(value, null),
    )  # fmt: skip


def _scaled(features: np.ndarray, name: str) -> np.ndarray:
    """Centred, of mean square 1, with no more columns than rows."""
    found = pooled_coordinates(features)
    size = np.sqrt((found**2).mean())
    # Rounding of a mean leaves rows that are equal a little apart.
    if size <= 1e-12 * np.abs(features).max():
        raise ValueError(f"{name} is the same for all {len(features)} examples: CKA is 0 / 0")
    return found / size


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    product = first.T @ second
    return float(np.einsum("ij,ij->", product, product))


def _hsic(overlap: float, lengths: np.ndarray, others: np.ndarray) -> float:
    """HSIC_1 of Song et al., times n (n - 3), for centred features.

    With K's rows summing to 0, K without its diagonal has row sums -k and sum -sum(k), where k is
    the diagonal; the three terms of the estimator are made of these.
    """
    count = len(lengths)
    diagonal = lengths @ others
    return float(
        overlap
        - count / (count - 2) * diagonal
        + lengths.sum() * others.sum() / ((count - 1) * (count - 2))
    )
