"""What a target and a validation tell about each share: variances, and what they cannot tell."""

from __future__ import annotations

import dataclasses

import numpy as np

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.prevalence.influence import scale_response, validation_variance
from flaxtransfer.shift.prevalence.likelihood import Maximum, blocks, information

__all__ = ["Precision", "Sample", "observed_information", "precision", "weakest_direction"]

_OBSERVED_ROWS = 500
"""Rows for each class that tell how the target's scores move together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What a likelihood of prevalence is made of.

    Args:
        probabilities: `[m, K]`, calibrated, of the target; float32 or float64.
        source: the calibration.
        labelled: `[K]`, how many target examples have which label.
        pseudo: `[K]`, what a Dirichlet prior counts for, a - 1.
        weights: `[m]`, 0 for rows that do not count; None where all do.
    """

    probabilities: np.ndarray
    source: Calibration
    labelled: np.ndarray
    pseudo: np.ndarray
    weights: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """`[K]`, all that is added to the likelihood as ``counts @ log(q)``."""
        return self.labelled + self.pseudo

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
    seen = sample.labelled > 0
    matrix[seen, seen] += sample.labelled[seen] / q[seen] ** 2
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
