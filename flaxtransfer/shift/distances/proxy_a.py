"""The proxy A-distance: how well a linear classifier tells two domains apart."""

from typing import Any

import numpy as np

from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.nulls import Distance, orders, random_folds, summary, two_samples
from flaxtransfer.shift.shrinkage import shrinkage

__all__ = ["proxy_a_distance"]


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
    intensity, on standardised features; the error is the mean of both domains' errors, so that a
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
        "proxy A-distance", counts=(len(source), len(target)), unit="0 to 2", notes=notes,
        **summary(distance[0], distance[1:]),
    )  # fmt: skip


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
    ) / 2  # fmt: skip
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
