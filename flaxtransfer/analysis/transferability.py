"""Transferability scores: H-score, LEEP, LogME.

Scores that rank pre-trained networks, or layers, for a labeled target without training a head.
Each is reported with its permutation null.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from flaxtransfer.analysis.distances import pooled_coordinates
from flaxtransfer.shift.checks import (
    as_features,
    as_probabilities,
    repeated_row_notes,
    uncertain_rows,
)
from flaxtransfer.shift.statistics import (
    Transferability,
    encode_labels,
    null_summary,
    random_permutations,
)
from flaxtransfer.shift.two_sample import ledoit_wolf

__all__ = ["LogEvidence", "h_score", "leep", "log_evidence", "logme"]


def h_score(
    features: Any, labels: Any, *, regularized: bool = True, permutations: int = 199, seed: int = 0
) -> Transferability:
    """H-score: tr(cov(features)^-1 cov(class means)), regularized; between 0 and C - 1.

    Use it as the fastest score of how well features separate classes; only means are fitted.
    Without shrinkage it is C - 1, for noise and for signal, as soon as there are as many features
    as examples. It weights directions of small and large variance alike, and so may reward ones
    that no head trained by gradient descent would use.

    Args:
        features: ``[N, D]``.
        labels: ``[N]``, class numbers; classes without examples are left out.
        regularized: (1 - s) tr(cov_s^-1 cov(class means)), with s of Ledoit and Wolf; else the
            score of Bao et al. with a pseudo-inverse.
        permutations: random permutations of the labels.
        seed: of the permutations.

    Returns:
        A ``Transferability`` without unit. All covariances are divided by N.

    Raises:
        ValueError: fewer than 4 examples, one class, NaN, or constant features.

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
    classes, count = encode_labels(labels, len(features))
    examples, width = features.shape
    if not np.ptp(features, axis=0).any():
        raise ValueError(
            "features must not be constant over all examples: they would not separate classes"
        )
    centered = pooled_coordinates(features)
    variances, vectors = np.linalg.eigh(centered.T @ centered / examples)
    kept = variances > 1e-12 * variances[-1]
    rotated, variances = centered @ vectors[:, kept], variances[kept]
    intensity, floor = ledoit_wolf(centered, width) if regularized else (0.0, 0.0)
    # The factor of each direction is one number, so that whitening includes it.
    white = rotated * np.sqrt(
        (1 - intensity) / ((1 - intensity) * variances + intensity * floor) / examples
    )
    one_hot = np.eye(count)[classes] / np.sqrt(np.bincount(classes))

    def score(order: np.ndarray) -> float:
        means = one_hot[order].T @ white
        return float(np.einsum("ij,ij->", means, means))

    value = score(np.arange(examples))
    null = np.array([score(order) for order in random_permutations(examples, permutations, seed)])
    notes = repeated_row_notes(features, "feature")
    if regularized:
        notes += (f"shrinkage {intensity:.3g}",)
    elif kept.sum() == examples - 1:
        notes += (f"{examples} examples of {width} features: C - 1 for any labels",)
    return Transferability(
        "H-score, regularized" if regularized else "H-score",
        counts=(examples, width, count),
        notes=notes,
        **null_summary(value, null),
    )


def leep(
    source_probabilities: Any, labels: Any, *, permutations: int = 199, seed: int = 0
) -> Transferability:
    """LEEP: mean log-probability of the target labels, given predicted source classes.

    Target classes are predicted as sum_z p(y | z) p(z | x), with p(y | z) from joint counts of
    labels and source predictions. Use it for networks with a source head whose features you do not
    want to store. It is optimistic, because p(y | z) is estimated and evaluated on the same
    examples: read ``excess``. With a poor source head it ranks worse than scores of features.

    Args:
        source_probabilities: ``[N, Z]``, of the source's Z classes, for target examples.
        labels: ``[N]``, target class numbers; classes without examples are left out.
        permutations: random permutations of the labels.
        seed: of the permutations.

    Returns:
        A ``Transferability`` in nats per example, at most 0.

    Raises:
        ValueError: fewer than 4 examples, one target class, or rows that are not probabilities.

    >>> found = leep([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], [0, 0, 1, 1])
    >>> (found.value, found.notes)
    (0.0, ('1 source classes have no mass and were left out',))

    References:
        C. V. Nguyen, T. Hassner, M. Seeger, C. Archambeau, "LEEP: a new measure to evaluate
        transferability of learned representations", 2020.
    """
    given = as_probabilities(source_probabilities, "source probabilities")
    classes, count = encode_labels(labels, len(given))
    # A class without mass is left out; dividing by its mass would be 0 / 0.
    mass = given.sum(0)
    found = given[:, mass > 0]
    shares = found / mass[mass > 0]
    one_hot = np.eye(count)[classes]

    def score(order: np.ndarray) -> float:
        conditional = one_hot[order].T @ shares
        likelihood = (found @ conditional.T)[np.arange(len(found)), classes[order]]
        return float(np.log(np.minimum(likelihood, 1.0)).mean())

    value = score(np.arange(len(found)))
    null = np.array([score(order) for order in random_permutations(len(found), permutations, seed)])
    empty = int((mass == 0).sum())
    notes = repeated_row_notes(uncertain_rows(given), "uncertain")
    if empty:
        notes += (f"{empty} source classes have no mass and were left out",)
    return Transferability(
        "LEEP",
        counts=(len(given), given.shape[1], count),
        unit="nats per example",
        notes=notes,
        **null_summary(value, null),
    )


def logme(features: Any, labels: Any, *, permutations: int = 199, seed: int = 0) -> Transferability:
    """LogME: mean log-evidence per example and class of a Bayesian linear head; larger is better.

    Use it to rank networks, or layers, for a small labeled set without training a head. Classes are
    regression targets (0 or 1 each, one against the rest), so that it is not a likelihood of
    labels. For N < D it differs from implementations that leave out the (D - rank) / 2 log(alpha)
    of the weights that no example determines, whose values are then meaningless.

    Args:
        features: ``[N, D]``, as the head sees them; no intercept is added.
        labels: ``[N]``, class numbers; classes without examples are left out.
        permutations: random permutations of the labels.
        seed: of the permutations.

    Returns:
        A ``Transferability`` in nats per example. ``effective_parameters`` counts the effective
        weights of all classes, out of D * C: the P of "parameters per example" for a head.

    Raises:
        ValueError: fewer than 4 examples, one class, NaN, or constant features.

    >>> found = logme([[0.0], [0.1], [1.0], [0.9], [0.0], [1.0]], [0, 0, 1, 1, 0, 1])
    >>> found.value > found.null_mean
    True

    References:
        K. You, Y. Liu, J. Wang, M. Long, "LogME: practical assessment of pre-trained models for
        transfer learning", 2021.
    """
    features = as_features(features, "features")
    classes, count = encode_labels(labels, len(features))
    if not np.ptp(features, axis=0).any():
        raise ValueError(
            "features must not be constant over all examples: they would not separate classes"
        )
    left, squares = _left_svd(features)
    one_hot = np.eye(count)[classes]
    own = _maximum(squares, (left.T @ one_hot) ** 2, one_hot.sum(0), features.shape)
    value = own.log_evidence.mean() / len(features)

    chunk = max(1, _CHUNK // (len(squares) * count))
    null: list[float] = []
    waiting: list[np.ndarray] = []
    for order in random_permutations(len(features), permutations, seed):
        waiting.append((left.T @ one_hot[order]) ** 2)
        if len(waiting) == chunk or len(null) + len(waiting) == permutations:
            found = _maximum(
                squares,
                np.concatenate(waiting, axis=1),
                np.tile(one_hot.sum(0), len(waiting)),
                features.shape,
            )
            null.extend(found.log_evidence.reshape(-1, count).mean(1) / len(features))
            waiting = []
    notes = repeated_row_notes(features, "feature")
    if not own.bounded.all():
        notes += (
            f"features determine {int((~own.bounded).sum())} classes without error: their evidence "
            "is that of the smallest noise tried",
        )
    return Transferability(
        "LogME",
        counts=(len(features), features.shape[1], count),
        unit="nats per example",
        effective_parameters=float(own.effective_parameters.sum()),
        notes=notes,
        **null_summary(value, np.array(null)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LogEvidence:
    """Maximum evidence of Bayesian linear regressions, one per column of targets.

    The model is ``targets = features @ w + noise``, with precision alpha of w and beta of the
    noise. Targets are Gaussian with covariance ``I / beta + features @ features.T / alpha``.

    Args:
        log_evidence: ``[M]``, log-density of each column of targets, in nats.
        alpha: ``[M]``, precision of the weights; above 4e8 times beta per squared singular value if
            features explain nothing.
        beta: ``[M]``, precision of the noise.
        effective_parameters: ``[M]``, number of the D weights that the targets determine.
        bounded: ``[M]``, False if features explain the targets without noise: the evidence then
            grows without bound as the noise vanishes, and is that of the smallest noise tried.
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
    """Evidence of linear regressions, maximized over alpha and beta; exact for any N and D.

    Use it for numeric targets; for classes see ``logme``. There is no intercept: append a constant
    feature if you need one. The maximum is global: a grid over alpha / beta is searched before the
    best cell is refined.

    Args:
        features: ``[N, D]``.
        targets: ``[N, M]``, or ``[N]`` for M = 1.

    Raises:
        ValueError: fewer than 2 rows, NaN, different numbers of rows; features or targets that are
            all 0.

    >>> line = np.arange(1.0, 9.0)
    >>> found = log_evidence(line[:, None], line + [0.1, -0.1] * 4)
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
            "features and targets must have the same number of rows, at least 2, got "
            f"{len(features)} and {len(columns)}"
        )
    if not columns.any(0).all():
        raise ValueError("a column of targets is all 0, so that its evidence has no maximum")
    left, squares = _left_svd(features)
    return _maximum(squares, (left.T @ columns) ** 2, (columns**2).sum(0), features.shape)


_BELOW, _ABOVE, _STEP = -22.0, 20.0, 0.5
"""Grid of log(alpha / beta) relative to the largest squared singular value; constant beyond."""

_CHUNK = 4_000_000
"""Numbers per array of singular values times columns: 32 MB."""


def _left_svd(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors ``[N, rank]`` and squared singular values ``[rank]``."""
    left, scale, _ = np.linalg.svd(features, full_matrices=False)
    kept = scale > scale[0] * max(features.shape) * np.finfo(np.float64).eps
    if not kept.any():
        raise ValueError("features must not be all 0: they would explain nothing")
    return left[:, kept], scale[kept] ** 2


def _maximum(
    squares: np.ndarray, explained: np.ndarray, total: np.ndarray, shape: tuple[int, ...]
) -> LogEvidence:
    """The best alpha and beta of every column.

    Only the ratio r = alpha / beta has to be searched. Given r, 1 / beta is Q / N
    with Q = residual + sum_i explained_i r / (squares_i + r), and the log-evidence is
    -N/2 (log(2 pi Q / N) + 1) - 1/2 sum_i log(1 + squares_i / r). Directions that no example
    determines add log(alpha) to the determinants of both prior and posterior, and cancel.

    Args:
        squares: ``[rank]``, squared singular values.
        explained: ``[rank, M]``, squared coordinates of the targets.
        total: ``[M]``, squared lengths of the targets.
        shape: N and D.
    """
    count = shape[0]
    # With no more examples than the rank, the residual is rounding.
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
    """Alpha / beta ``[M]`` of slope 0, between the neighbors of the best grid point."""
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
        # Newton's step if it stays inside the bracket of the maximum, else bisection.
        step = np.divide(-slope, curvature, out=np.full_like(slope, np.inf), where=curvature < 0)
        inside = (place + step > low) & (place + step < high)
        after = np.where(inside, place + step, (low + high) / 2)
        moved = np.abs(after - place).max()
        place = after
        if moved < 1e-12 * max(1.0, np.abs(place).max()):
            break
    ratio: np.ndarray = np.exp(place)
    return ratio
