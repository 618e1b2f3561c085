"""Transferability scores: H-score, LEEP and LogME, beside their permutation null.

The H-score: how much of the features' variance lies between classes, in all directions alike.

LEEP: how well the source's own classes, as they are predicted, tell the target's.

LogME: the evidence of a Bayesian linear head on the features, exactly, and at its maximum.
"""

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.analysis.distances import pooled_coordinates
from flaxtransfer.shift.checks import as_features, as_probabilities, repetition_notes, uncertain
from flaxtransfer.shift.permutation import Transferability, labeled, orders, summary
from flaxtransfer.shift.two_sample import shrinkage

__all__ = ["LogEvidence", "h_score", "leep", "log_evidence", "logme"]


def h_score(
    features: Any, labels: Any, *, regularized: bool = True, permutations: int = 199, seed: int = 0
) -> Transferability:
    """tr(cov(features)^-1 cov(class means)), with the covariance shrunk; between 0 and C - 1.

    You want it as the quickest look at which features tell classes apart, with nothing fitted but
    means. Without shrinkage every set of features is perfect once there are as many as examples:
    C - 1 for noise and for signal. It weighs small and large directions alike, and so may reward
    ones that no head trained by gradients would find.

    Args:
        features: ``[N, D]``.
        labels: ``[N]``, class numbers; classes without examples are left out.
        regularized: (1 - s) tr(cov_s^-1 cov(class means)), with s of Ledoit and Wolf; else the
            score of Bao et al. with a pseudo-inverse.
        permutations: random deals of the labels.
        seed: of the deals.

    Returns:
        A `Transferability` without unit. All covariances are divided by N.

    Raises:
        ValueError: fewer than 4 examples, one class, NaN, features that are the same for all
            examples.

    >>> features = np.array([[0.0, 1], [1, 0], [4, 5], [5, 4], [0, 0], [4, 4]])
    >>> round(h_score(features, [0, 0, 1, 1, 0, 1], regularized=False).value, 3)
    0.986

    References:
        Y. Bao, Y. Li, S. Huang, L. Zhang, L. Zheng, A. Zamir, L. Guibas, "An information-theoretic
        approach to transferability in task transfer learning", 2019.
        S. Ibrahim, N. Ponomareva, R. Mazumder, "Newer is not always better: rethinking
        transferability metrics, their peculiarities, stability and performance", 2021.
    """
    features = as_features(features, "features")
    classes, count = labeled(labels, len(features))
    examples, width = features.shape
    if not np.ptp(features, axis=0).any():
        raise ValueError("features are the same for all examples: they tell no class from another")
    centered = pooled_coordinates(features)
    variances, vectors = np.linalg.eigh(centered.T @ centered / examples)
    kept = variances > 1e-12 * variances[-1]
    rotated, variances = centered @ vectors[:, kept], variances[kept]
    intensity, floor = shrinkage(centered, width) if regularized else (0.0, 0.0)
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
    if regularized:
        notes += (f"shrinkage {intensity:.3g}",)
    elif kept.sum() == examples - 1:
        notes += (f"{examples} examples of {width} features: C - 1 for any labels",)
    return Transferability(
        "H-score, regularized" if regularized else "H-score",
        counts=(examples, width, count),
        notes=notes,
        **summary(value, null),
    )


def leep(
    source_probabilities: Any, labels: Any, *, permutations: int = 199, seed: int = 0
) -> Transferability:
    """Mean log-probability of the labels, told from the source head's probabilities alone.

    Each target class is what its examples look like to the source's head: p(y | z) from joint
    counts, then sum_z p(y | z) p(z | x). You want it for networks whose head you have and whose
    features you do not want to store. It is optimistic, because p(y | z) is counted on the same
    examples that it is judged on: read `excess`. With a poor source head it ranks worse than
    scores of features.

    Args:
        source_probabilities: ``[N, Z]``, of the source's Z classes, for target examples.
        labels: ``[N]``, target class numbers; classes without examples are left out.
        permutations: random deals of the labels.
        seed: of the deals.

    Returns:
        A `Transferability` in nats per example, at most 0.

    Raises:
        ValueError: fewer than 4 examples, one target class, rows that are no probabilities.

    >>> found = leep([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], [0, 0, 1, 1])
    >>> (found.value, found.notes)
    (0.0, ('1 source classes have no mass and were left out',))

    References:
        C. V. Nguyen, T. Hassner, M. Seeger, C. Archambeau, "LEEP: a new measure to evaluate
        transferability of learned representations", 2020.
    """
    given = as_probabilities(source_probabilities, "source probabilities")
    classes, count = labeled(labels, len(given))
    # A class that no example has mass in says nothing; divided by its mass it would be 0 / 0.
    mass = given.sum(0)
    found = given[:, mass > 0]
    shares = found / mass[mass > 0]
    one_hot = np.eye(count)[classes]

    def score(order: np.ndarray) -> float:
        conditional = one_hot[order].T @ shares
        told = (found @ conditional.T)[np.arange(len(found)), classes[order]]
        return float(np.log(np.minimum(told, 1.0)).mean())

    value = score(np.arange(len(found)))
    null = np.array([score(order) for order in orders(len(found), permutations, seed)])
    empty = int((mass == 0).sum())
    notes = repetition_notes(uncertain(given), "uncertain")
    if empty:
        notes += (f"{empty} source classes have no mass and were left out",)
    return Transferability(
        "LEEP",
        counts=(len(given), given.shape[1], count),
        unit="nats per example",
        notes=notes,
        **summary(value, null),
    )


_BELOW, _ABOVE, _STEP = -22.0, 20.0, 0.5
"""Of log(alpha / beta), from the largest squared singular value: beyond, nothing changes."""
_CHUNK = 4_000_000
"""Numbers in one array of singular values times columns: 32 MB."""


@dataclasses.dataclass(frozen=True, eq=False)
class LogEvidence:
    """Maximum evidence of linear regressions on the same features, one for each column of targets.

    The model is ``targets = features @ w + noise``, w of precision alpha and noise of precision
    beta, so that targets are Gaussian with covariance ``I / beta + features @ features.T / alpha``.

    Args:
        log_evidence: ``[M]``, the log-density of the column of targets, nats.
        alpha: ``[M]``, precision of the weights; beyond 4e8 times beta per squared singular value
            where features explain nothing.
        beta: ``[M]``, precision of the noise.
        effective_parameters: ``[M]``, how many of the D weights the targets determine.
        bounded: ``[M]``, False where features explain targets without noise: the evidence then
            grows without end as the noise vanishes, and is that of the smallest noise looked at.
        examples: N.
        features: D.
    """

    log_evidence: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    effective_parameters: np.ndarray
    bounded: np.ndarray
    examples: int
    features: int


def log_evidence(features: Any, targets: Any) -> LogEvidence:
    """The maximum over alpha and beta of the evidence of linear regressions; exact for any N and D.

    You want it of targets that are numbers; for classes see `logme`. There is no intercept: append
    a feature that is 1 where you want one. Of the maximum there is no doubt about which one was
    found: a grid over alpha / beta is searched before the best cell is refined.

    Args:
        features: ``[N, D]``.
        targets: ``[N, M]``, or ``[N]`` for M = 1.

    Raises:
        ValueError: fewer than 2 rows, NaN, other counts; features or targets that are all 0.

    >>> line = np.arange(1.0, 9.0)
    >>> found = evidence(line[:, None], line + [0.1, -0.1] * 4)
    >>> round(float(found.effective_parameters[0]), 3)
    1.0

    References:
        D. J. C. MacKay, "Bayesian interpolation", 1992.
    """
    features = as_features(features, "features")
    targets = np.asarray(targets, np.float64)
    columns = as_features(targets[:, None] if targets.ndim == 1 else targets, "targets")
    if len(columns) != len(features) or len(features) < 2:
        raise ValueError(
            f"features have {len(features)} rows and targets {len(columns)}; wanted the same, 2 or "
            "more"
        )
    if not columns.any(0).all():
        raise ValueError("a column of targets is all 0: its evidence has no maximum")
    left, squares = _decomposed(features)
    return _maximum(squares, (left.T @ columns) ** 2, (columns**2).sum(0), features.shape)


def logme(features: Any, labels: Any, *, permutations: int = 199, seed: int = 0) -> Transferability:
    """Mean log-evidence per example and class of a Bayesian linear head; larger is better.

    You want it to rank networks, or layers, for a small labeled set without training any head. It
    takes classes for numbers (0 or 1 each, "one against the rest"), so that it is no likelihood
    of labels. Where N < D it differs from implementations that leave out the
    (D - rank) / 2 log(alpha) of the weights that no example sees: theirs then mean nothing.

    Args:
        features: ``[N, D]``, as the head sees them; no intercept is added.
        labels: ``[N]``, class numbers; classes without examples are left out.
        permutations: random deals of the labels.
        seed: of the deals.

    Returns:
        A `Transferability` in nats per example. `effective_parameters` counts the weights of all
        classes, of D * C: the honest P of "parameters per example" for a head.

    Raises:
        ValueError: fewer than 4 examples, one class, NaN, features that are the same for all
            examples.

    >>> found = logme([[0.0], [0.1], [1.0], [0.9], [0.0], [1.0]], [0, 0, 1, 1, 0, 1])
    >>> found.value > found.null_mean
    True

    References:
        K. You, Y. Liu, J. Wang, M. Long, "LogME: practical assessment of pre-trained models for
        transfer learning", 2021.
    """
    features = as_features(features, "features")
    classes, count = labeled(labels, len(features))
    if not np.ptp(features, axis=0).any():
        raise ValueError("features are the same for all examples: they tell no class from another")
    left, squares = _decomposed(features)
    one_hot = np.eye(count)[classes]
    own = _maximum(squares, (left.T @ one_hot) ** 2, one_hot.sum(0), features.shape)
    value = own.log_evidence.mean() / len(features)

    at_once = max(1, _CHUNK // (len(squares) * count))
    null: list[float] = []
    waiting: list[np.ndarray] = []
    for order in orders(len(features), permutations, seed):
        waiting.append((left.T @ one_hot[order]) ** 2)
        if len(waiting) == at_once or len(null) + len(waiting) == permutations:
            found = _maximum(
                squares,
                np.concatenate(waiting, axis=1),
                np.tile(one_hot.sum(0), len(waiting)),
                features.shape,
            )
            null.extend(found.log_evidence.reshape(-1, count).mean(1) / len(features))
            waiting = []
    notes = repetition_notes(features, "feature")
    if not own.bounded.all():
        notes += (
            f"features give {int((~own.bounded).sum())} classes without error: their evidence is "
            "that of the smallest noise looked at",
        )
    return Transferability(
        "LogME",
        counts=(len(features), features.shape[1], count),
        unit="nats per example",
        effective_parameters=float(own.effective_parameters.sum()),
        notes=notes,
        **summary(value, np.array(null)),
    )


def _decomposed(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors ``[N, rank]`` and squared singular values ``[rank]``."""
    left, scale, _ = np.linalg.svd(features, full_matrices=False)
    kept = scale > scale[0] * max(features.shape) * np.finfo(np.float64).eps
    if not kept.any():
        raise ValueError("features are all 0: they explain nothing")
    return left[:, kept], scale[kept] ** 2


def _maximum(
    squares: np.ndarray, explained: np.ndarray, total: np.ndarray, shape: tuple[int, ...]
) -> LogEvidence:
    """The best alpha and beta of every column.

    Of the two only the ratio r = alpha / beta has to be searched for. Given r, 1 / beta is Q / N
    with Q = residual + sum_i explained_i r / (squares_i + r), and the log-evidence is
    -N/2 (log(2 pi Q / N) + 1) - 1/2 sum_i log(1 + squares_i / r). Directions that no example sees
    add log(alpha) to both the prior's and the posterior's determinant, and cancel.

    Args:
        squares: ``[rank]``, squared singular values.
        explained: ``[rank, M]``, squared coordinates of the targets.
        total: ``[M]``, squared lengths of the targets.
        shape: N and D.
    """
    count = shape[0]
    # Where examples are no more than the rank, nothing is left over but rounding.
    residual = total - explained.sum(0)
    residual[residual <= 1e-13 * total] = 0
    if len(squares) >= count:
        residual[:] = 0
    grid = np.log(squares[0]) + np.arange(_BELOW, _ABOVE + _STEP / 2, _STEP)
    kept = 1 / (1 + squares / np.exp(grid)[:, None])
    spread = residual + kept @ explained
    heights = (
        -count / 2 * (np.log(2 * np.pi * spread / count) + 1)
        - 0.5 * np.log1p(squares / np.exp(grid)[:, None]).sum(1)[:, None]
    )
    best = heights.argmax(0)
    ratio = _refined(squares, explained, residual, count, grid, best)

    shrunk = squares[:, None] / (squares[:, None] + ratio)
    spread = residual + ((1 - shrunk) * explained).sum(0)
    value = -count / 2 * (np.log(2 * np.pi * spread / count) + 1) - 0.5 * np.log1p(
        squares[:, None] / ratio
    ).sum(0)
    beta = count / spread
    bounded = (best > 0) | (len(squares) >= count)
    return LogEvidence(value, ratio * beta, beta, shrunk.sum(0), bounded, *shape)


def _refined(
    squares: np.ndarray,
    explained: np.ndarray,
    residual: np.ndarray,
    count: int,
    grid: np.ndarray,
    best: np.ndarray,
) -> np.ndarray:
    """Alpha / beta ``[M]`` where the slope is 0, between the neighbors of the best grid point."""
    low = grid[np.maximum(best - 1, 0)]
    high = grid[np.minimum(best + 1, len(grid) - 1)]
    place = grid[best]
    for _ in range(60):
        shrunk = squares[:, None] / (squares[:, None] + np.exp(place))
        bend = shrunk * (1 - shrunk)
        spread = residual + ((1 - shrunk) * explained).sum(0)
        rise = (bend * explained).sum(0) / spread
        slope = 0.5 * (shrunk.sum(0) - count * rise)
        turn = -(bend * (1 - 2 * shrunk) * explained).sum(0) / spread - rise**2
        curvature = -0.5 * (count * turn + bend.sum(0))
        low, high = np.where(slope > 0, place, low), np.where(slope > 0, high, place)
        # Newton's step where it stays inside of what is known to hold the maximum, else halving.
        step = np.divide(-slope, curvature, out=np.full_like(slope, np.inf), where=curvature < 0)
        inside = (place + step > low) & (place + step < high)
        after = np.where(inside, place + step, (low + high) / 2)
        moved = np.abs(after - place).max()
        place = after
        if moved < 1e-12 * max(1.0, np.abs(place).max()):
            break
    return np.exp(place)
