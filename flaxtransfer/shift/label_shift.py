"""Tests of label shift: has the prior changed, and does that explain the features?

How far a target is from the best mixture of the source's classes, and how far chance goes.

Has the prevalence of the classes changed? The likelihood-ratio test of the source's prior.

Does a change of prevalence explain the target's features? The over-identification test.
"""

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
    duplicate_notes,
    same_width,
    uncertain,
)
from flaxtransfer.shift.likelihood import maximize_resampled
from flaxtransfer.shift.marginals import noncentrality
from flaxtransfer.shift.statistics import (
    HypothesisTest,
    detectable_square,
    enough_repetitions,
    permutation_p,
    untestable,
)
from flaxtransfer.shift.two_sample import as_bandwidth, gaussian_kernel, median_bandwidth, rescaled

__all__ = [
    "ClassKernel",
    "class_kernel",
    "prior_test",
    "residual",
    "residual_test",
    "simulated_residuals",
]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassKernel:
    """Source examples, what a kernel says of them, and what it says of their classes.

    Args:
        features: `[n, D]` float32, in bandwidths.
        labels: `[n]`.
        probabilities: `[n, K]`, calibrated.
        kernel: `[n, n]` float32, with a diagonal that leaves no variance to an example with itself.
        sizes: `[K]`, examples of each class.
        means: `[K, K]`, of the kernel between different examples of two classes.
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
    """The kernel of source examples, and its means between classes.

    An example is as similar to itself as can be, and two different ones of many dimensions hardly
    at all. A bootstrap draws the same example twice, a population does not: with ones on the
    diagonal, simulated discrepancies would scatter more than real ones (by 60 % at 600 examples of
    512 dimensions). The diagonal here is what the rest of the class makes it: 0 once the class's
    means are subtracted.

    Args:
        features: `[n, D]` float32, in bandwidths.
        labels: `[n]`.
        probabilities: `[n, K]`.
    """
    classes = probabilities.shape[1]
    sizes = np.bincount(labels, minlength=classes)
    members = ((labels[:, None] == np.arange(classes)) / np.maximum(sizes, 1)).astype(np.float32)
    kernel, means = _without_diagonal(features, members, sizes)
    return ClassKernel(
        features, labels, probabilities, kernel, sizes, np.asarray(means, np.float64)
    )


def residual(source: ClassKernel, target: np.ndarray, shares: np.ndarray) -> float:
    """Squared MMD between a target and the source's classes mixed by `shares`, without bias.

    Only pairs of different examples count, so that chance alone adds nothing on average.

    Args:
        source: of the source.
        target: `[m, D]` float32, in the same bandwidths.
        shares: `[K]`.
    """
    weights = (shares / np.maximum(source.sizes, 1))[source.labels]
    across = np.asarray(gaussian_kernel(source.features, target).mean(1), np.float64)
    rest = len(target)
    inside = (rest * float(gaussian_kernel(target, target).mean()) - 1) / (rest - 1)
    return float(shares @ source.means @ shares - 2 * weights @ across + inside)


def simulated_residuals(
    source: ClassKernel,
    shares: np.ndarray,
    count: int,
    simulations: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Residuals of targets that are mixtures of the source's classes, with everything re-estimated.

    Each simulation draws a source of the same size and a target, both with replacement from the
    source's examples, the target's classes as common as `shares` say. The prior is estimated on
    the one, prevalence on the other. All of them are vectors of weights on the same examples: one
    matrix product with the kernel is the whole of it.

    Args:
        source: of the source.
        shares: `[K]`, of the target's classes; 0 where the source has no example.
        count: m, rows of the target.
        simulations: B.
        rng: for the draws.

    Returns:
        `[B]`.
    """
    rows, classes = source.probabilities.shape
    chances = (shares / np.maximum(source.sizes, 1))[source.labels]
    drawn = rng.integers(rows, size=(simulations, rows))
    targets = rng.choice(rows, size=(simulations, count), p=chances / chances.sum())
    priors = np.stack([source.probabilities[chosen].mean(0) for chosen in drawn])
    estimates, _ = maximize_resampled(source.probabilities, targets, priors)
    sizes = np.stack([np.bincount(source.labels[chosen], minlength=classes) for chosen in drawn])
    # A class that was not drawn leaves its share to the others.
    estimates = np.where(sizes > 0, estimates, 0.0)
    estimates /= estimates.sum(1, keepdims=True)
    each = estimates / np.maximum(sizes, 1)
    weights = np.empty((simulations, rows), np.float32)
    for number, (chosen, target) in enumerate(zip(drawn, targets, strict=True)):
        weights[number] = (
            np.bincount(chosen, minlength=rows) * each[number][source.labels]
            - np.bincount(target, minlength=rows) / count
        )
    squares = np.asarray(_squares(weights, source.kernel), np.float64)
    # A target is drawn from all classes at once, and what lies between them is variance too.
    between = float(shares @ np.diag(source.means) - shares @ source.means @ shares)
    return squares - between / count


@jax.jit
def _without_diagonal(features: Any, members: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
    kernel = gaussian_kernel(features, features)
    own = members > 0
    others = jnp.maximum(sizes - 1, 1)
    # Mean over the rest of its class, for each example, and over the pairs of each class.
    total = jnp.matmul(kernel, own.astype(jnp.float32), precision="highest")
    rest = jnp.where(own, (total - 1) / others, 0).sum(1)
    pairs = members.T @ rest
    alone = (own * (sizes == 1)).any(1)
    diagonal = jnp.where(alone, 1.0, 2 * rest - own @ pairs)
    kernel = jnp.where(jnp.eye(len(kernel), dtype=bool), diagonal[:, None], kernel)
    means = jnp.matmul(members.T, kernel, precision="highest")
    return kernel, jnp.matmul(means, members, precision="highest")


@jax.jit
def _squares(weights: Any, kernel: jax.Array) -> jax.Array:
    return (jnp.matmul(weights, kernel, precision="highest") * weights).sum(1)


_PRIOR_NAME = "likelihood ratio of the prior"
_PRIOR_HYPOTHESIS = "classes are as common in the target as in the source"
_PRIOR_EFFECT = "total variation of prevalence"
_PRIOR_FEWEST = 10
_ACCURACY = 1e-4
"""Of a likelihood ratio, far below what a p-value notices."""


def prior_test(
    target_probabilities: Any,
    source: Calibration,
    *,
    permutations: int = 499,
    seed: int = 0,
) -> HypothesisTest:
    """Whether another prevalence than the source's makes the target's posteriors likelier.

    The sharpest test of label shift where label shift is all there is. It takes that for granted:
    a shift of the features that moves posteriors is found as well, and called prevalence. See
    `residual_test` for whether prevalence explains it.

    Twice the log-likelihood ratio is usually compared with a chi-square of K - 1 degrees. That
    takes the source's prior as known, and it is the mean of n posteriors: with m / n = 1 / 2 the
    level 0.05 would be 0.15. So p is by permutation: source and target posteriors are pooled and
    dealt out again, the prior and its maximum-likelihood alternative estimated anew each time.
    Under H0 the two samples are exchangeable, and the level is exact whether or not the posteriors
    are calibrated. What is not exchangeable is the map of `source`, fitted on one side only, which
    matters little: with biases of four classes fitted on 100 or 600 examples 0.053 was measured.

    Args:
        target_probabilities: `[m, K]`, calibrated by `source`.
        source: calibrated probabilities of held-out source examples.
        permutations: each with its own maximum.
        seed: for these.

    Returns:
        A test whose statistic is twice the log-likelihood ratio. `minimum_detectable` is found in
        whichever classes it is, to first order.

    Raises:
        ValueError: what are no probabilities, or other classes; fewer than 19 permutations.

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
    enough_repetitions(permutations, "permutations")
    counts = (len(validation), len(target))
    notes = duplicate_notes(uncertain(validation), uncertain(target))

    no = partial(
        untestable,
        _PRIOR_NAME,
        _PRIOR_HYPOTHESIS,
        effect_name=_PRIOR_EFFECT,
        counts=counts,
        notes=notes,
    )

    if min(counts) < _PRIOR_FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_PRIOR_FEWEST}")
    pooled = np.concatenate([validation, target])
    varies = np.ptp(pooled, axis=0) > 0
    if not varies.any():
        return no("all posteriors are equal: they say nothing about the class")

    rng = np.random.default_rng(seed)
    # Which pooled rows count as target; first, those that are.
    rows = np.empty((1 + permutations, counts[1]), np.int64)
    rows[0] = np.arange(counts[0], len(pooled))
    for number in range(1, len(rows)):
        rows[number] = rng.permutation(len(pooled))[: counts[1]]
    total = pooled.sum(0)
    priors = np.stack([total - pooled[row].sum(0) for row in rows]).clip(0) / counts[0]
    shares, ratios = maximize_resampled(pooled, rows, priors, tolerance=_ACCURACY / (2 * counts[1]))
    statistics = 2 * ratios
    return HypothesisTest(
        name=_PRIOR_NAME,
        hypothesis=_PRIOR_HYPOTHESIS,
        statistic=float(statistics[0]),
        p=permutation_p(float(statistics[0]) - _ACCURACY, statistics[1:]),
        effect=float(np.abs(shares[0] - priors[0]).sum() / 2),
        effect_name=_PRIOR_EFFECT,
        minimum_detectable=_detectable(pooled[:, varies], counts),
        counts=counts,
        assumptions=(
            "examples are independent",
            "under the alternative: each class looks in the target as it does in the source",
        ),
        notes=notes,
    )


def _detectable(probabilities: np.ndarray, counts: tuple[int, int]) -> float | None:
    """The total variation that is found with 80 % power whatever its direction, at most 1.

    To first order the statistic's noncentrality is ``d' I d / (1 / m + 1 / n)``, with d the change
    of the prior and I the information of a posterior about it at the prior. The largest sum of
    ``|d|`` for a given noncentrality is a convex maximum over signs; from each class it is climbed
    to a local one. None where posteriors leave a direction undetermined.
    """
    classes = probabilities.shape[1]
    scores = probabilities / probabilities.mean(0)
    information = scores.T @ scores / len(scores)
    basis = np.linalg.svd(np.ones((1, classes)))[2][1:].T
    along = basis.T @ information @ basis
    if np.linalg.matrix_rank(along, tol=1e-9 * np.trace(along), hermitian=True) < classes - 1:
        return None
    covariance = basis @ np.linalg.inv(along) @ basis.T
    unit = noncentrality(classes - 1) * (1 / counts[0] + 1 / counts[1])
    signs = np.where(covariance >= 0, 1.0, -1.0)
    for _ in range(100):
        climbed = np.where(signs @ covariance >= 0, 1.0, -1.0)
        if np.array_equal(climbed, signs):
            break
        signs = climbed
    largest = np.einsum("ij,jk,ik->i", signs, covariance, signs).max()
    return float(min(1.0, np.sqrt(unit * largest) / 2))


_RESIDUAL_NAME = "residual of label shift"
_RESIDUAL_HYPOTHESIS = "the target's features are a mixture of the source's classes"
_RESIDUAL_EFFECT = "squared MMD that no prevalence explains"
_RESIDUAL_FEWEST = 10
_FEWEST_OF_CLASS = 5


def residual_test(
    source_features: Any,
    target_features: Any,
    target_probabilities: Any,
    source: Calibration,
    *,
    simulations: int = 499,
    bandwidth: float | None = None,
    most: int = 5000,
    seed: int = 0,
) -> HypothesisTest:
    """Whether some prevalence of the source's classes explains the target's features.

    The test that label shift can fail: under it the target is a mixture of the source's classes,
    p_t(h) = sum_k q_k p_s(h | k). Where it is rejected the features shifted as well, and an
    estimated prevalence is biased. Where it is not, label shift is not proven: a shift along the
    differences between classes passes for one. Confusion matrices alone never reject; they have
    as many equations as unknowns.

    The statistic is the squared maximum mean discrepancy between the target and the source's
    classes, mixed by the maximum-likelihood prevalence of the target's posteriors, less what
    sampling adds to it. Its null distribution is a parametric bootstrap of the whole procedure:
    draw a source class by class, and a target from classes as common as estimated, both from the
    source's examples; estimate prior and prevalence anew; compute the statistic. Two independent
    draws from one set of examples stand for two samples of one population, so that all examples
    serve both.

    Args:
        source_features: `[n, D]` of the held-out examples of `source`, in their order.
        target_features: `[m, D]`.
        target_probabilities: `[m, K]` of the same target examples, calibrated by `source`.
        source: calibrated probabilities and labels of held-out source examples.
        simulations: bootstrap draws.
        bandwidth: of the Gaussian kernel; the median distance of all features by default.
        most: rows of either side that are used, chosen at random where there are more; time and
            memory grow with its square.
        seed: for the draws.

    Raises:
        ValueError: rows that do not belong together, other classes; fewer than 19 simulations.

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
        2012 (the statistic). A. Garg, Y. Wu, S. Balakrishnan, Z. Lipton, "A unified view of label
        shift estimation", 2020 (the estimate of prevalence).
    """
    features, target, validation, posteriors, labels = _checked(
        source_features, target_features, target_probabilities, source
    )
    enough_repetitions(simulations, "simulations")
    counts = (len(features), len(target))
    notes = duplicate_notes(features, target)
    rng = np.random.default_rng(seed)
    if max(counts) > most:
        notes += (f"at most {most} rows of either side were used",)
        chosen, other = (np.sort(rng.permutation(count)[:most]) for count in counts)
        features, validation, labels = features[chosen], validation[chosen], labels[chosen]
        target, posteriors = target[other], posteriors[other]

    no = partial(
        untestable,
        _RESIDUAL_NAME,
        _RESIDUAL_HYPOTHESIS,
        effect_name=_RESIDUAL_EFFECT,
        counts=counts,
        notes=notes,
    )

    if min(counts) < _RESIDUAL_FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_RESIDUAL_FEWEST}")
    everywhere = np.arange(len(target))[None]
    shares = maximize_resampled(posteriors, everywhere, validation.mean(0))[0][0]
    sizes = np.bincount(labels, minlength=len(shares))
    # Less than half an example of the target would hardly ever be drawn.
    lacking = (sizes < _FEWEST_OF_CLASS) & (shares * len(target) > 0.5)
    if lacking.any():
        missing = int(np.argmax(np.where(lacking, shares, -1)))
        return no(
            f"class {missing} has {sizes[missing]} source examples, and {shares[missing]:.1%} of "
            f"the target seem to be of it; a class needs {_FEWEST_OF_CLASS}"
        )
    shares = np.where(sizes > 0, shares, 0.0)
    shares /= shares.sum()
    pooled = np.concatenate([features, target])
    if not np.ptp(pooled, axis=0).any():
        return no("all features are constant and equal on both sides")
    width = median_bandwidth(pooled, seed=seed) if bandwidth is None else as_bandwidth(bandwidth)
    scaled = rescaled(pooled, width)
    classes = class_kernel(scaled[: len(features)], labels, validation)
    observed = residual(classes, scaled[len(features) :], shares)
    null = simulated_residuals(classes, shares, len(target), simulations, rng)
    return HypothesisTest(
        name=_RESIDUAL_NAME,
        hypothesis=_RESIDUAL_HYPOTHESIS,
        statistic=observed,
        p=permutation_p(observed, null),
        effect=observed,
        effect_name=_RESIDUAL_EFFECT,
        minimum_detectable=detectable_square(null),
        counts=counts,
        assumptions=(
            "examples are independent",
            "the target has no class that the source lacks",
            f"a difference that a Gaussian kernel of bandwidth {width:.4g} sees",
        ),
        notes=notes,
    )


def _checked(
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
                f"{len(rows)} rows of {side} features and {len(others)} of {side} probabilities; "
                "both are of the same examples, in one order"
            )
    return features, target, validation, posteriors, labels
