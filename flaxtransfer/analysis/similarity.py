"""Representation similarity (CKA) and domain separability (proxy A-distance).

``debiased_cka`` compares two representations of the same examples; ``proxy_a_distance`` is the
error of a linear classifier between two domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxtransfer.analysis.distances import pooled_coordinates
from flaxtransfer.shift.checks import as_features, duplicate_row_notes
from flaxtransfer.shift.statistics import (
    Distance,
    Similarity,
    check_two_samples,
    null_summary,
    random_folds,
    random_permutations,
)
from flaxtransfer.shift.two_sample import ledoit_wolf

__all__ = ["debiased_cka", "proxy_a_distance"]


_MIN_ROWS = 4
_LARGEST_GRAM = 5000
"""Rows up to which Gram matrices are used; beyond, they take more than 200 MB each."""


def debiased_cka(x: Any, y: Any, *, permutations: int = 199, seed: int = 0) -> Similarity:
    """Linear centered kernel alignment of two representations of the same examples, debiased.

    It is 1 for representations that differ by a rotation, a shift and a scale, and near 0 for
    unrelated ones, where the usual, biased CKA of 50 examples and 2048 features is 0.975. Use it to
    see how fine-tuning changed a layer. It compares two representations of one set of examples; it
    is not a distance between domains.

    Args:
        x: features ``[n, D]`` of n examples, n >= 4.
        y: features ``[n, E]`` of the same examples, in the same order.
        permutations: random pairings of the rows of x and y.
        seed: of the permutations.

    Returns:
        A ``Similarity``, at most 1; slightly negative by chance. With a small p-value x and y are
        related.

    Raises:
        ValueError: fewer than 4 rows, different numbers of rows, NaN, or a constant representation.

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
        raise ValueError(f"x and y must have the same number of rows, got {count} and {len(y)}")
    if count < _MIN_ROWS:
        raise ValueError(f"debiased CKA must have at least {_MIN_ROWS} examples, got {count}")
    first, second = _scaled(x, "x"), _scaled(y, "y")
    lengths, others = (first**2).sum(1), (second**2).sum(1)
    norms = np.sqrt(
        _hsic(_overlap(first, first), lengths, lengths)
        * _hsic(_overlap(second, second), others, others)
    )

    # |X' Y|^2 is also the sum of K * L over pairs. Gathering a number takes as long as about 250
    # multiplications, which pays off with many features.
    gram = 250 * count < first.shape[1] * second.shape[1] and count <= _LARGEST_GRAM
    if gram:
        pairs, other_pairs = first @ first.T, second @ second.T

    def alignment(order: np.ndarray) -> float:
        if gram:
            overlap = float(np.einsum("ij,ij->", pairs, other_pairs[np.ix_(order, order)]))
        else:
            overlap = _overlap(first, second[order])
        return float(_hsic(overlap, lengths, others[order]) / norms)

    value = alignment(np.arange(count))
    null = np.array([alignment(order) for order in random_permutations(count, permutations, seed)])
    return Similarity(
        "debiased linear CKA",
        counts=(count,),
        unit="at most 1",
        **null_summary(value, null),
    )


def _scaled(features: np.ndarray, name: str) -> np.ndarray:
    """Centers and scales to mean square 1, with no more columns than rows."""
    found = pooled_coordinates(features)
    size = np.sqrt((found**2).mean())
    # Rounding of the mean leaves small differences between equal rows.
    if size <= 1e-12 * np.abs(features).max():
        raise ValueError(
            f"{name} must not be constant over the {len(features)} examples: CKA would be 0 / 0"
        )
    scaled: np.ndarray = found / size
    return scaled


def _overlap(first: np.ndarray, second: np.ndarray) -> float:
    product = first.T @ second
    return float(np.einsum("ij,ij->", product, product))


def _hsic(overlap: float, lengths: np.ndarray, others: np.ndarray) -> float:
    """HSIC_1 of Song et al., times n (n - 3), for centered features.

    The rows of K sum to 0, so that K without its diagonal k has row sums -k and sum -sum(k); the
    three terms of the estimator follow from these.
    """
    count = len(lengths)
    diagonal = lengths @ others
    return float(
        overlap
        - count / (count - 2) * diagonal
        + lengths.sum() * others.sum() / ((count - 1) * (count - 2))
    )


def proxy_a_distance(
    source: Any, target: Any, *, folds: int = 5, permutations: int = 199, seed: int = 0
) -> Distance:
    """Proxy A-distance: 2 (1 - 2 error) of a linear classifier between the domains, held out.

    It is 0 if no hyperplane separates the domains, and 2 if one does. Use it as the distance that
    bounds how much worse a source classifier can do on the target. It does not measure how far
    apart separable domains are, nor differences that no hyperplane sees. On its own training
    examples the classifier would give 2.00 for two samples of one distribution, as soon as there
    are as many features as examples; therefore it is cross-validated.

    The classifier is Fisher's discriminant on standardized features, with a Ledoit-Wolf
    covariance. The error is the mean of the errors on both domains, so that the sizes of the
    samples do not matter. Nothing is tuned, and all permutations share one decomposition per fold.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        folds: of the cross-validation, independent of the domains.
        permutations: random permutations of the pooled examples.
        seed: of folds and permutations.

    Returns:
        A ``Distance`` from -2 to 2. It is not clipped at 0, so that its mean over samples of one
        distribution is 0.

    Raises:
        ValueError: see ``two_samples``; fewer than 19 permutations; folds that are fewer than 2 or
            more than the examples.

    >>> one, other = np.arange(10.0)[:, None], np.arange(10.0)[:, None] + 100
    >>> proxy_a_distance(one, other).value
    2.0

    References:
        S. Ben-David, J. Blitzer, K. Crammer, F. Pereira, "Analysis of representations for domain
        adaptation", 2007.
        R. A. Fisher, "The use of multiple measurements in taxonomic problems", 1936.
    """
    source, target = check_two_samples(source, target)
    pooled, split = np.concatenate([source, target]), len(source)
    fold = random_folds(len(pooled), folds, seed)
    first = np.zeros((len(pooled), permutations + 1), bool)
    first[:split, 0] = True
    for number, order in enumerate(random_permutations(len(pooled), permutations, seed)):
        first[order[:split], number + 1] = True

    notes = duplicate_row_notes(source, target)
    spread = pooled.std(0)
    varies = spread > 1e-12 * np.abs(pooled).max(0)
    if varies.any() and not varies.all():
        notes += (f"{int((~varies).sum())} features are constant and were left out",)
    scaled = (pooled[:, varies] - pooled[:, varies].mean(0)) / spread[varies]

    wrong = np.zeros((2, permutations + 1))
    for number in range(folds):
        held = fold == number
        predicted = _predict_domain(scaled[~held], first[~held], scaled[held])
        wrong[0] += (first[held] * (1 - predicted)).sum(0)
        wrong[1] += (~first[held] * predicted).sum(0)
    error = (wrong[0] / split + wrong[1] / (len(pooled) - split)) / 2
    distance = 2 * (1 - 2 * error)
    return Distance(
        "proxy A-distance",
        counts=(len(source), len(target)),
        unit="0 to 2",
        notes=notes,
        **null_summary(distance[0], distance[1:]),
    )


def _predict_domain(rows: np.ndarray, first: np.ndarray, held: np.ndarray) -> np.ndarray:
    """1 where a held-out row is classified as the first domain, 0.5 where it is undecided.

    Args:
        rows: ``[n, D]``, training rows.
        first: ``[n, problems]``, whether a row is of the first domain; one column per problem.
        held: ``[m, D]``, to classify.

    Returns:
        ``[m, problems]``.
    """
    count = len(rows)
    sizes = first.sum(0)
    both = (sizes > 0) & (sizes < count)
    if not rows.shape[1] or not both.any():
        return np.full((len(held), first.shape[1]), 0.5)
    mean = rows.mean(0)
    rows, held = rows - mean, held - mean
    intensity, variance = ledoit_wolf(rows)
    # Least squares on these targets, which sum to 0, has the direction of the discriminant.
    positive = np.divide(count, sizes, out=np.zeros(len(sizes)), where=both)
    negative = np.divide(count, count - sizes, out=np.zeros(len(sizes)), where=both)
    targets = np.where(first, positive, -negative)
    left, scale, right = _svd(rows)
    # The direction is inverse(shrunk covariance) @ difference of means.
    inverse = 1 / ((1 - intensity) * scale**2 + intensity * variance * count)
    inner = left.T @ targets
    fitted = left @ ((inverse * scale**2)[:, None] * inner)
    leverage = ((left**2) @ (inverse * scale**2))[:, None]
    # With as many features as rows, the fit reproduces its targets, which does not predict the
    # scores of new rows. The threshold is the midpoint of leave-one-out scores: by the
    # Sherman-Morrison formula, the part of each row itself is removed.
    rest = 1 - 1 / count
    left_out = (rest * fitted - leverage * targets) / np.maximum(
        rest - (1 - intensity) * leverage, 1e-9
    )
    middle = (
        (left_out * first).sum(0) / np.maximum(sizes, 1)
        + (left_out * ~first).sum(0) / np.maximum(count - sizes, 1)
    ) / 2
    scores = (held @ right) @ ((inverse * scale)[:, None] * inner) - middle
    # Ties and folds with one domain are undecided.
    return np.where(both & (np.abs(scores) > 1e-12), scores > 0, 0.5)


def _svd(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, s, V with rows = U s V.T, without directions of nearly no variance."""
    # From the smaller Gram matrix. Squaring loses only what shrinkage damps anyway.
    few = len(rows) < rows.shape[1]
    squared, vectors = np.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    kept = squared > 1e-12 * squared[-1]
    scale, vectors = np.sqrt(squared[kept]), vectors[:, kept]
    if few:
        return vectors, scale, rows.T @ (vectors / scale)
    return rows @ (vectors / scale), scale, vectors
