"""Bootstrap intervals of prevalence: validation and target drawn again, all replicates at once.

Rows are drawn as weights, a block at a time, and meet the posteriors in matrix products: no
replicate walks over the data on its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.confusion import joint_confusion, mean_prediction, predictions
from flaxtransfer.shift.likelihood import Maximum, blocks, information, maximize
from flaxtransfer.shift.optimize import nonnegative_quadratic
from flaxtransfer.shift.precision import Sample, influences, scale_response

__all__ = ["confusion_replicates", "likelihood_replicates", "percentiles", "resampled_weights"]


_SETTLED = 0.01
"""Of a log-likelihood unit: a replicate this near its maximum is within 0.15 standard errors."""


def percentiles(replicates: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the middle part of the replicates `[B, K]` that `level` says.

    >>> percentiles(np.arange(101.0)[:, None], 0.9)
    (array([5.]), array([95.]))

    References:
        B. Efron, R. J. Tibshirani, "An introduction to the bootstrap", 1993.
    """
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def resampled_weights(
    sizes: list[int], replicates: int, random: np.random.Generator
) -> Iterator[np.ndarray]:
    """How often each row was drawn, `[B, size]` for blocks of so many rows, uint8.

    Every replicate draws as many rows as there are, with replacement.
    """
    total = sum(sizes)
    drawn = random.multinomial(total, np.divide(sizes, total), size=replicates)
    for size, numbers in zip(sizes, drawn.T, strict=True):
        first = np.repeat(np.arange(replicates) * size, numbers)
        places = first + random.integers(size, size=len(first))
        found = np.bincount(places, minlength=replicates * size)
        yield found.reshape(replicates, size).astype(np.uint8)


def confusion_replicates(
    target: np.ndarray,
    source: Calibration,
    replicates: int,
    random: np.random.Generator,
    *,
    hard: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrices `[B, K, K]` and mean predictions `[B, K]` of data drawn again."""
    classes = source.classes
    if hard:
        # Only counts matter, and counts of rows drawn again are multinomial.
        joint = joint_confusion(source.probabilities, source.labels, hard=True)
        mean = mean_prediction(target, hard=True)
        drawn = random.multinomial(len(source.labels), joint.ravel(), size=replicates)
        matrices = drawn.reshape(replicates, classes, classes) / len(source.labels)
        means = random.multinomial(len(target), mean, size=replicates) / len(target)
        return matrices, means
    matrices = np.zeros((replicates, classes, classes))
    for part, rows, weights in _resampled(source.probabilities, replicates, random):
        labels, rates = source.labels[rows], predictions(part, False)
        for k in np.unique(labels):
            matrices[:, :, k] += weights[:, labels == k] @ rates[labels == k]
    means = np.zeros((replicates, classes))
    for part, _, weights in _resampled(target, replicates, random):
        means += weights @ predictions(part, False)
    return matrices / len(source.labels), means / len(target)


def likelihood_replicates(
    sample: Sample, maximum: Maximum, replicates: int, random: np.random.Generator
) -> np.ndarray:
    """Maxima `[B, K]` of target rows, labeled examples and validation drawn again.

    Each is solved, not expanded: Newton steps on the simplex with the curvature of the estimate.
    Only what a validation does to calibration and prior is taken to first order.
    """
    source, classes = sample.source, sample.source.classes
    response = scale_response(source, sample.probabilities, maximum.estimate)
    moved = np.zeros((replicates, classes + response.shape[1]))
    sizes = [len(part) for part, _ in blocks(source.probabilities)]
    drawn = resampled_weights(sizes, replicates, random)
    for influence, weights in zip(influences(source), drawn, strict=True):
        moved += (weights - 1.0) @ np.concatenate(influence, 1) / len(source.labels)
    factors, pushes = np.exp(moved[:, :classes]), moved[:, classes:] @ response.T
    counts = np.tile(sample.pseudo, (replicates, 1))
    many = int(sample.labeled.sum())
    if many:
        counts += random.multinomial(many, sample.labeled / many, size=replicates)
    sizes = [len(part) for part, _ in blocks(sample.probabilities)]
    weights = np.concatenate(list(resampled_weights(sizes, replicates, random)), 1)
    if sample.weights is not None:
        weights = weights * (sample.weights > 0)
    return _solve(sample, maximum, weights, factors, pushes, counts)


def _solve(
    sample: Sample,
    maximum: Maximum,
    weights: np.ndarray,
    factors: np.ndarray,
    pushes: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Shares that the scores of every replicate hold in place."""
    divisor, estimate = sample.divisor, maximum.estimate
    rows = weights.sum(1, dtype=np.float64)
    total = rows + counts.sum(1)
    matrix = information(sample.probabilities, estimate / divisor, divisor, sample.weights)
    matrix *= sample.rows / (sample.rows + sample.counts.sum())
    q = np.tile(estimate, (len(weights), 1))
    # A replicate may need a class that the estimate has none of.
    q = 0.999 * q + 0.001 * sample.source.prior
    active = np.arange(len(q))
    for _ in range(30):
        slopes = _slopes(sample, weights, q, factors, active)
        slopes = (slopes + rows[active, None] * pushes[active]) / total[active, None]
        seen = counts[active] > 0
        share = counts[active] / total[active, None]
        slopes += np.divide(share, q[active], out=np.zeros_like(share), where=seen)
        moving = (slopes.max(1) - 1) * total[active] > _SETTLED
        active, slopes, share = active[moving], slopes[moving], share[moving]
        if not len(active):
            return q
        goals = _goals(matrix, q[active], slopes, share)
        following = q[active] * np.maximum(slopes, 0)
        # A little of EM's step keeps shares possible that rows depend on.
        mixed = 0.95 * goals / goals.sum(1, keepdims=True)
        mixed += 0.05 * following / following.sum(1, keepdims=True)
        q[active] = mixed / mixed.sum(1, keepdims=True)
    for number in active.tolist():
        prior = np.where(np.isfinite(divisor), divisor, 0) / factors[number]
        q[number] = maximize(
            sample.probabilities,
            prior,
            counts=counts[number],
            weights=weights[number].astype(np.float64),
            tolerance=_SETTLED / total[number],
        ).estimate
    return q


def _goals(matrix: np.ndarray, q: np.ndarray, slopes: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Where Newton's steps on the simplex end, `[A, K]`: most inside, where one inverse serves."""
    goals = np.full(q.shape, -1.0)
    if not share.any():
        goals = q + (slopes - 1) @ np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    for number in np.flatnonzero((goals < 0).any(1)).tolist():
        now = q[number]
        own = np.divide(share[number], now**2, out=np.zeros_like(now), where=share[number] > 0)
        curved = matrix + np.diag(own)
        goals[number] = nonnegative_quadratic(curved, curved @ now + slopes[number] - 1)
    lost = goals.sum(1) <= 0
    goals[lost] = q[lost]
    return goals


def _slopes(
    sample: Sample, weights: np.ndarray, q: np.ndarray, factors: np.ndarray, active: np.ndarray
) -> np.ndarray:
    """Sums over the rows of ``s_k``, `[A, K]`, of the replicates that still move."""
    ratios = q[active] * factors[active] / sample.divisor
    found = np.zeros(ratios.shape)
    for part, rows in blocks(sample.probabilities):
        density = ratios @ part.T
        found += (weights[active, rows] / np.where(density > 0, density, np.inf)) @ part
    return found * factors[active] / sample.divisor


def _resampled(
    array: np.ndarray, replicates: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, slice, np.ndarray]]:
    """Blocks of rows with the weights `[B, b]` that every replicate gives them."""
    sizes = [len(part) for part, _ in blocks(array)]
    drawn = resampled_weights(sizes, replicates, random)
    for (part, rows), weights in zip(blocks(array), drawn, strict=True):
        yield part, rows, weights.astype(np.float64)
