"""Tests of concept shift on a few labeled target examples, and how many labels they need.

Under concept shift p(y | x) has changed, which no unlabeled data show. Pass the model's own
posteriors to test that p(y | x) is the source's (no shift, or covariate shift); pass those
corrected for prevalence to test that p(x | y) is (label shift). Where both are rejected, neither
explains the target: the concept shifted, or the model is not calibrated there.

The null distributions draw labels from the posteriors themselves, which is exact if these are
known. Posteriors that were corrected by an estimated prevalence carry its error, and 200 labels are
enough to detect it: with 600 source and 300 target examples ``label_residual_test`` rejects a fifth
of true hypotheses instead of a twentieth. Pass the result of ``corrected_posteriors`` instead,
whose bootstrap accounts for that error. ``labels_needed`` computes the power of
``posterior_ratio_tests`` by number of labels, before there are any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_labels, as_probabilities, same_width
from flaxtransfer.shift.prior_correction import EstimatedPosteriors
from flaxtransfer.shift.statistics import (
    LEVEL,
    POWER,
    HypothesisTest,
    check_repetitions,
    detectable_effect,
    permutation_p,
    untestable,
)

__all__ = [
    "LabelsNeeded",
    "label_residual_test",
    "labels_needed",
    "log_loss_test",
    "posterior_ratio_tests",
]

_MIN_LABELS = 3

_MIN_PROBABILITY = 1e-300
"""Bounds the surprisal of a class of probability 0 at 691 nats."""

_MAX_COMPARISONS = 20_000_000
"""Most comparisons with cumulative posteriors at a time, one byte each."""

_CHUNK_SIZE = 4_000_000
"""Most cumulative posteriors that ``labels_needed`` draws from at a time."""

_RANDOM_LABELS = "the labeled examples are a random sample of the target"

_KNOWN_POSTERIORS = "posteriors are known: they were estimated from much more data than the labels"

_ESTIMATED_POSTERIORS = (
    "bootstrap estimates vary about the posteriors as these do about the true ones"
)

_HYPOTHESIS = "labels are distributed according to the posteriors"


def log_loss_test(
    probabilities: Any,
    labels: Any,
    *,
    simulations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Log-loss test: are the labels as likely as the posteriors predict?

    Use it for labels that contradict confident posteriors. One-sided, large losses reject:
    posteriors that are not confident enough make labels more likely than expected, and pass; see
    ``label_residual_test``.

    Args:
        probabilities: ``[l, K]``, posteriors of the labeled target examples, or
            ``EstimatedPosteriors``.
        labels: ``[l]``, their classes.
        simulations: Draws of all l labels.
        seed: Of the draws.

    Returns:
        A test whose statistic is the summed negative log-likelihood in nats, and whose effect is
        its excess over the expectation, per label.

    Raises:
        ValueError: Invalid probabilities or labels, or fewer than 19 simulations.

    >>> probabilities = np.tile([0.9, 0.1], (20, 1))
    >>> log_loss_test(probabilities, [0] * 18 + [1] * 2).rejected()
    False
    >>> log_loss_test(probabilities, [0] * 12 + [1] * 8).rejected()
    True
    """
    name = "log-loss of labels"
    given, observed, assumption = _check_labels(probabilities, labels, simulations)
    found = given.posteriors
    if len(observed) < _MIN_LABELS:
        return _too_few_labels(name, _HYPOTHESIS, "nats", len(observed))
    if _is_certain(found, observed):
        return _degenerate(name, _HYPOTHESIS, "nats", len(observed))
    loss = _surprisal(found)
    statistic = float(_entries_at(loss, observed).sum())
    excess = statistic - float((found * loss).sum())
    null = _null_excess(given, _surprisal(given.estimates), simulations, seed)
    count = len(observed)
    return HypothesisTest(
        name=name,
        hypothesis=_HYPOTHESIS,
        statistic=statistic,
        p=permutation_p(excess, null),
        effect=excess / count,
        effect_name="nats",
        minimum_detectable=detectable_effect(null) / count,
        counts=(count,),
        assumptions=(_RANDOM_LABELS, assumption),
    )


def label_residual_test(
    probabilities: Any,
    labels: Any,
    *,
    simulations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Chi-squared test of label frequencies against those that the posteriors predict.

    The complement of ``log_loss_test``: two-sided, with K - 1 degrees of freedom, and it names the
    class that is more frequent than expected. It does not see labels that are exchanged so that all
    frequencies stay the same.

    Args:
        probabilities: ``[l, K]``, posteriors of the labeled target examples, or
            ``EstimatedPosteriors``.
        labels: ``[l]``, their classes.
        simulations: Draws of all l labels.
        seed: Of the draws.

    Returns:
        A test whose statistic is ``r' V^+ r``, with r the observed minus the expected counts and V
        their covariance under known posteriors; infinite where a label was impossible. Its effect
        is the total variation between observed and expected frequencies.

    Raises:
        ValueError: Invalid probabilities or labels, or fewer than 19 simulations.

    >>> probabilities = np.tile([0.9, 0.1], (20, 1))
    >>> test = label_residual_test(probabilities, [0] * 12 + [1] * 8)
    >>> round(test.statistic, 2), round(test.effect, 2)  # (8 - 2)^2 / (20 * 0.9 * 0.1)
    (20.0, 0.3)
    >>> test.notes[0]
    'class 1 is more frequent than expected, by 6.0 of 20 labels'
    """
    name, effect_name = "residual of labels", "total variation"
    given, observed, assumption = _check_labels(probabilities, labels, simulations)
    found = given.posteriors
    count, classes = found.shape
    if count < _MIN_LABELS:
        return _too_few_labels(name, _HYPOTHESIS, effect_name, count)
    if _is_certain(found, observed):
        return _degenerate(name, _HYPOTHESIS, effect_name, count)
    null, sizes = [], []
    rng = np.random.default_rng(seed)
    for truth, estimate, part in _bootstrap_draws(given, simulations):
        cells = _draw_labels(truth, part, rng) + classes * np.arange(part)[:, None]
        numbers = np.bincount(cells.ravel(), minlength=part * classes).reshape(part, classes)
        numbers = numbers - estimate.sum(0)
        null.append(_quadratic_form(numbers, estimate))
        sizes.append(np.abs(numbers).sum(1) / 2 / count)
    residual = np.bincount(observed, minlength=classes) - found.sum(0)
    statistic = float(_quadratic_form(residual[None], found)[0])
    if (_entries_at(found, observed) <= 0).any():
        statistic = float("inf")
    p = permutation_p(statistic, np.concatenate(null))
    largest = int(np.argmax(residual))
    return HypothesisTest(
        name=name,
        hypothesis=_HYPOTHESIS,
        statistic=statistic,
        p=p,
        effect=float(np.abs(residual).sum() / 2 / count),
        effect_name=effect_name,
        minimum_detectable=min(1.0, detectable_effect(np.concatenate(sizes))),
        counts=(count,),
        assumptions=(_RANDOM_LABELS, assumption),
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
    """Likelihood-ratio tests of covariate shift against label shift.

    Both tests use the same labels, each with the other hypothesis as its alternative. Under the
    covariate hypothesis p(y | x) is the source's, and labels follow ``probabilities``; under the
    label hypothesis they follow ``adjusted``. The statistic of both is the log-likelihood ratio,
    the most powerful one (Neyman and Pearson). If one is rejected, the labels favor the other; if
    none is, there are too few labels (``labels_needed``); if both are, neither explains them.

    Args:
        probabilities: ``[l, K]``, the model's calibrated posteriors of the labeled examples.
        adjusted: ``[l, K]``, the same, corrected to the target's prevalence, or
            ``EstimatedPosteriors``.
        labels: ``[l]``, their classes.
        simulations: Draws of all l labels under either hypothesis.
        seed: Of the draws.

    Returns:
        The test of the covariate hypothesis and that of the label hypothesis. The statistic of both
        is the sum of ``log(adjusted / probabilities)`` over the labels, the log Bayes factor:
        positive where they favor label shift. The effect is its mean, which must be as low as the
        (negative) ``minimum_detectable`` of the second test for that to reject.

    Raises:
        ValueError: Invalid probabilities or labels, or fewer than 19 simulations.

    >>> raw, adjusted = np.tile([0.5, 0.5], (40, 1)), np.tile([0.9, 0.1], (40, 1))
    >>> covariate, label = posterior_ratio_tests(raw, adjusted, [0] * 36 + [1] * 4)
    >>> covariate.rejected(), label.rejected(), round(covariate.statistic, 1)
    (True, False, 14.7)
    """
    effect_name = "nats per label"
    known, observed, known_assumption = _check_labels(probabilities, labels, simulations)
    given, _, estimated_assumption = _check_labels(adjusted, labels, simulations)
    raw, changed = known.posteriors, given.posteriors
    same_width(raw, "probabilities", changed, "adjusted probabilities")
    count = len(observed)
    ratios = _surprisal(raw) - _surprisal(changed)
    statistic = float(_entries_at(ratios, observed).sum())
    null_scores = _surprisal(given.estimates) - _surprisal(raw)[given.rows]
    tests = []
    # Large ratios reject the covariate hypothesis, small ones the label hypothesis.
    for name, hypothesis, sign, null_posteriors, scores, assumption in (
        (
            "covariate hypothesis",
            "p(y | x) is the source's",
            1.0,
            EstimatedPosteriors.known(raw),
            ratios[None],
            known_assumption,
        ),
        (
            "label hypothesis",
            "p(x | y) is the source's",
            -1.0,
            given,
            null_scores,
            estimated_assumption,
        ),
    ):
        if count < _MIN_LABELS:
            tests.append(_too_few_labels(name, hypothesis, effect_name, count))
            continue
        if np.allclose(raw, changed, rtol=0, atol=1e-9):
            reason = "both hypotheses have the same posteriors: no label tells them apart"
            tests.append(
                untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))
            )
            continue
        expected = float((null_posteriors.posteriors * ratios).sum())
        null = _null_excess(null_posteriors, scores, simulations, seed)
        tests.append(
            HypothesisTest(
                name=name,
                hypothesis=hypothesis,
                statistic=statistic,
                p=permutation_p(sign * (statistic - expected), null),
                effect=statistic / count,
                effect_name=effect_name,
                minimum_detectable=(expected + sign * detectable_effect(null)) / count,
                counts=(count,),
                assumptions=(_RANDOM_LABELS, assumption),
            )
        )
    return tests[0], tests[1]


def labels_needed(
    probabilities: Any,
    adjusted: Any,
    *,
    power: float = POWER,
    level: float = LEVEL,
    max_labels: int = 1000,
    simulations: int = 2000,
    seed: int = 0,
) -> LabelsNeeded:
    """Target labels that ``posterior_ratio_tests`` needs to decide between the two shifts.

    The two are label shift and covariate shift. Use it before paying for labels. The answer is as
    reliable as the model's posteriors: examples are drawn from those given, and labels from their
    posteriors under either hypothesis. It is not the number needed to detect concept shift, whose
    size is unknown beforehand.

    Args:
        probabilities: ``[m, K]``, calibrated posteriors of unlabeled target examples.
        adjusted: ``[m, K]``, the same, corrected to the target's prevalence.
        power: Required in either direction.
        level: Significance level of the tests.
        max_labels: Most labels that are tried; examples are drawn with replacement.
        simulations: Sequences of examples and labels under either hypothesis.
        seed: Of the simulations.

    Raises:
        ValueError: Invalid probabilities, different examples, or a power or level outside of 0
            and 1.

    >>> raw, adjusted = np.tile([0.5, 0.5], (40, 1)), np.tile([0.9, 0.1], (40, 1))
    >>> labels_needed(raw, adjusted, max_labels=50).count in range(9, 15)
    True
    >>> labels_needed(raw, raw).reason
    'both hypotheses have the same posteriors: no label tells them apart'
    """
    raw = as_probabilities(probabilities, "probabilities")
    changed = as_probabilities(adjusted, "adjusted probabilities")
    classes = same_width(raw, "probabilities", changed, "adjusted probabilities")
    if len(raw) != len(changed):
        raise ValueError(
            "probabilities and adjusted probabilities must be of the same examples, got "
            f"{len(raw)} and {len(changed)} rows"
        )
    for name, value in (("power", power), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    check_repetitions(simulations, "simulations")
    if max_labels < 1:
        raise ValueError(f"max_labels must be >= 1, got {max_labels}")
    if np.allclose(raw, changed, rtol=0, atol=1e-9):
        reason = "both hypotheses have the same posteriors: no label tells them apart"
        return LabelsNeeded(None, power, level, np.arange(0), np.zeros(0), reason)

    ratios = np.log(np.maximum(changed, _MIN_PROBABILITY)) - np.log(
        np.maximum(raw, _MIN_PROBABILITY)
    )
    rng = np.random.default_rng(seed)
    counts = np.arange(1, max_labels + 1)
    # Sums over the first l labels of a sequence, for all l at once.
    sums = {
        "raw": np.empty((simulations, max_labels)),
        "adjusted": np.empty((simulations, max_labels)),
    }
    chunk = max(1, _CHUNK_SIZE // (max_labels * classes))
    for start in range(0, simulations, chunk):
        part = slice(start, min(start + chunk, simulations))
        for posteriors, name in ((raw, "raw"), (changed, "adjusted")):
            rows = rng.integers(len(raw), size=(part.stop - start, max_labels))
            cumulated = np.cumsum(posteriors, axis=1)[rows]
            uniform = rng.random(rows.shape)[:, :, None] * cumulated[:, :, -1:]
            drawn = (uniform >= cumulated).sum(2)
            sums[name][part] = np.cumsum(ratios[rows, drawn], axis=1)
    powers = np.minimum(
        _power(sums["raw"], sums["adjusted"], level), _power(-sums["adjusted"], -sums["raw"], level)
    )
    # Power is not monotone with few labels: require it for all larger numbers too.
    sufficient = np.flip(np.minimum.accumulate(np.flip(powers))) >= power
    if not sufficient.any():
        reason = f"{max_labels} labels have a power of {powers[-1]:.2f}"
        return LabelsNeeded(None, power, level, counts, powers, reason)
    return LabelsNeeded(int(counts[np.argmax(sufficient)]), power, level, counts, powers)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelsNeeded:
    """Power of a likelihood-ratio test by number of labels.

    Args:
        count: Labels that suffice for ``power``; None where none of ``counts`` does.
        power: The power asked for.
        level: Significance level of the test.
        counts: ``[C]``, the numbers of labels that were tried.
        powers: ``[C]``, the lower power of the two directions: rejecting the covariate hypothesis
            where the label hypothesis is true, and vice versa.
        reason: Why there is no ``count``; "" where there is one.
    """

    count: int | None
    power: float
    level: float
    counts: np.ndarray
    powers: np.ndarray
    reason: str = ""


def _check_labels(
    probabilities: Any, labels: Any, simulations: int
) -> tuple[EstimatedPosteriors, np.ndarray, str]:
    """Posteriors, labels ``[l]``, and the assumption on the posteriors."""
    check_repetitions(simulations, "simulations")
    given, assumption = probabilities, _ESTIMATED_POSTERIORS
    if not isinstance(given, EstimatedPosteriors):
        given = EstimatedPosteriors.known(as_probabilities(given, "probabilities"))
        assumption = _KNOWN_POSTERIORS
    count, classes = given.posteriors.shape
    return given, as_labels(labels, "labels", count=count, classes=classes), assumption


def _entries_at(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Entries ``[..., l]`` of a table ``[l, K]`` at labels ``[..., l]``."""
    entries: np.ndarray = table[np.arange(len(table)), labels]
    return entries


def _surprisal(posteriors: np.ndarray) -> np.ndarray:
    """Surprisal -log p of each class, in nats."""
    surprisal: np.ndarray = -np.log(np.maximum(posteriors, _MIN_PROBABILITY))
    return surprisal


def _bootstrap_draws(
    given: EstimatedPosteriors, simulations: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """True posteriors ``[l, K]``, their estimates ``[l, K]``, and simulations of each draw."""
    parts = np.array_split(np.arange(simulations), len(given.rows))
    for rows, estimate, part in zip(given.rows, given.estimates, parts, strict=True):
        yield given.posteriors[rows], estimate, len(part)


def _draw_labels(posteriors: np.ndarray, simulations: int, rng: np.random.Generator) -> np.ndarray:
    """Labels ``[simulations, l]`` drawn from the posteriors."""
    cumulated = np.cumsum(posteriors, axis=1)
    cumulated /= cumulated[:, -1:]
    uniform = rng.random((simulations, len(posteriors)))
    # The first class whose cumulative probability exceeds u; never one of probability 0.
    if simulations * posteriors.size <= _MAX_COMPARISONS:
        labels: np.ndarray = (uniform[:, :, None] >= cumulated).sum(2)
        return labels
    columns = zip(cumulated, uniform.T, strict=True)
    return np.stack([np.searchsorted(chances, u, side="right") for chances, u in columns], 1)


def _null_excess(
    given: EstimatedPosteriors, scores: np.ndarray, simulations: int, seed: int
) -> np.ndarray:
    """Score sums of simulated labels minus their expectation, ``[simulations]``.

    The expectation is under the estimates. Labels are drawn from the posteriors and scored by
    ``scores`` ``[S, l, K]``, which belong to the estimates. Without subtracting the expectation,
    the entropy of an estimate would enter, which is biased: estimates are more extreme than the
    truth.
    """
    rng = np.random.default_rng(seed)
    found = []
    for (truth, estimate, part), table in zip(
        _bootstrap_draws(given, simulations), scores, strict=True
    ):
        sums = _entries_at(table, _draw_labels(truth, part, rng)).sum(1)
        found.append(sums - (estimate * table).sum())
    return np.concatenate(found)


def _is_certain(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether all draws are equal, and the labels are that draw."""
    return bool(
        (probabilities.max(1) >= 1).all() and (_entries_at(probabilities, labels) >= 1).all()
    )


def _too_few_labels(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    """Result for fewer labels than can be tested."""
    reason = f"{count} labels; a test needs >= {_MIN_LABELS}"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))


def _degenerate(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    """Result for labels that could not have been different."""
    reason = "every posterior is certain and every label agrees: there is no variation under H0"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))


def _quadratic_form(residuals: np.ndarray, posteriors: np.ndarray) -> np.ndarray:
    """``r' V^+ r`` of residuals ``[B, K]``, with V the covariance of label counts."""
    covariance = np.diag(posteriors.sum(0)) - posteriors.T @ posteriors
    inverse = np.linalg.pinv(covariance, rcond=1e-10, hermitian=True)
    squares: np.ndarray = ((residuals @ inverse) * residuals).sum(1)
    return squares


def _power(null: np.ndarray, alternative: np.ndarray, level: float) -> np.ndarray:
    """Fraction of the alternative above the (1 - level) quantile of the null, per column."""
    ordered = np.sort(null, axis=0)
    critical = ordered[min(len(null) - 1, int(np.ceil((1 - level) * len(null))) - 1)]
    powers: np.ndarray = (alternative > critical + 1e-9).mean(0)
    return powers
