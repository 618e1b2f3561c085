"""How alike two representations are (CKA), and how well a classifier separates domains.

How alike two representations of the same examples are, with no bias from few examples.

The proxy A-distance: how well a linear classifier tells two domains apart.
"""

from typing import Any

import numpy as np

from flaxtransfer.analysis.distances import pooled_coordinates
from flaxtransfer.shift.checks import as_features, duplicate_notes
from flaxtransfer.shift.permutation import (
    Distance,
    Similarity,
    orders,
    random_folds,
    summary,
    two_samples,
)
from flaxtransfer.shift.two_sample import shrinkage

__all__ = ["debiased_cka", "proxy_a_distance"]


_FEWEST_ROWS = 4
_LARGEST_GRAM = 5000
"""Rows: beyond, the matrices of all pairs take more than 200 MB each."""


def debiased_cka(x: Any, y: Any, *, permutations: int = 199, seed: int = 0) -> Similarity:
    """Linear centered kernel alignment of two representations of the same examples, debiased.

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
        "debiased linear CKA",
        counts=(count,),
        unit="at most 1",
        **summary(value, null),
    )


def _scaled(features: np.ndarray, name: str) -> np.ndarray:
    """Centered, of mean square 1, with no more columns than rows."""
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
    """HSIC_1 of Song et al., times n (n - 3), for centered features.

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


def proxy_a_distance(
    source: Any, target: Any, *, folds: int = 5, permutations: int = 199, seed: int = 0
) -> Distance:
    """2 (1 - 2 error) of a linear discriminant between the domains, on examples held out.

    0 where domains cannot be told apart by a hyperplane, 2 where they always can. You want it as
    the distance that bounds how much worse a source classifier may do on the target. It says
    nothing of how far apart the domains are once they can be told apart, and nothing of
    differences that no hyperplane sees. On examples that the classifier was fitted on it would be
    2.00 for two samples of one distribution, whenever there are as many features as examples.

    The classifier is the discriminant of Fisher, whose covariance is shrunk by Ledoit and Wolf's
    intensity, on standardized features; the error is the mean of both domains' errors, so that a
    larger sample gains nothing by being larger. Nothing is tuned, and all permutations share one
    decomposition a fold.

    Args:
        source: features ``[n, D]``.
        target: features ``[m, D]``.
        folds: of the cross-validation, which know nothing of the domains.
        permutations: random deals of the pooled examples.
        seed: of folds and deals.

    Returns:
        A `Distance` from -2 to 2. It is not clipped at 0: the mean over samples of one
        distribution would not be 0 if it were.

    Raises:
        ValueError: see `two_samples`; fewer than 19 permutations; folds that are fewer than 2 or
            more than the examples.

    >>> one, other = np.arange(10.0)[:, None], np.arange(10.0)[:, None] + 100
    >>> proxy_a_distance(one, other).value
    2.0

    References:
        S. Ben-David, J. Blitzer, K. Crammer, F. Pereira, "Analysis of representations for domain
        adaptation", 2007.
        R. A. Fisher, "The use of multiple measurements in taxonomic problems", 1936.
    """
    source, target = two_samples(source, target)
    pooled, split = np.concatenate([source, target]), len(source)
    fold = random_folds(len(pooled), folds, seed)
    first = np.zeros((len(pooled), permutations + 1), bool)
    first[:split, 0] = True
    for number, order in enumerate(orders(len(pooled), permutations, seed)):
        first[order[:split], number + 1] = True

    notes = duplicate_notes(source, target)
    spread = pooled.std(0)
    varies = spread > 1e-12 * np.abs(pooled).max(0)
    if varies.any() and not varies.all():
        notes += (f"{int((~varies).sum())} features are constant and were left out",)
    scaled = (pooled[:, varies] - pooled[:, varies].mean(0)) / spread[varies]

    wrong = np.zeros((2, permutations + 1))
    for number in range(folds):
        held = fold == number
        says_first = _classified(scaled[~held], first[~held], scaled[held])
        wrong[0] += (first[held] * (1 - says_first)).sum(0)
        wrong[1] += (~first[held] * says_first).sum(0)
    error = (wrong[0] / split + wrong[1] / (len(pooled) - split)) / 2
    distance = 2 * (1 - 2 * error)
    return Distance(
        "proxy A-distance",
        counts=(len(source), len(target)),
        unit="0 to 2",
        notes=notes,
        **summary(distance[0], distance[1:]),
    )


def _classified(rows: np.ndarray, first: np.ndarray, held: np.ndarray) -> np.ndarray:
    """1 where a held-out row is taken for the first domain, 0.5 where nothing tells them apart.

    Args:
        rows: ``[n, D]``, to learn from.
        first: ``[n, problems]``, whether a row is of the first domain; one column a problem.
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
    intensity, variance = shrinkage(rows)
    # Least squares on these numbers, which sum to 0, has the direction of the discriminant.
    positive = np.divide(count, sizes, out=np.zeros(len(sizes)), where=both)
    negative = np.divide(count, count - sizes, out=np.zeros(len(sizes)), where=both)
    wanted = np.where(first, positive, -negative)
    left, scale, right = _decomposed(rows)
    # The direction is inverse(covariance) @ difference of means, of the covariance as it is shrunk.
    inverse = 1 / ((1 - intensity) * scale**2 + intensity * variance * count)
    inner = left.T @ wanted
    fitted = left @ ((inverse * scale**2)[:, None] * inner)
    leverage = ((left**2) @ (inverse * scale**2))[:, None]
    # Where features are as many as rows, fits reach what they are fitted to, and say nothing of
    # where new rows will fall. The threshold lies amidst the scores of each row by the direction
    # that is found without it: by Sherman and Morrison, the row's own part is taken off.
    rest = 1 - 1 / count
    apart = (rest * fitted - leverage * wanted) / np.maximum(
        rest - (1 - intensity) * leverage, 1e-9
    )
    middle = (
        (apart * first).sum(0) / np.maximum(sizes, 1)
        + (apart * ~first).sum(0) / np.maximum(count - sizes, 1)
    ) / 2
    scores = (held @ right) @ ((inverse * scale)[:, None] * inner) - middle
    # A tie decides nothing, nor does a fold that saw one domain alone.
    return np.where(both & (np.abs(scores) > 1e-12), scores > 0, 0.5)


def _decomposed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, s, V with rows = U s V.T, without directions in which rows hardly differ."""
    # By the smaller of the two products. What is lost to squaring is what shrinkage damps anyway.
    few = len(rows) < rows.shape[1]
    squared, vectors = np.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    kept = squared > 1e-12 * squared[-1]
    scale, vectors = np.sqrt(squared[kept]), vectors[:, kept]
    if few:
        return vectors, scale, rows.T @ (vectors / scale)
    return rows @ (vectors / scale), scale, vectors
