"""Uncertainty of prevalence estimates: information, delta method and bootstrap.

What target and validation determine of each class proportion: variances for the score intervals,
and the direction that the target determines least. Calibration and source prior are estimates too;
influence functions propagate their variance to the proportions. The bootstrap resamples validation
and target; resampled rows are weights, one block at a time, so that no replicate processes the data
separately.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.confusion import joint_confusion, mean_prediction, prediction_rows
from flaxtransfer.shift.likelihood import (
    LikelihoodMaximum,
    information,
    maximize_likelihood,
    row_blocks,
)
from flaxtransfer.shift.optimize import nonnegative_quadratic

__all__ = [
    "Precision",
    "Sample",
    "confusion_replicates",
    "influence_functions",
    "likelihood_replicates",
    "observed_information",
    "percentiles",
    "precision",
    "resampled_weights",
    "scale_response",
    "validation_variance",
    "weakest_direction",
]


_RESPONSE_ROWS = 200
"""Rows per class over which the effect of a scale is averaged."""

_OBSERVED_ROWS = 500
"""Rows per class for the covariance of the target's scores."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Data of the likelihood of prevalence.

    Args:
        probabilities: ``[m, K]``, calibrated, of the target; float32 or float64.
        source: The calibration.
        labeled: ``[K]``, labeled target examples per class.
        pseudo: ``[K]``, pseudo-counts of a Dirichlet prior, a - 1.
        weights: ``[m]``, 0 for rows that are ignored; None where all count.
    """

    probabilities: np.ndarray
    source: Calibration
    labeled: np.ndarray
    pseudo: np.ndarray
    weights: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        """``[K]``, everything added to the likelihood as ``counts @ log(q)``."""
        result: np.ndarray = self.labeled + self.pseudo
        return result

    @property
    def divisor(self) -> np.ndarray:
        """``[K]``, the source prior, infinite where it is zero so that the class is ignored."""
        return np.where(self.source.prior > 0, self.source.prior, np.inf)

    @property
    def rows(self) -> float:
        """Number of rows that count."""
        return float(len(self.probabilities) if self.weights is None else self.weights.sum())

    @property
    def total(self) -> float:
        """Number of rows and counts."""
        return self.rows + float(self.counts.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Precision:
    """Variances of the class proportions.

    Args:
        directions: ``[K, K]``; column k is the change of all proportions along the profile of
            proportion k, per unit of k.
        target: ``[K]``, variances from the target.
        validation: ``[K]``, variances from the validation that fixed calibration and source prior.
        ambiguity: ``[K]``, variance per target example in excess of that of a certain label.
        inside: ``[K]``, the estimate with half an example more per class.
    """

    directions: np.ndarray
    target: np.ndarray
    validation: np.ndarray
    ambiguity: np.ndarray
    inside: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Standard errors ``[K]``."""
        result: np.ndarray = np.sqrt(self.target + self.validation)
        return result


def precision(sample: Sample, maximum: LikelihoodMaximum, observed: np.ndarray) -> Precision:
    """Variances of the proportions, and the profile direction of each.

    From the expected information, averaged over the examples of target and validation together,
    each weighted by its probability under the estimate: the observed information of the target has
    none about a class that does not occur in it. Half an example more per class keeps proportions
    inside of the simplex.
    """
    source, q, divisor = sample.source, maximum.estimate, sample.divisor
    classes, usable = len(q), np.isfinite(divisor)
    total = sample.total
    inside = np.where(usable, (total * q + 0.5) / (total + usable.sum() / 2), 0.0)
    matrix = np.zeros((classes, classes))
    validation = len(source.labels)
    for array, weights in ((sample.probabilities, sample.weights), (source.probabilities, None)):
        for part, rows in row_blocks(array, 8):
            ratios = part @ (inside / divisor)
            mixture = sample.rows * (part @ (q / divisor)) + validation
            factor = sample.rows / np.where(ratios > 0, ratios * mixture, np.inf)
            if weights is not None:
                factor *= weights[rows]
            scores = part * np.sqrt(factor)[:, None]
            matrix += scores.T @ scores
    matrix /= np.outer(divisor, divisor)
    matrix[usable, usable] += sample.counts[usable] / inside[usable] ** 2
    free = _free_classes(maximum) & usable
    if free.sum() == 1:
        # With a single positive proportion, the direction goes to the most likely other class.
        free[np.argmax(np.where(free | ~usable, -np.inf, maximum.gradient))] = True
    directions, known = _profile_directions(matrix, free, usable)
    target = np.where(known > 0, 1 / np.where(known > 0, known, 1), np.inf)
    target[~usable] = 0.0
    # Calibration and prior act through the scores of the target.
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


def observed_information(sample: Sample, maximum: LikelihoodMaximum) -> np.ndarray:
    """Observed information per row, ``[K, K]``, averaged over all rows or over a large subset."""
    q, divisor = maximum.estimate, sample.divisor
    stride = max(1, len(sample.probabilities) // (_OBSERVED_ROWS * len(q)))
    subset = None if sample.weights is None else sample.weights[::stride]
    return information(sample.probabilities[::stride], q / divisor, divisor, subset)


def weakest_direction(
    sample: Sample, maximum: LikelihoodMaximum, observed: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Least determined direction: its standard error, and the direction ``[K]`` of length 1.

    A standard error of 1 is as large as a proportion can be: such a target determines nothing along
    that direction. Only proportions that can move count; one at zero, held there by the gradient,
    is determined.
    """
    q, free, divisor = maximum.estimate, _free_classes(maximum), sample.divisor
    direction = np.zeros(len(q))
    if free.sum() < 2:
        return 0.0, direction
    if observed is None:
        observed = information(sample.probabilities, q / divisor, divisor, sample.weights)
    matrix = observed * sample.rows
    seen = sample.labeled > 0
    matrix[seen, seen] += sample.labeled[seen] / q[seen] ** 2
    # A basis of the directions that keep the sum.
    axes = np.concatenate([np.ones((free.sum(), 1)), np.eye(int(free.sum()))[:, 1:]], 1)
    tangent = np.linalg.qr(axes)[0][:, 1:]
    values, vectors = np.linalg.eigh(tangent.T @ matrix[np.ix_(free, free)] @ tangent)
    direction[free] = tangent @ vectors[:, 0]
    return float(1 / np.sqrt(max(values[0], 1e-300))), direction


def validation_variance(
    source: Calibration, by_offset: np.ndarray, by_scale: np.ndarray
) -> np.ndarray:
    """Delta method: variance ``[D]`` of quantities that depend on calibration and prior.

    Args:
        source: The calibration with its validation examples.
        by_offset: ``[K, D]``, derivatives with respect to ``bias - log p``.
        by_scale: ``[S, D]``, derivatives with respect to the scale.
    """
    total, squares = np.zeros(by_offset.shape[1]), np.zeros(by_offset.shape[1])
    for offsets, scales in influence_functions(source):
        moved = offsets @ by_offset + scales @ by_scale
        total += moved.sum(0)
        squares += np.square(moved).sum(0)
    count = len(source.labels)
    return np.maximum(squares / count - np.square(total / count), 0) / count


def influence_functions(source: Calibration) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Influence of every validation example on ``bias - log p`` and on the scale, in blocks.

    For the target the bias and the log prior are one parameter: a larger bias or a smaller prior of
    a class increases its ratio f / p. An example's influence divided by n is the change of the
    parameters when it is left out; the variance of the influence divided by n is theirs.

    Args:
        source: The calibration; its method determines what was fitted: nothing, a temperature,
            biases.

    Yields:
        ``[b, K]``, and ``[b, S]``: S = 0 without a fitted scale, 1 for a temperature, K for a scale
        per class.

    References:
        F. R. Hampel, "The influence curve and its role in robust estimation", 1974.
    """
    inverse, prior_response = _inverse_information(source)
    divisor = np.where(source.prior > 0, source.prior, np.inf)
    scales = _scale_count(source)
    for posteriors, scores in _validation_scores(source):
        fitted = scores @ inverse
        offsets = -((posteriors - source.prior) + fitted @ prior_response) / divisor
        if fitted.shape[1] > scales:
            offsets += fitted[:, scales:]
        yield offsets, fitted[:, :scales]


def scale_response(
    source: Calibration, probabilities: np.ndarray, prevalence: np.ndarray
) -> np.ndarray:
    """Derivative of the target's mean scores with respect to each scale, ``[K, S]``.

    Args:
        source: The calibration.
        probabilities: ``[m, K]``, of the target.
        prevalence: ``[K]``, where the scores are evaluated.
    """
    scales, classes = _scale_count(source), source.classes
    found = np.zeros((classes, scales))
    if not scales:
        return found
    divisor = np.where(source.prior > 0, source.prior, np.inf)
    ratios = prevalence / divisor
    subset = probabilities[:: max(1, len(probabilities) // (_RESPONSE_ROWS * classes))]
    for part, _ in row_blocks(subset):
        density = part @ ratios
        scores = part / np.where(density > 0, density, np.inf)[:, None] / divisor
        corrected = scores * prevalence
        logits = _centered_logits(source, part)
        if source.method == "vector":
            found += np.diag((scores * logits).sum(0)) - scores.T @ (corrected * logits)
        else:
            logits -= (corrected * logits).sum(1, keepdims=True)
            found[:, 0] += (scores * logits).sum(0)
    return found / len(subset)


def _scale_count(source: Calibration) -> int:
    return {"none": 0, "vector": source.classes}.get(source.method, 1)


def _centered_logits(source: Calibration, posteriors: np.ndarray) -> np.ndarray:
    """The calibration's input: logits whose rows sum to 0."""
    found = (np.log(np.maximum(posteriors, 1e-300)) - source.bias) / source.scale
    # The logarithm of a posterior is known up to a constant per row, before the scale.
    result: np.ndarray = (
        found - found.sum(1, keepdims=True) / (1 / source.scale).sum() / source.scale
    )
    return result


def _validation_scores(source: Calibration) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Posteriors, and scores of the fitted parameters, scales first."""
    for posteriors, rows in row_blocks(source.probabilities):
        residual = -posteriors
        residual[np.arange(len(posteriors)), source.labels[rows]] += 1
        parts = [np.zeros((len(posteriors), 0))]
        if _scale_count(source):
            pulled = residual * _centered_logits(source, posteriors)
            parts += [pulled if source.method == "vector" else pulled.sum(1, keepdims=True)]
        if source.method in ("bias_corrected", "vector"):
            parts += [residual]
        yield posteriors, np.concatenate(parts, 1)


def _inverse_information(source: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Inverse information ``[P, P]`` of the fitted parameters; derivatives of p, ``[P, K]``."""
    width = _scale_count(source)
    biased = source.method in ("bias_corrected", "vector")
    scale_scale, scale_bias = np.zeros((width, width)), np.zeros((width, source.classes))
    bias_bias = np.zeros((source.classes,) * 2)
    for posteriors, _ in row_blocks(source.probabilities):
        if biased:
            bias_bias += np.diag(posteriors.sum(0)) - posteriors.T @ posteriors
        logits = _centered_logits(source, posteriors)
        if source.method != "vector":
            logits -= (posteriors * logits).sum(1, keepdims=True)
        weighted = posteriors * logits
        if source.method == "vector":
            scale_scale += np.diag((weighted * logits).sum(0)) - weighted.T @ weighted
            scale_bias += np.diag(weighted.sum(0)) - weighted.T @ posteriors
        elif width:
            scale_scale += (weighted * logits).sum()
            scale_bias += weighted.sum(0)
    # Biases and scales enter the logits linearly: their information matrices are covariances under
    # the posteriors, and the derivative of a mean posterior is its covariance with its bias.
    rows = [np.concatenate([scale_scale, scale_bias], 1)]
    if biased:
        rows += [np.concatenate([scale_bias.T, bias_bias], 1)]
    whole = np.concatenate(rows) / len(source.labels)
    fitted = len(whole)
    matrix = whole[:, :fitted] if biased else whole[:, :width]
    return np.linalg.pinv(matrix, rcond=1e-10, hermitian=True), whole[:, width:]


def _free_classes(maximum: LikelihoodMaximum) -> np.ndarray:
    return (maximum.estimate > 0) | (maximum.gradient > 1 - 1e-6)


def _profile_directions(
    matrix: np.ndarray, free: np.ndarray, usable: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Directions in which only the free proportions adjust, and the information along each."""
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


_TOLERANCE = 0.01
"""In log-likelihood: a replicate this close to its maximum is within 0.15 standard errors of it."""


def likelihood_replicates(
    sample: Sample, maximum: LikelihoodMaximum, replicates: int, random: np.random.Generator
) -> np.ndarray:
    """Maximum-likelihood proportions ``[B, K]`` of resampled targets and validations.

    Labeled target examples are resampled too. Each replicate is solved, not linearized, by Newton
    steps on the simplex with the curvature at the estimate. Only the effect of the validation on
    calibration and prior is linearized.
    """
    source, classes = sample.source, sample.source.classes
    response = scale_response(source, sample.probabilities, maximum.estimate)
    parameter_changes = np.zeros((replicates, classes + response.shape[1]))
    sizes = [len(part) for part, _ in row_blocks(source.probabilities)]
    drawn = resampled_weights(sizes, replicates, random)
    for influence, weights in zip(influence_functions(source), drawn, strict=True):
        parameter_changes += (weights - 1.0) @ np.concatenate(influence, 1) / len(source.labels)
    factors, offsets = (
        np.exp(parameter_changes[:, :classes]),
        parameter_changes[:, classes:] @ response.T,
    )
    counts = np.tile(sample.pseudo, (replicates, 1))
    labeled_count = int(sample.labeled.sum())
    if labeled_count:
        counts += random.multinomial(labeled_count, sample.labeled / labeled_count, size=replicates)
    sizes = [len(part) for part, _ in row_blocks(sample.probabilities)]
    weights = np.concatenate(list(resampled_weights(sizes, replicates, random)), 1)
    if sample.weights is not None:
        weights = weights * (sample.weights > 0)
    return _solve(sample, maximum, weights, factors, offsets, counts)


def confusion_replicates(
    target: np.ndarray,
    source: Calibration,
    replicates: int,
    random: np.random.Generator,
    *,
    hard: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Confusion matrices ``[B, K, K]`` and mean predictions ``[B, K]`` of resampled data."""
    classes = source.classes
    if hard:
        # Only counts matter, and the counts of resampled rows are multinomial.
        joint = joint_confusion(source.probabilities, source.labels, hard=True)
        mean = mean_prediction(target, hard=True)
        drawn = random.multinomial(len(source.labels), joint.ravel(), size=replicates)
        matrices = drawn.reshape(replicates, classes, classes) / len(source.labels)
        means = random.multinomial(len(target), mean, size=replicates) / len(target)
        return matrices, means
    matrices = np.zeros((replicates, classes, classes))
    for part, rows, weights in _resampled(source.probabilities, replicates, random):
        labels, rates = source.labels[rows], prediction_rows(part, False)
        for k in np.unique(labels):
            matrices[:, :, k] += weights[:, labels == k] @ rates[labels == k]
    means = np.zeros((replicates, classes))
    for part, _, weights in _resampled(target, replicates, random):
        means += weights @ prediction_rows(part, False)
    return matrices / len(source.labels), means / len(target)


def percentiles(replicates: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap percentile intervals of replicates ``[B, K]``.

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
    """Bootstrap weights: how often each row was drawn, uint8 ``[B, size]`` per block.

    Every replicate draws as many rows as there are, with replacement.

    Args:
        sizes: Rows per block.
        replicates: B.
        random: Random generator.
    """
    total = sum(sizes)
    drawn = random.multinomial(total, np.divide(sizes, total), size=replicates)
    for size, sizes_drawn in zip(sizes, drawn.T, strict=True):
        first = np.repeat(np.arange(replicates) * size, sizes_drawn)
        positions = first + random.integers(size, size=len(first))
        found = np.bincount(positions, minlength=replicates * size)
        yield found.reshape(replicates, size).astype(np.uint8)


def _solve(
    sample: Sample,
    maximum: LikelihoodMaximum,
    weights: np.ndarray,
    factors: np.ndarray,
    offsets: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Proportions at which the gradient of every replicate vanishes."""
    divisor, estimate = sample.divisor, maximum.estimate
    rows = weights.sum(1, dtype=np.float64)
    total = rows + counts.sum(1)
    matrix = information(sample.probabilities, estimate / divisor, divisor, sample.weights)
    matrix *= sample.rows / (sample.rows + sample.counts.sum())
    q = np.tile(estimate, (len(weights), 1))
    # A replicate may contain a class that the estimate lacks.
    q = 0.999 * q + 0.001 * sample.source.prior
    active = np.arange(len(q))
    for _ in range(30):
        gradient = _gradients(sample, weights, q, factors, active)
        gradient = (gradient + rows[active, None] * offsets[active]) / total[active, None]
        seen = counts[active] > 0
        counts_fraction = counts[active] / total[active, None]
        gradient += np.divide(
            counts_fraction, q[active], out=np.zeros_like(counts_fraction), where=seen
        )
        unfinished = (gradient.max(1) - 1) * total[active] > _TOLERANCE
        active, gradient, counts_fraction = (
            active[unfinished],
            gradient[unfinished],
            counts_fraction[unfinished],
        )
        if not len(active):
            return q
        targets = _newton_targets(matrix, q[active], gradient, counts_fraction)
        em_step = q[active] * np.maximum(gradient, 0)
        # A little of the EM step keeps proportions positive that some row needs.
        mixed = 0.95 * targets / targets.sum(1, keepdims=True)
        mixed += 0.05 * em_step / em_step.sum(1, keepdims=True)
        q[active] = mixed / mixed.sum(1, keepdims=True)
    for number in active.tolist():
        prior = np.where(np.isfinite(divisor), divisor, 0) / factors[number]
        q[number] = maximize_likelihood(
            sample.probabilities,
            prior,
            counts=counts[number],
            weights=weights[number].astype(np.float64),
            tolerance=_TOLERANCE / total[number],
        ).estimate
    return q


def _newton_targets(
    matrix: np.ndarray, q: np.ndarray, gradient: np.ndarray, counts_fraction: np.ndarray
) -> np.ndarray:
    """Minimizers ``[A, K]`` of the quadratic models; one inverse serves all inner ones."""
    targets = np.full(q.shape, -1.0)
    if not counts_fraction.any():
        targets = q + (gradient - 1) @ np.linalg.pinv(matrix, rcond=1e-12, hermitian=True)
    for number in np.flatnonzero((targets < 0).any(1)).tolist():
        now = q[number]
        own = np.divide(
            counts_fraction[number],
            now**2,
            out=np.zeros_like(now),
            where=counts_fraction[number] > 0,
        )
        curved = matrix + np.diag(own)
        targets[number] = nonnegative_quadratic(curved, curved @ now + gradient[number] - 1)
    lost = targets.sum(1) <= 0
    targets[lost] = q[lost]
    return targets


def _gradients(
    sample: Sample, weights: np.ndarray, q: np.ndarray, factors: np.ndarray, active: np.ndarray
) -> np.ndarray:
    """Sums over the rows of the scores, ``[A, K]``, of the unfinished replicates."""
    ratios = q[active] * factors[active] / sample.divisor
    found = np.zeros(ratios.shape)
    for part, rows in row_blocks(sample.probabilities):
        density = ratios @ part.T
        found += (weights[active, rows] / np.where(density > 0, density, np.inf)) @ part
    gradients: np.ndarray = found * factors[active] / sample.divisor
    return gradients


def _resampled(
    array: np.ndarray, replicates: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, slice, np.ndarray]]:
    """Blocks of rows with the weights ``[B, b]`` of every replicate."""
    sizes = [len(part) for part, _ in row_blocks(array)]
    drawn = resampled_weights(sizes, replicates, random)
    for (part, rows), weights in zip(row_blocks(array), drawn, strict=True):
        yield part, rows, weights.astype(np.float64)
