"""How far a finite validation moves an estimate of prevalence: the delta method.

The calibration and the source's prior are estimates too. A validation example pulls at both, and
through them at every share.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.prevalence.likelihood import blocks

__all__ = ["influences", "scale_response", "validation_variance"]

_RESPONSE_ROWS = 200
"""Rows for each class that the effect of a scale is averaged over."""


def influences(source: Calibration) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What every validation example did to ``bias - log p`` and to the scale, in blocks.

    The two are one parameter for the target: a class that got a larger bias, and a class that got
    a smaller prior, have larger ratios f / p. An example's influence divided by n is what the
    parameters lose without it; its variance divided by n is theirs.

    Args:
        source: with its method, which says what was fitted: nothing, a temperature, biases.

    Yields:
        `[b, K]`, and `[b, S]`: no column without a fitted scale, one for a temperature, K for a
        scale of each class.

    References:
        F. R. Hampel, "The influence curve and its role in robust estimation", 1974.
    """
    inverse, pulls = _parameters(source)
    divisor = np.where(source.prior > 0, source.prior, np.inf)
    scales = _scales(source)
    for posteriors, scores in _validation(source):
        fitted = scores @ inverse
        offsets = -((posteriors - source.prior) + fitted @ pulls) / divisor
        if fitted.shape[1] > scales:
            offsets += fitted[:, scales:]
        yield offsets, fitted[:, :scales]


def validation_variance(
    source: Calibration, by_offset: np.ndarray, by_scale: np.ndarray
) -> np.ndarray:
    """Variance `[D]` of numbers that depend on calibration and prior.

    Args:
        source: with its validation.
        by_offset: `[K, D]`, their derivatives with respect to ``bias - log p``.
        by_scale: `[S, D]`, and to the scale.
    """
    total, squares = np.zeros(by_offset.shape[1]), np.zeros(by_offset.shape[1])
    for offsets, scales in influences(source):
        moved = offsets @ by_offset + scales @ by_scale
        total += moved.sum(0)
        squares += np.square(moved).sum(0)
    count = len(source.labels)
    return np.maximum(squares / count - np.square(total / count), 0) / count


def scale_response(
    source: Calibration, probabilities: np.ndarray, prevalence: np.ndarray
) -> np.ndarray:
    """Change of the target's mean scores with each scale, `[K, S]`.

    Args:
        source: the calibration.
        probabilities: `[m, K]`, of the target.
        prevalence: `[K]`, where the scores are taken.
    """
    scales, classes = _scales(source), source.classes
    found = np.zeros((classes, scales))
    if not scales:
        return found
    divisor = np.where(source.prior > 0, source.prior, np.inf)
    ratios = prevalence / divisor
    some = probabilities[:: max(1, len(probabilities) // (_RESPONSE_ROWS * classes))]
    for part, _ in blocks(some):
        density = part @ ratios
        scores = part / np.where(density > 0, density, np.inf)[:, None] / divisor
        corrected = scores * prevalence
        logits = _logits(source, part)
        if source.method == "vector":
            found += np.diag((scores * logits).sum(0)) - scores.T @ (corrected * logits)
        else:
            logits -= (corrected * logits).sum(1, keepdims=True)
            found[:, 0] += (scores * logits).sum(0)
    return found / len(some)


def _scales(source: Calibration) -> int:
    return {"none": 0, "vector": source.classes}.get(source.method, 1)


def _logits(source: Calibration, posteriors: np.ndarray) -> np.ndarray:
    """What the calibration took for input: logits whose rows sum to 0."""
    found = (np.log(np.maximum(posteriors, 1e-300)) - source.bias) / source.scale
    # The logarithm of a posterior lacks a constant of its row, before the scale.
    return found - found.sum(1, keepdims=True) / (1 / source.scale).sum() / source.scale


def _validation(source: Calibration) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Posteriors, and scores of the fitted parameters, scales first."""
    for posteriors, rows in blocks(source.probabilities):
        residual = -posteriors
        residual[np.arange(len(posteriors)), source.labels[rows]] += 1
        parts = [np.zeros((len(posteriors), 0))]
        if _scales(source):
            pulled = residual * _logits(source, posteriors)
            parts += [pulled if source.method == "vector" else pulled.sum(1, keepdims=True)]
        if source.method in ("bias_corrected", "vector"):
            parts += [residual]
        yield posteriors, np.concatenate(parts, 1)


def _parameters(source: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Inverse information `[P, P]` of the fitted parameters, and their pull on p, `[P, K]`."""
    width = _scales(source)
    biased = source.method in ("bias_corrected", "vector")
    scale_scale, scale_bias = np.zeros((width, width)), np.zeros((width, source.classes))
    bias_bias = np.zeros((source.classes,) * 2)
    for posteriors, _ in blocks(source.probabilities):
        if biased:
            bias_bias += np.diag(posteriors.sum(0)) - posteriors.T @ posteriors
        logits = _logits(source, posteriors)
        if source.method != "vector":
            logits -= (posteriors * logits).sum(1, keepdims=True)
        weighted = posteriors * logits
        if source.method == "vector":
            scale_scale += np.diag((weighted * logits).sum(0)) - weighted.T @ weighted
            scale_bias += np.diag(weighted.sum(0)) - weighted.T @ posteriors
        elif width:
            scale_scale += (weighted * logits).sum()
            scale_bias += weighted.sum(0)
    # A bias moves the logits as a scale moves them: their informations are covariances of logits
    # under the posteriors, and the pull on a mean posterior is one of them with its bias.
    rows = [np.concatenate([scale_scale, scale_bias], 1)]
    if biased:
        rows += [np.concatenate([scale_bias.T, bias_bias], 1)]
    whole = np.concatenate(rows) / len(source.labels)
    fitted = len(whole)
    matrix = whole[:, :fitted] if biased else whole[:, :width]
    return np.linalg.pinv(matrix, rcond=1e-10, hermitian=True), whole[:, width:]
