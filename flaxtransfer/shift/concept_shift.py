"""Tests of concept shift on a few labeled target examples.

Labels drawn from posteriors: what the tests on a few labels compare the real ones with.

What a few labeled target examples say of the posteriors: are they right, and which are?

Under concept shift p(y | x) has changed, and no unlabeled data show it. Give the model's own
posteriors to test that p(y | x) is the source's (no shift, or covariate shift); give those that
were corrected for prevalence to test that p(x | y) is (label shift). Where both are rejected
neither explains the target: the concept shifted, or the model is not calibrated there.

For the null distributions labels are drawn from the posteriors themselves, which is exact where
these are known. Those that were corrected by an estimated prevalence carry its error, and 200
labels are enough to notice it: at 600 source and 300 target examples `label_residual_test` rejects
a fifth of true hypotheses instead of a twentieth. Hand over what `corrected_posteriors` returns
instead: then labels drawn from posteriors meet estimates of these, as they do in reality.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_labels, as_probabilities, same_width
from flaxtransfer.shift.sample_size import EstimatedPosteriors
from flaxtransfer.shift.statistics import (
    HypothesisTest,
    detectable,
    enough_repetitions,
    permutation_p,
    untestable,
)

__all__ = [
    "CHOICE",
    "FEWEST",
    "KNOWN",
    "checked_labels",
    "drawn_labels",
    "excesses",
    "is_certain",
    "label_residual_test",
    "log_loss_test",
    "nothing_varies",
    "picked",
    "posterior_ratio_tests",
    "surprise",
    "too_few",
    "worlds",
]


FEWEST = 3

_SMALLEST = 1e-300
"""A class of probability 0 that is seen costs 691 nats, and not infinitely many."""

_AT_ONCE = 20_000_000
"""Comparisons with cumulated posteriors that are made at once; as many bytes."""

CHOICE = "labels are of a random choice of target examples"

KNOWN = "posteriors are known: what they were estimated from is much more than the labels"

_ESTIMATED = "estimates of a bootstrap vary about the posteriors as these do about the truth"


def checked_labels(
    probabilities: Any, labels: Any, simulations: int
) -> tuple[EstimatedPosteriors, np.ndarray, str]:
    """Posteriors, labels `[l]`, and what is assumed of the posteriors."""
    enough_repetitions(simulations, "simulations")
    given, assumption = probabilities, _ESTIMATED
    if not isinstance(given, EstimatedPosteriors):
        given = EstimatedPosteriors.known(as_probabilities(given, "probabilities"))
        assumption = KNOWN
    count, classes = given.posteriors.shape
    return given, as_labels(labels, "labels", count=count, classes=classes), assumption


def picked(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Entries `[..., l]` of a table `[l, K]` for labels `[..., l]`."""
    return table[np.arange(len(table)), labels]


def surprise(posteriors: np.ndarray) -> np.ndarray:
    """What each class would cost in nats."""
    return -np.log(np.maximum(posteriors, _SMALLEST))


def worlds(
    given: EstimatedPosteriors, simulations: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """True posteriors `[l, K]`, estimates of them `[l, K]`, and a share of the simulations."""
    parts = np.array_split(np.arange(simulations), len(given.rows))
    for rows, estimate, part in zip(given.rows, given.estimates, parts, strict=True):
        yield given.posteriors[rows], estimate, len(part)


def drawn_labels(posteriors: np.ndarray, simulations: int, rng: np.random.Generator) -> np.ndarray:
    """Classes `[simulations, l]` that the examples are drawn to be."""
    cumulated = np.cumsum(posteriors, axis=1)
    cumulated /= cumulated[:, -1:]
    uniform = rng.random((simulations, len(posteriors)))
    # The first class that exceeds, and one of probability 0 never is.
    if simulations * posteriors.size <= _AT_ONCE:
        return (uniform[:, :, None] >= cumulated).sum(2)
    columns = zip(cumulated, uniform.T, strict=True)
    return np.stack([np.searchsorted(chances, u, side="right") for chances, u in columns], 1)


def excesses(
    given: EstimatedPosteriors, scores: np.ndarray, simulations: int, seed: int
) -> np.ndarray:
    """Sums of scores of labels, less what the estimates expect, `[simulations]`, under H0.

    Labels are drawn from the posteriors, and scored by `scores` `[S, l, K]`, which belong to the
    estimates. Without the expectation the entropy of an estimate would enter, which is biased:
    estimates are more extreme than the truth.
    """
    rng = np.random.default_rng(seed)
    found = []
    for (truth, estimate, part), table in zip(worlds(given, simulations), scores, strict=True):
        sums = picked(table, drawn_labels(truth, part, rng)).sum(1)
        found.append(sums - (estimate * table).sum())
    return np.concatenate(found)


def is_certain(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether no draw can differ from another and the labels are that draw."""
    return bool((probabilities.max(1) >= 1).all() and (picked(probabilities, labels) >= 1).all())


def too_few(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    """The test of fewer labels than can be tested."""
    reason = f"{count} labels; a test needs {FEWEST}"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))


def nothing_varies(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    """The test of labels that could not have been others."""
    reason = "every posterior is certain, and every label is as it says: nothing varies under H0"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))


_RIGHT = "labels are distributed as the posteriors say"


def log_loss_test(
    probabilities: Any,
    labels: Any,
    *,
    simulations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Whether the labels are as likely as the posteriors say; large losses reject.

    The test for labels that contradict confident posteriors. One-sided: posteriors that are too
    timid make labels likelier than was expected, and pass; see `label_residual_test`.

    Args:
        probabilities: `[l, K]`, posteriors of the labeled target examples, or
            `EstimatedPosteriors`.
        labels: `[l]`, their classes.
        simulations: draws of all l labels.
        seed: for these.

    Returns:
        A test whose statistic is the summed negative log-likelihood in nats, and whose effect is
        what it exceeds its expectation by, for each label.

    Raises:
        ValueError: what are no probabilities or labels of them; fewer than 19 simulations.

    >>> probabilities = np.tile([0.9, 0.1], (20, 1))
    >>> log_loss_test(probabilities, [0] * 18 + [1] * 2).rejected()
    False
    >>> log_loss_test(probabilities, [0] * 12 + [1] * 8).rejected()
    True
    """
    name = "log-loss of labels"
    given, seen, assumption = checked_labels(probabilities, labels, simulations)
    found = given.posteriors
    if len(seen) < FEWEST:
        return too_few(name, _RIGHT, "nats", len(seen))
    if is_certain(found, seen):
        return nothing_varies(name, _RIGHT, "nats", len(seen))
    loss = surprise(found)
    statistic = float(picked(loss, seen).sum())
    excess = statistic - float((found * loss).sum())
    null = excesses(given, surprise(given.estimates), simulations, seed)
    count = len(seen)
    return HypothesisTest(
        name=name,
        hypothesis=_RIGHT,
        statistic=statistic,
        p=permutation_p(excess, null),
        effect=excess / count,
        effect_name="nats",
        minimum_detectable=detectable(null) / count,
        counts=(count,),
        assumptions=(CHOICE, assumption),
    )


def label_residual_test(
    probabilities: Any,
    labels: Any,
    *,
    simulations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Whether each class is as frequent among the labels as the posteriors say, in any direction.

    The companion of `log_loss_test`: two-sided, of K - 1 degrees of freedom, and able to say which
    class is more frequent than was thought. Labels that are swapped so that all frequencies stay
    are for the other one.

    Args:
        probabilities: `[l, K]`, posteriors of the labeled target examples, or
            `EstimatedPosteriors`.
        labels: `[l]`, their classes.
        simulations: draws of all l labels.
        seed: for these.

    Returns:
        A test whose statistic is ``r' V^+ r``, with r the observed less the expected numbers and
        V their covariance under known posteriors; infinite where a label was impossible. Its
        effect is the total variation between observed and expected frequencies.

    Raises:
        ValueError: what are no probabilities or labels of them; fewer than 19 simulations.

    >>> probabilities = np.tile([0.9, 0.1], (20, 1))
    >>> test = label_residual_test(probabilities, [0] * 12 + [1] * 8)
    >>> round(test.statistic, 2), round(test.effect, 2)  # (8 - 2)^2 / (20 * 0.9 * 0.1)
    (20.0, 0.3)
    >>> test.notes[0]
    'class 1 is more frequent than expected, by 6.0 of 20 labels'
    """
    name, effect_name = "residual of labels", "total variation"
    given, seen, assumption = checked_labels(probabilities, labels, simulations)
    found = given.posteriors
    count, classes = found.shape
    if count < FEWEST:
        return too_few(name, _RIGHT, effect_name, count)
    if is_certain(found, seen):
        return nothing_varies(name, _RIGHT, effect_name, count)
    null, sizes = [], []
    rng = np.random.default_rng(seed)
    for truth, estimate, part in worlds(given, simulations):
        cells = drawn_labels(truth, part, rng) + classes * np.arange(part)[:, None]
        numbers = np.bincount(cells.ravel(), minlength=part * classes).reshape(part, classes)
        numbers = numbers - estimate.sum(0)
        null.append(_squares(numbers, estimate))
        sizes.append(np.abs(numbers).sum(1) / 2 / count)
    residual = np.bincount(seen, minlength=classes) - found.sum(0)
    statistic = float(_squares(residual[None], found)[0])
    if (picked(found, seen) <= 0).any():
        statistic = float("inf")
    p = permutation_p(statistic, np.concatenate(null))
    largest = int(np.argmax(residual))
    return HypothesisTest(
        name=name,
        hypothesis=_RIGHT,
        statistic=statistic,
        p=p,
        effect=float(np.abs(residual).sum() / 2 / count),
        effect_name=effect_name,
        minimum_detectable=min(1.0, detectable(np.concatenate(sizes))),
        counts=(count,),
        assumptions=(CHOICE, assumption),
        notes=(
            f"class {largest} is more frequent than expected, by {residual[largest]:.1f} of "
            f"{count} labels",
        ),
    )


def posterior_ratio_tests(
    probabilities: Any,
    adjusted: Any,
    labels: Any,
    *,
    simulations: int = 9999,
    seed: int = 0,
) -> tuple[HypothesisTest, HypothesisTest]:
    """Which posteriors the labels speak for: those of covariate shift, or those of label shift.

    Two readings of the same labels, each hypothesis with the other as its alternative. Under the
    covariate hypothesis p(y | x) is the source's, and labels follow `probabilities`; under the
    label hypothesis they follow `adjusted`. The statistic of both is the log-likelihood ratio, and
    by Neyman and Pearson no other has more power. Rejected are: one, and the labels speak for the
    other; none, and there are too few (`labels_needed`); both, and neither explains them.

    Args:
        probabilities: `[l, K]`, the model's calibrated posteriors of the labeled examples.
        adjusted: `[l, K]`, the same, corrected to the target's prevalence, or
            `EstimatedPosteriors`.
        labels: `[l]`, their classes.
        simulations: draws of all l labels, under either hypothesis.
        seed: for these.

    Returns:
        The test of the covariate hypothesis and that of the label hypothesis. The statistic of
        both is the sum of ``log(adjusted / probabilities)`` over the labels, positive where they
        speak for label shift: the logarithm of the Bayes factor. The effect is its mean, which
        has to be as low as the second test's (negative) `minimum_detectable` for that to reject.

    Raises:
        ValueError: what are no probabilities or labels of them; fewer than 19 simulations.

    >>> raw, adjusted = np.tile([0.5, 0.5], (40, 1)), np.tile([0.9, 0.1], (40, 1))
    >>> covariate, label = posterior_ratio_tests(raw, adjusted, [0] * 36 + [1] * 4)
    >>> covariate.rejected(), label.rejected(), round(covariate.statistic, 1)
    (True, False, 14.7)
    """
    effect_name = "nats a label"
    known, seen, sure = checked_labels(probabilities, labels, simulations)
    given, _, unsure = checked_labels(adjusted, labels, simulations)
    raw, changed = known.posteriors, given.posteriors
    same_width(raw, "probabilities", changed, "adjusted probabilities")
    count = len(seen)
    ratios = surprise(raw) - surprise(changed)
    statistic = float(picked(ratios, seen).sum())
    against = surprise(given.estimates) - surprise(raw)[given.rows]
    tests = []
    # Large ratios speak against the covariate hypothesis, and small ones against the label one.
    for name, hypothesis, sign, world, scores, assumption in (
        (
            "covariate hypothesis",
            "p(y | x) is the source's",
            1.0,
            EstimatedPosteriors.known(raw),
            ratios[None],
            sure,
        ),
        ("label hypothesis", "p(x | y) is the source's", -1.0, given, against, unsure),
    ):
        if count < FEWEST:
            tests.append(too_few(name, hypothesis, effect_name, count))
            continue
        if np.allclose(raw, changed, rtol=0, atol=1e-9):
            reason = "both hypotheses have the same posteriors: no label tells them apart"
            tests.append(
                untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))
            )
            continue
        expected = float((world.posteriors * ratios).sum())
        null = excesses(world, scores, simulations, seed)
        tests.append(
            HypothesisTest(
                name=name,
                hypothesis=hypothesis,
                statistic=statistic,
                p=permutation_p(sign * (statistic - expected), null),
                effect=statistic / count,
                effect_name=effect_name,
                minimum_detectable=(expected + sign * detectable(null)) / count,
                counts=(count,),
                assumptions=(CHOICE, assumption),
            )
        )
    return tests[0], tests[1]


def _squares(residuals: np.ndarray, posteriors: np.ndarray) -> np.ndarray:
    """``r' V^+ r`` of residuals `[B, K]`, V the covariance of numbers of labels."""
    covariance = np.diag(posteriors.sum(0)) - posteriors.T @ posteriors
    inverse = np.linalg.pinv(covariance, rcond=1e-10, hermitian=True)
    return ((residuals @ inverse) * residuals).sum(1)
