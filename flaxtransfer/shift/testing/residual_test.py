"""Does a change of prevalence explain the target's features? The over-identification test."""

from functools import partial
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.checks import as_features, as_labels, as_probabilities, same_width
from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.hypotheses import (
    HypothesisTest,
    detectable_square,
    enough_repetitions,
    permutation_p,
    untestable,
)
from flaxtransfer.shift.prevalence.resampled_likelihood import maximise_resampled
from flaxtransfer.shift.testing.kernel import as_bandwidth, median_bandwidth, rescaled
from flaxtransfer.shift.testing.mixture_residual import class_kernel, residual, simulated_residuals

__all__ = ["residual_test"]

_NAME = "residual of label shift"
_HYPOTHESIS = "the target's features are a mixture of the source's classes"
_EFFECT = "squared MMD that no prevalence explains"
_FEWEST = 10
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

    >>> from flaxtransfer.shift.calibration.calibration import Calibration
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

    no = partial(untestable, _NAME, _HYPOTHESIS, effect_name=_EFFECT, counts=counts, notes=notes)

    if min(counts) < _FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_FEWEST}")
    everywhere = np.arange(len(target))[None]
    shares = maximise_resampled(posteriors, everywhere, validation.mean(0))[0][0]
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
        name=_NAME,
        hypothesis=_HYPOTHESIS,
        statistic=observed,
        p=permutation_p(observed, null),
        effect=observed,
        effect_name=_EFFECT,
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
