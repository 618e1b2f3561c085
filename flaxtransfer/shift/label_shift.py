"""Tests of label shift: has the prior changed, and does that explain the features?

``prior_test`` is the likelihood-ratio test of the source's prior. ``residual_test`` is the
over-identification test of label shift: is the target a mixture of the source's classes? Its
statistic is the squared maximum mean discrepancy that no mixture removes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import (
    as_features,
    as_labels,
    as_probabilities,
    duplicate_row_notes,
    same_width,
    uncertain_rows,
)
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.marginals import noncentrality
from flaxtransfer.shift.statistics import (
    HypothesisTest,
    check_repetitions,
    detectable_squared_effect,
    permutation_p,
    untestable,
)
from flaxtransfer.shift.two_sample import as_bandwidth, gaussian_kernel, median_bandwidth, rescaled

__all__ = [
    "ClassKernel",
    "class_kernel",
    "mixture_residual",
    "prior_test",
    "residual_test",
    "simulated_residuals",
]

_PRIOR_NAME = "likelihood ratio of the prior"

_PRIOR_HYPOTHESIS = "classes are as common in the target as in the source"

_PRIOR_EFFECT = "total variation of prevalence"

_PRIOR_MIN_ROWS = 10

_RATIO_TOLERANCE = 1e-4
"""Tolerance of a likelihood ratio, far below what affects a p-value."""

_RESIDUAL_NAME = "residual of label shift"

_RESIDUAL_HYPOTHESIS = "the target's features are a mixture of the source's classes"

_RESIDUAL_EFFECT = "squared MMD that no prevalence explains"

_RESIDUAL_MIN_ROWS = 10

_MIN_ROWS_PER_CLASS = 5


def prior_test(
    target_probabilities: Any,
    source: Calibration,
    *,
    permutations: int = 499,
    seed: int = 0,
) -> HypothesisTest:
    """Likelihood-ratio test of the source's prior, by permutation.

    The most powerful test of label shift if label shift is all there is. It assumes that: a shift
    of the features that changes posteriors is detected too, and attributed to prevalence. Use
    ``residual_test`` to check whether prevalence explains it.

    Twice the log-likelihood ratio is usually compared with a chi-squared distribution of K - 1
    degrees of freedom. That treats the source's prior as known, but it is the mean of n posteriors:
    with m / n = 1 / 2 a level of 0.05 would become 0.15. So the p-value is by permutation: source
    and target posteriors are pooled and split again, and the prior and its maximum-likelihood
    alternative are estimated for each split. Under H0 the two samples are exchangeable, and the
    level is exact whether or not the posteriors are calibrated. Only the calibration map, fitted on
    one side, is not exchangeable, which matters little: with biases of four classes fitted on 100
    or 600 examples a level of 0.053 was measured.

    Args:
        target_probabilities: ``[m, K]``, calibrated by ``source``.
        source: Calibrated probabilities of held-out source examples.
        permutations: Each with its own maximum.
        seed: Of the permutations.

    Returns:
        A test whose statistic is twice the log-likelihood ratio. ``minimum_detectable`` is found
        whichever classes change, to first order.

    Raises:
        ValueError: Invalid probabilities, different classes, or fewer than 19 permutations.

    >>> from flaxtransfer.shift.calibration import Calibration
    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(2, size=200)
    >>> positive = 1 / (1 + np.exp(-(4 * labels - 2 + 2 * rng.normal(size=200))))
    >>> probabilities = np.stack([1 - positive, positive], 1)
    >>> source = Calibration("none", np.ones(2), np.zeros(2), probabilities[:100], labels[:100])
    >>> prior_test(probabilities[100:], source).rejected()
    False
    >>> prior_test(probabilities[100:][labels[100:] == 1], source).rejected()
    True

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002 (the likelihood-ratio test).
    """
    target = as_probabilities(target_probabilities, "target probabilities")
    validation = as_probabilities(source.probabilities, "source probabilities")
    same_width(validation, "source probabilities", target, "target probabilities")
    check_repetitions(permutations, "permutations")
    counts = (len(validation), len(target))
    notes = duplicate_row_notes(uncertain_rows(validation), uncertain_rows(target))

    untested = partial(
        untestable,
        _PRIOR_NAME,
        _PRIOR_HYPOTHESIS,
        effect_name=_PRIOR_EFFECT,
        counts=counts,
        notes=notes,
    )

    if min(counts) < _PRIOR_MIN_ROWS:
        return untested(f"{counts[0]} and {counts[1]} rows; each side needs >= {_PRIOR_MIN_ROWS}")
    pooled = np.concatenate([validation, target])
    varies = np.ptp(pooled, axis=0) > 0
    if not varies.any():
        return untested("all posteriors are equal and contain no information about the class")

    rng = np.random.default_rng(seed)
    # The pooled rows that count as target, first the true ones.
    rows = np.empty((1 + permutations, counts[1]), np.int64)
    rows[0] = np.arange(counts[0], len(pooled))
    for number in range(1, len(rows)):
        rows[number] = rng.permutation(len(pooled))[: counts[1]]
    total = pooled.sum(0)
    priors = np.stack([total - pooled[row].sum(0) for row in rows]).clip(0) / counts[0]
    proportions, ratios = maximize_resampled(
        pooled, rows, priors, tolerance=_RATIO_TOLERANCE / (2 * counts[1])
    )
    statistics = 2 * ratios
    return HypothesisTest(
        name=_PRIOR_NAME,
        hypothesis=_PRIOR_HYPOTHESIS,
        statistic=float(statistics[0]),
        p=permutation_p(float(statistics[0]) - _RATIO_TOLERANCE, statistics[1:]),
        effect=float(np.abs(proportions[0] - priors[0]).sum() / 2),
        effect_name=_PRIOR_EFFECT,
        minimum_detectable=_detectable_total_variation(pooled[:, varies], counts),
        counts=counts,
        assumptions=(
            "examples are independent",
            "under the alternative: each class looks in the target as it does in the source",
        ),
        notes=notes,
    )


def residual_test(
    source_features: Any,
    target_features: Any,
    target_probabilities: Any,
    source: Calibration,
    *,
    simulations: int = 499,
    bandwidth: float | None = None,
    max_rows: int = 5000,
    seed: int = 0,
) -> HypothesisTest:
    """Over-identification test of label shift: is the target a mixture of the source's classes?

    Under label shift the target's features are a mixture, p_t(h) = sum_k q_k p_s(h | k). Where it
    is rejected the features shifted as well, and an estimated prevalence is biased. Where it is
    not, label shift is not proven: a shift along the differences between classes is not detected.
    Confusion matrices alone never reject; they have as many equations as unknowns.

    The statistic is the unbiased squared maximum mean discrepancy between the target and the
    source's classes, mixed by the maximum-likelihood prevalence of the target's posteriors. Its
    null distribution is a parametric bootstrap of the whole procedure: draw a source class by
    class, and a target with the estimated proportions, both from the source's examples; estimate
    prior and prevalence again; compute the statistic. Two independent draws from one set of
    examples represent two samples of one population, so that all examples serve both.

    Args:
        source_features: ``[n, D]`` of the held-out examples of ``source``, in their order.
        target_features: ``[m, D]``.
        target_probabilities: ``[m, K]`` of the same target examples, calibrated by ``source``.
        source: Calibrated probabilities and labels of held-out source examples.
        simulations: Bootstrap draws.
        bandwidth: Of the Gaussian kernel; the median distance of all features by default.
        max_rows: Most rows of either side that are used, chosen at random; time and memory grow
            with its square.
        seed: Of the draws.

    Raises:
        ValueError: Rows that do not belong together, different classes, or fewer than 19
            simulations.

    >>> from flaxtransfer.shift.calibration import Calibration
    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat([0, 1, 1], 100)
    >>> features = rng.normal(size=(300, 3)) + 2 * labels[:, None]
    >>> logits = (2 * features - 2).sum(1)
    >>> probabilities = 1 / (1 + np.exp(np.stack([logits, -logits], 1)))
    >>> order = rng.permutation(300)
    >>> first, second = order[:200], order[200:]
    >>> source = Calibration("none", np.ones(2), np.zeros(2), probabilities[first], labels[first])
    >>> same = (features[first], features[second], probabilities[second], source)
    >>> residual_test(*same, simulations=199).rejected()
    False
    >>> moved = (features[first], features[second] + [1, -1, 0], probabilities[second], source)
    >>> residual_test(*moved, simulations=199).rejected()
    True

    References:
        A. Gretton, K. Borgwardt, M. Rasch, B. Schoelkopf, A. Smola, "A kernel two-sample test",
        2012 (the statistic).
        A. Garg, Y. Wu, S. Balakrishnan, Z. Lipton, "A unified view of label shift estimation", 2020
        (the estimate of prevalence).
    """
    features, target, validation, posteriors, labels = _check_arrays(
        source_features, target_features, target_probabilities, source
    )
    check_repetitions(simulations, "simulations")
    counts = (len(features), len(target))
    notes = duplicate_row_notes(features, target)
    rng = np.random.default_rng(seed)
    if max(counts) > max_rows:
        notes += (f"at most {max_rows} rows of either side were used",)
        chosen, other = (np.sort(rng.permutation(count)[:max_rows]) for count in counts)
        features, validation, labels = features[chosen], validation[chosen], labels[chosen]
        target, posteriors = target[other], posteriors[other]

    untested = partial(
        untestable,
        _RESIDUAL_NAME,
        _RESIDUAL_HYPOTHESIS,
        effect_name=_RESIDUAL_EFFECT,
        counts=counts,
        notes=notes,
    )

    if min(counts) < _RESIDUAL_MIN_ROWS:
        return untested(
            f"{counts[0]} and {counts[1]} rows; each side needs >= {_RESIDUAL_MIN_ROWS}"
        )
    all_rows = np.arange(len(target))[None]
    proportions = maximize_resampled(posteriors, all_rows, validation.mean(0))[0][0]
    sizes = np.bincount(labels, minlength=len(proportions))
    # Classes with less than half an expected target example are hardly ever drawn.
    too_few = (sizes < _MIN_ROWS_PER_CLASS) & (proportions * len(target) > 0.5)
    if too_few.any():
        missing = int(np.argmax(np.where(too_few, proportions, -1)))
        return untested(
            f"class {missing} has {sizes[missing]} source examples and an estimated proportion of "
            f"{proportions[missing]:.1%} of the target; a class needs >= {_MIN_ROWS_PER_CLASS}"
        )
    proportions = np.where(sizes > 0, proportions, 0.0)
    proportions /= proportions.sum()
    pooled = np.concatenate([features, target])
    if not np.ptp(pooled, axis=0).any():
        return untested("all features are constant and equal on both sides")
    width = median_bandwidth(pooled, seed=seed) if bandwidth is None else as_bandwidth(bandwidth)
    scaled = rescaled(pooled, width)
    classes = class_kernel(scaled[: len(features)], labels, validation)
    observed = mixture_residual(classes, scaled[len(features) :], proportions)
    null = simulated_residuals(classes, proportions, len(target), simulations, rng)
    return HypothesisTest(
        name=_RESIDUAL_NAME,
        hypothesis=_RESIDUAL_HYPOTHESIS,
        statistic=observed,
        p=permutation_p(observed, null),
        effect=observed,
        effect_name=_RESIDUAL_EFFECT,
        minimum_detectable=detectable_squared_effect(null),
        counts=counts,
        assumptions=(
            "examples are independent",
            "the target has no class that the source lacks",
            f"a difference that a Gaussian kernel of bandwidth {width:.4g} sees",
        ),
        notes=notes,
    )


def mixture_residual(source: ClassKernel, target: np.ndarray, proportions: np.ndarray) -> float:
    """Unbiased squared MMD between a target and a mixture of the source's classes.

    Only pairs of different examples count, so that the expectation is 0 without a difference.

    Args:
        source: Kernel of the source.
        target: ``[m, D]`` float32, in the same units.
        proportions: ``[K]``, of the mixture.
    """
    weights = (proportions / np.maximum(source.sizes, 1))[source.labels]
    across = np.asarray(gaussian_kernel(source.features, target).mean(1), np.float64)
    count = len(target)
    inside = (count * float(gaussian_kernel(target, target).mean()) - 1) / (count - 1)
    return float(proportions @ source.means @ proportions - 2 * weights @ across + inside)


def simulated_residuals(
    source: ClassKernel,
    proportions: np.ndarray,
    count: int,
    simulations: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Null distribution of the residual by a parametric bootstrap of the whole procedure.

    Each simulation draws a source of the same size and a target, both with replacement from the
    source's examples, the target's classes with the given proportions. The prior is estimated on
    the one, the prevalence on the other. Each is a vector of weights on the same examples, so that
    one matrix product with the kernel computes all residuals.

    Args:
        source: Kernel of the source.
        proportions: ``[K]``, of the target's classes; 0 where the source has no example.
        count: m, rows of the target.
        simulations: B.
        rng: For the draws.

    Returns:
        ``[B]``.
    """
    rows, classes = source.probabilities.shape
    chances = (proportions / np.maximum(source.sizes, 1))[source.labels]
    drawn = rng.integers(rows, size=(simulations, rows))
    targets = rng.choice(rows, size=(simulations, count), p=chances / chances.sum())
    priors = np.stack([source.probabilities[chosen].mean(0) for chosen in drawn])
    estimates, _ = maximize_resampled(source.probabilities, targets, priors)
    sizes = np.stack([np.bincount(source.labels[chosen], minlength=classes) for chosen in drawn])
    # The proportion of a class that was not drawn goes to the others.
    estimates = np.where(sizes > 0, estimates, 0.0)
    estimates /= estimates.sum(1, keepdims=True)
    per_example = estimates / np.maximum(sizes, 1)
    weights = np.empty((simulations, rows), np.float32)
    for number, (chosen, target) in enumerate(zip(drawn, targets, strict=True)):
        weights[number] = (
            np.bincount(chosen, minlength=rows) * per_example[number][source.labels]
            - np.bincount(target, minlength=rows) / count
        )
    squares = np.asarray(_squared_norms(weights, source.kernel), np.float64)
    # A target is drawn from all classes together, so the variance between them counts too.
    between = float(proportions @ np.diag(source.means) - proportions @ source.means @ proportions)
    return squares - between / count


@dataclasses.dataclass(frozen=True, eq=False)
class ClassKernel:
    """Source examples with their kernel matrix and its means between classes.

    Args:
        features: ``[n, D]`` float32, in units of the bandwidth.
        labels: ``[n]``.
        probabilities: ``[n, K]``, calibrated.
        kernel: ``[n, n]`` float32, with a diagonal for which an example has no variance with
            itself.
        sizes: ``[K]``, examples per class.
        means: ``[K, K]``, means of the kernel over different examples of two classes.
    """

    features: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    kernel: jax.Array
    sizes: np.ndarray
    means: np.ndarray


def class_kernel(
    features: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> ClassKernel:
    """Kernel matrix of source examples, with a diagonal corrected for the bootstrap.

    In many dimensions an example is much more similar to itself than to any other. A bootstrap
    draws the same example twice, a population does not: with ones on the diagonal, simulated
    discrepancies would vary more than real ones (by 60 % with 600 examples of 512 dimensions). The
    diagonal here is the value implied by the rest of the class: 0 after the class means are
    subtracted.

    Args:
        features: ``[n, D]`` float32, in units of the bandwidth.
        labels: ``[n]``.
        probabilities: ``[n, K]``.
    """
    classes = probabilities.shape[1]
    sizes = np.bincount(labels, minlength=classes)
    members = ((labels[:, None] == np.arange(classes)) / np.maximum(sizes, 1)).astype(np.float32)
    kernel, means = _without_diagonal(features, members, sizes)
    return ClassKernel(
        features, labels, probabilities, kernel, sizes, np.asarray(means, np.float64)
    )


@jax.jit
def _without_diagonal(features: Any, members: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
    kernel = gaussian_kernel(features, features)
    own = members > 0
    others = jnp.maximum(sizes - 1, 1)
    # Mean of each example over the rest of its class, and over the pairs of each class.
    total = jnp.matmul(kernel, own.astype(jnp.float32), precision="highest")
    class_mean = jnp.where(own, (total - 1) / others, 0).sum(1)
    pairs = members.T @ class_mean
    alone = (own * (sizes == 1)).any(1)
    diagonal = jnp.where(alone, 1.0, 2 * class_mean - own @ pairs)
    kernel = jnp.where(jnp.eye(len(kernel), dtype=bool), diagonal[:, None], kernel)
    means = jnp.matmul(members.T, kernel, precision="highest")
    return kernel, jnp.matmul(means, members, precision="highest")


@jax.jit
def _squared_norms(weights: Any, kernel: jax.Array) -> jax.Array:
    result: jax.Array = (jnp.matmul(weights, kernel, precision="highest") * weights).sum(1)
    return result


def _detectable_total_variation(probabilities: np.ndarray, counts: tuple[int, int]) -> float | None:
    """The total variation that is found with 80 % power in any direction, at most 1.

    To first order the noncentrality of the statistic is ``d' I d / (1 / m + 1 / n)``, with d the
    change of the prior and I the information of a posterior about it at the prior. The largest sum
    of ``|d|`` for a given noncentrality maximizes a convex function over signs; from each class it
    is improved to a local maximum. None where posteriors leave a direction undetermined.
    """
    classes = probabilities.shape[1]
    scores = probabilities / probabilities.mean(0)
    information = scores.T @ scores / len(scores)
    basis = np.linalg.svd(np.ones((1, classes)))[2][1:].T
    projected_information = basis.T @ information @ basis
    if (
        np.linalg.matrix_rank(
            projected_information, tol=1e-9 * np.trace(projected_information), hermitian=True
        )
        < classes - 1
    ):
        return None
    covariance = basis @ np.linalg.inv(projected_information) @ basis.T
    unit = noncentrality(classes - 1) * (1 / counts[0] + 1 / counts[1])
    signs = np.where(covariance >= 0, 1.0, -1.0)
    for _ in range(100):
        improved = np.where(signs @ covariance >= 0, 1.0, -1.0)
        if np.array_equal(improved, signs):
            break
        signs = improved
    largest = np.einsum("ij,jk,ik->i", signs, covariance, signs).max()
    return float(min(1.0, np.sqrt(unit * largest) / 2))


def _check_arrays(
    source_features: Any, target_features: Any, target_probabilities: Any, source: Calibration
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    features = as_features(source_features, "source features")
    target = as_features(target_features, "target features")
    same_width(features, "source features", target, "target features")
    validation = as_probabilities(source.probabilities, "source probabilities")
    posteriors = as_probabilities(target_probabilities, "target probabilities")
    classes = same_width(validation, "source probabilities", posteriors, "target probabilities")
    labels = as_labels(source.labels, "source labels", count=len(validation), classes=classes)
    for side, rows, others in (
        ("source", features, validation),
        ("target", target, posteriors),
    ):
        if len(rows) != len(others):
            raise ValueError(
                f"{side} features and {side} probabilities must be of the same examples, in one "
                f"order, got {len(rows)} and {len(others)} rows"
            )
    return features, target, validation, posteriors, labels
