"""Black box shift estimation: prevalence from a confusion matrix and the mean prediction.

It asks less than a likelihood: the model need not be calibrated, only be wrong in the same way on
source and target. It also knows less, and with the same data its intervals are wider.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from flaxtransfer.shift.prevalence.likelihood import blocks
from flaxtransfer.shift.prevalence.simplex import simplex_least_squares

__all__ = ["BlackBox", "black_box", "joint_confusion", "mean_prediction", "rates", "shares"]


@dataclasses.dataclass(frozen=True, eq=False)
class BlackBox:
    """What a confusion matrix says about a target.

    Args:
        estimate: `[K]`, the shares that fit best.
        raw: `[K]`, by the inverse, whatever their signs; NaN where there is no inverse.
        matrix: `[K, K]`, P(predicted i, class j) at the source.
        frequency: `[K]`, of the labels at the source.
        predicted: `[K]`, mean prediction on the target.
        condition: of the matrix.
        smallest: singular value of the matrix.
        confused: the two classes that can be told apart least.
        weakest: standard error of the raw shares along the direction known least.
    """

    estimate: np.ndarray
    raw: np.ndarray
    matrix: np.ndarray
    frequency: np.ndarray
    predicted: np.ndarray
    condition: float
    smallest: float
    confused: tuple[int, int]
    weakest: float


def black_box(
    target: np.ndarray, validation: np.ndarray, labels: np.ndarray, *, hard: bool = False
) -> BlackBox:
    """Solves ``P(predicted) = sum_k P(predicted | class k) q_k`` for the shares q.

    Args:
        target: `[m, K]`, probabilities.
        validation: `[n, K]`, probabilities of the source.
        labels: `[n]`, their classes, int64.
        hard: count the most probable class; else add up probabilities.

    Returns:
        Shares on the simplex by least squares, and the raw solution with its diagnosis.

    >>> found = black_box(np.eye(2)[[0, 0, 0, 1]], np.eye(2), np.array([0, 1]))
    >>> found.estimate
    array([0.75, 0.25])

    References:
        Z. C. Lipton, Y.-X. Wang, A. J. Smola, "Detecting and correcting for label shift with black
        box predictors", 2018.
    """
    matrix = joint_confusion(validation, labels, hard=hard)
    frequency = np.bincount(labels, minlength=matrix.shape[1]) / len(labels)
    predicted = mean_prediction(target, hard=hard)
    conditional = rates(matrix, frequency)
    left, values, right = np.linalg.svd(conditional)
    singular = np.linalg.svd(matrix, compute_uv=False)
    possible = bool(values[-1] > 1e-12 * values[0])
    raw = np.linalg.solve(conditional, predicted) if possible else np.full(len(predicted), np.nan)
    estimate = shares(conditional, predicted, raw)
    noise = _noise(target, left[:, -1], hard) / len(target)
    noise += _validation_noise(validation, labels, left[:, -1], estimate, frequency, hard)
    return BlackBox(
        estimate=estimate,
        raw=raw,
        matrix=matrix,
        frequency=frequency,
        predicted=predicted,
        condition=float(singular[0] / singular[-1]) if singular[-1] > 0 else np.inf,
        smallest=float(singular[-1]),
        confused=_opposites(right[-1]),
        weakest=float(np.sqrt(noise) / values[-1]) if possible else np.inf,
    )


def shares(conditional: np.ndarray, predicted: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """The raw solution where it is one, and least squares on the simplex where it is not."""
    # Columns and predictions sum to 1, so the raw shares do too: without negative ones they fit
    # exactly, and nothing fits better.
    if np.isfinite(raw).all() and (raw >= 0).all():
        return raw / raw.sum()
    return simplex_least_squares(conditional, predicted)


def joint_confusion(
    probabilities: np.ndarray, labels: np.ndarray, *, hard: bool = False
) -> np.ndarray:
    """P(predicted i, class j), `[K, K]`, which sums to 1.

    >>> joint_confusion(np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([0, 1]))
    array([[0.375, 0.25 ],
           [0.125, 0.25 ]])
    """
    found = np.zeros((probabilities.shape[1],) * 2)
    for part, rows in blocks(probabilities):
        classes = np.eye(len(found))[labels[rows]]
        found += predictions(part, hard).T @ classes
    return found / len(labels)


def mean_prediction(probabilities: np.ndarray, *, hard: bool = False) -> np.ndarray:
    """Mean probabilities, or shares of the most probable class, `[K]`.

    >>> mean_prediction(np.array([[0.75, 0.25], [1.0, 0.0]]))
    array([0.875, 0.125])
    """
    found = np.zeros(probabilities.shape[1])
    for part, _ in blocks(probabilities):
        found += predictions(part, hard).sum(0)
    return found / len(probabilities)


def rates(matrix: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """P(predicted i | class j); a column of zeros for a class without examples."""
    return matrix / np.where(frequency > 0, frequency, np.inf)


def predictions(part: np.ndarray, hard: bool) -> np.ndarray:
    """Rows that sum to exactly 1, one-hot if `hard`."""
    if hard:
        return np.eye(part.shape[1])[part.argmax(1)]
    return part / part.sum(1, keepdims=True)


def _opposites(vector: np.ndarray) -> tuple[int, int]:
    """The largest entry and the largest of the other sign: what is exchanged unseen."""
    first = int(np.argmax(np.abs(vector)))
    rivals = -vector * np.sign(vector[first])
    rivals[first] = -np.inf
    second = int(np.argmax(rivals))
    return min(first, second), max(first, second)


def _noise(target: np.ndarray, along: np.ndarray, hard: bool) -> float:
    """Variance of a target's prediction along a direction."""
    total = squares = 0.0
    for part, _ in blocks(target):
        projected = predictions(part, hard) @ along
        total += float(projected.sum())
        squares += float(projected @ projected)
    return max(squares / len(target) - (total / len(target)) ** 2, 0.0)


def _validation_noise(
    validation: np.ndarray,
    labels: np.ndarray,
    along: np.ndarray,
    estimate: np.ndarray,
    frequency: np.ndarray,
    hard: bool,
) -> float:
    """What the confusion matrix adds to it: each of its columns is a mean too."""
    projected = np.concatenate([predictions(part, hard) @ along for part, _ in blocks(validation)])
    counts = np.bincount(labels, minlength=len(frequency))
    divisor = np.maximum(counts, 1)
    means = np.bincount(labels, projected, len(frequency)) / divisor
    spread = np.bincount(labels, np.square(projected - means[labels]), len(frequency)) / divisor
    return float((estimate**2 * spread / divisor).sum())
