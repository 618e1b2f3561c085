"""Variances of prevalence: observed information and the delta method.

How far a finite validation moves an estimate of prevalence: the delta method.

The calibration and the source's prior are estimates too. A validation example pulls at both, and
through them at every share.

What a target and a validation tell about each share: variances, and what they cannot tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.likelihood import Maximum, blocks, information

__all__ = [
    "Precision",
    "Sample",
    "influences",
    "observed_information",
    "precision",
    "scale_response",
    "validation_variance",
    "weakest_direction",
]


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


_OBSERVED_ROWS = 500
"""Rows for each class that tell how the target's scores move together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What a likelihood of prevalence is made of.

    Args:
        probabilities: `[m, K]`, calibrated, of the target; float32 or float64.
        source: the calibration.
        labeled: `[K]`, how many target examples have which label.
        pseudo: `[K]`, what a Dirichlet prior counts for, a - 1.
        weights: `[m]`, 0 for rows that do not count; None where all do.
    """

    probabilities: np.ndarray
    source: Calibration
    labeled: np.ndarray
    pseudo: np.ndarray
    weights: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """`[K]`, all that is added to the likelihood as ``counts @ log(q)``."""
        return self.labeled + self.pseudo

    @property
    def divisor(self) -> np.ndarray:
        """`[K]`, the source's prior, infinite where it is zero: such classes play no part."""
        return np.where(self.source.prior > 0, self.source.prior, np.inf)

    @property
    def rows(self) -> float:
        """How many rows count."""
        return float(len(self.probabilities) if self.weights is None else self.weights.sum())

    @property
    def total(self) -> float:
        """Rows and counts."""
        return self.rows + float(self.counts.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Precision:
    """What target and validation tell about each share.

    Args:
        directions: `[K, K]`; column k is how the other shares follow best when share k grows by 1.
        target: `[K]`, variances from the target alone.
        validation: `[K]`, variances from the validation that fixed calibration and source prior.
        ambiguity: `[K]`, what the variance of a target example has beyond that of a certain label.
        inside: `[K]`, the estimate with half an example more of each class.
    """

    directions: np.ndarray
    target: np.ndarray
    validation: np.ndarray
    ambiguity: np.ndarray
    inside: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """`[K]`, standard errors."""
        return np.sqrt(self.target + self.validation)


def observed_information(sample: Sample, maximum: Maximum) -> np.ndarray:
    """`[K, K]`, of a row, averaged over all of them or over enough of them."""
    q, divisor = maximum.estimate, sample.divisor
    stride = max(1, len(sample.probabilities) // (_OBSERVED_ROWS * len(q)))
    some = None if sample.weights is None else sample.weights[::stride]
    return information(sample.probabilities[::stride], q / divisor, divisor, some)


def weakest_direction(
    sample: Sample, maximum: Maximum, observed: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """The direction that the target says least about, `[K]` of length 1, and its standard error.

    An error of 1 is as large as a share can be: such a target determines nothing along there. Only
    shares that can move count; one at zero, with a slope that holds it there, is determined.
    """
    q, free, divisor = maximum.estimate, _free(maximum), sample.divisor
    direction = np.zeros(len(q))
    if free.sum() < 2:
        return 0.0, direction
    if observed is None:
        observed = information(sample.probabilities, q / divisor, divisor, sample.weights)
    matrix = observed * sample.rows
    seen = sample.labeled > 0
    matrix[seen, seen] += sample.labeled[seen] / q[seen] ** 2
    # A basis of the moves that leave the sum alone.
    axes = np.concatenate([np.ones((free.sum(), 1)), np.eye(int(free.sum()))[:, 1:]], 1)
    tangent = np.linalg.qr(axes)[0][:, 1:]
    values, vectors = np.linalg.eigh(tangent.T @ matrix[np.ix_(free, free)] @ tangent)
    direction[free] = tangent @ vectors[:, 0]
    return float(1 / np.sqrt(max(values[0], 1e-300))), direction


def precision(sample: Sample, maximum: Maximum, observed: np.ndarray) -> Precision:
    """Variances of the shares, and how the others follow each of them.

    From the expected information, averaged over the examples of target and validation together,
    each as likely as the estimate makes it: the observed one knows nothing of a class that the
    target does not show. Half an example more of each class keeps shares off the border.
    """
    source, q, divisor = sample.source, maximum.estimate, sample.divisor
    classes, usable = len(q), np.isfinite(divisor)
    total = sample.total
    inside = np.where(usable, (total * q + 0.5) / (total + usable.sum() / 2), 0.0)
    matrix = np.zeros((classes, classes))
    validation = len(source.labels)
    for array, weights in ((sample.probabilities, sample.weights), (source.probabilities, None)):
        for part, rows in blocks(array, 8):
            ratios = part @ (inside / divisor)
            mixture = sample.rows * (part @ (q / divisor)) + validation
            factor = sample.rows / np.where(ratios > 0, ratios * mixture, np.inf)
            if weights is not None:
                factor *= weights[rows]
            scores = part * np.sqrt(factor)[:, None]
            matrix += scores.T @ scores
    matrix /= np.outer(divisor, divisor)
    matrix[usable, usable] += sample.counts[usable] / inside[usable] ** 2
    free = _free(maximum) & usable
    if free.sum() == 1:
        # From the only share there is, the way leads to its likeliest rival.
        free[np.argmax(np.where(free | ~usable, -np.inf, maximum.slopes))] = True
    directions, known = _follow(matrix, free, usable)
    target = np.where(known > 0, 1 / np.where(known > 0, known, 1), np.inf)
    target[~usable] = 0.0
    # What calibration and prior move is moved through the scores of the target.
    response = np.diag(observed @ q) - observed * q
    along = directions * (target * sample.rows)
    moved = validation_variance(
        source,
        response.T @ along,
        scale_response(source, sample.probabilities, q).T @ along,
    )
    return Precision(
        directions=directions,
        target=target,
        validation=moved,
        ambiguity=np.maximum(total * target - inside * (1 - inside), 0),
        inside=inside,
    )


def _free(maximum: Maximum) -> np.ndarray:
    return (maximum.estimate > 0) | (maximum.slopes > 1 - 1e-6)


def _follow(
    matrix: np.ndarray, free: np.ndarray, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Directions in which only the free shares follow, and the information along each."""
    classes = len(matrix)
    directions = np.zeros((classes, classes))
    part = matrix[np.ix_(free, free)]
    inverse = np.linalg.pinv(part, rcond=1e-13, hermitian=True)
    sums = inverse.sum(1)
    covariance = inverse - np.outer(sums, sums) / sums.sum()
    spread = np.maximum(np.diag(covariance), 1e-300)
    directions[np.ix_(free, free)] = covariance / spread
    known = np.zeros(classes)
    known[free] = 1 / spread
    rest = usable & ~free
    pull = inverse @ matrix[np.ix_(free, rest)]
    step = -pull + np.outer(sums, (pull.sum(0) - 1) / sums.sum())
    directions[np.ix_(free, rest)] = step
    directions[rest, rest] = 1.0
    known[rest] = (
        np.diag(matrix)[rest]
        + 2 * (step * matrix[np.ix_(free, rest)]).sum(0)
        + (step * (part @ step)).sum(0)
    )
    return directions, known
