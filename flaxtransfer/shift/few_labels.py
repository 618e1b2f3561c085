"""What a few labelled target examples say of the posteriors: are they right, and which are?

Under concept shift p(y | x) has changed, and no unlabelled data show it. Give the model's own
posteriors to test that p(y | x) is the source's (no shift, or covariate shift); give those that
were corrected for prevalence to test that p(x | y) is (label shift). Where both are rejected
neither explains the target: the concept shifted, or the model is not calibrated there.

Labels are drawn from the posteriors themselves for the null distributions, which are exact where
posteriors are known. Those that were corrected by an estimated prevalence carry its error, and 200
labels are enough to notice it: hand `plausible_posteriors` to the test, and its level holds.
"""

from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_labels, as_probabilities, same_width
from flaxtransfer.shift.hypotheses import (
    HypothesisTest,
    detectable,
    enough_repetitions,
    permutation_p,
    untestable,
)
from flaxtransfer.shift.label_draws import label_draws

__all__ = ["label_residual_test", "log_loss_test", "posterior_ratio_tests"]

_RIGHT = "labels are distributed as the posteriors say"
_FEWEST = 3
_SMALLEST = 1e-300
"""A class of probability 0 that is seen costs 691 nats, and not infinitely many."""

_CHOICE = "labels are of a random choice of target examples"
_KNOWN = "posteriors are known: what they were estimated from is much more than the labels"
_PLAUSIBLE = "the plausible posteriors vary as estimates of them do"


def log_loss_test(
    probabilities: Any,
    labels: Any,
    *,
    plausible: Any = None,
    simulations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Whether the labels are as likely as the posteriors say; large losses reject.

    The test for labels that contradict confident posteriors. One-sided: posteriors that are too
    timid make labels likelier than was expected, and pass; see `label_residual_test`.

    Args:
        probabilities: `[l, K]`, posteriors of the labelled target examples.
        labels: `[l]`, their classes.
        plausible: `[S, l, K]`, where the posteriors are uncertain: others that could be right.
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
    found, seen, drawn_from = _checked(probabilities, labels, plausible, simulations)
    if len(seen) < _FEWEST:
        return _too_few(name, _RIGHT, "nats", len(seen))
    if _certain(found, seen):
        return _nothing_to_test(name, _RIGHT, "nats", len(seen))
    loss = -np.log(np.maximum(found, _SMALLEST))
    statistic = float(_picked(loss, seen).sum())
    null = _sums(loss, drawn_from, simulations, seed)
    expected = float((found * loss).sum())
    count = len(seen)
    return HypothesisTest(
        name=name,
        hypothesis=_RIGHT,
        statistic=statistic,
        p=permutation_p(statistic, null),
        effect=(statistic - expected) / count,
        effect_name="nats",
        minimum_detectable=(detectable(null) - expected) / count,
        counts=(count,),
        assumptions=(_CHOICE, _KNOWN if plausible is None else _PLAUSIBLE),
    )


def label_residual_test(
    probabilities: Any,
    labels: Any,
    *,
    plausible: Any = None,
    simulations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Whether each class is as frequent among the labels as the posteriors say, in any direction.

    The companion of `log_loss_test`: two-sided, of K - 1 degrees of freedom, and able to say which
    class is more frequent than was thought. Labels that are swapped so that all frequencies stay
    are for the other one.

    Args:
        probabilities: `[l, K]`, posteriors of the labelled target examples.
        labels: `[l]`, their classes.
        plausible: `[S, l, K]`, where the posteriors are uncertain: others that could be right.
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
    found, seen, drawn_from = _checked(probabilities, labels, plausible, simulations)
    count, classes = found.shape
    if count < _FEWEST:
        return _too_few(name, _RIGHT, effect_name, count)
    if _certain(found, seen):
        return _nothing_to_test(name, _RIGHT, effect_name, count)
    expected = found.sum(0)
    inverse = np.linalg.pinv(np.diag(expected) - found.T @ found, rcond=1e-10, hermitian=True)

    numbers = np.zeros((simulations, classes))
    everyone = np.arange(simulations)
    for drawn in label_draws(drawn_from, simulations, np.random.default_rng(seed)):
        numbers[everyone, drawn] += 1
    null = numbers - expected
    residual = np.bincount(seen, minlength=classes) - expected
    statistic = float(residual @ inverse @ residual)
    if (_picked(found, seen) <= 0).any():
        statistic = float("inf")
    p = permutation_p(statistic, ((null @ inverse) * null).sum(1))
    largest = int(np.argmax(residual))
    return HypothesisTest(
        name=name,
        hypothesis=_RIGHT,
        statistic=statistic,
        p=p,
        effect=float(np.abs(residual).sum() / 2 / count),
        effect_name=effect_name,
        minimum_detectable=min(1.0, detectable(np.abs(null).sum(1) / 2 / count)),
        counts=(count,),
        assumptions=(_CHOICE, _KNOWN if plausible is None else _PLAUSIBLE),
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
    plausible: Any = None,
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
        probabilities: `[l, K]`, the model's calibrated posteriors of the labelled examples.
        adjusted: `[l, K]`, the same, corrected to the target's prevalence.
        labels: `[l]`, their classes.
        plausible: `[S, l, K]`, other corrected posteriors that could be right.
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
    raw, seen, _ = _checked(probabilities, labels, None, simulations)
    changed, _, drawn_from = _checked(adjusted, labels, plausible, simulations)
    same_width(raw, "probabilities", changed, "adjusted probabilities")
    count = len(seen)
    # A class that one hypothesis excludes is told by a single label; both excluding it, by none.
    ratios = np.log(np.maximum(changed, _SMALLEST)) - np.log(np.maximum(raw, _SMALLEST))
    statistic = float(_picked(ratios, seen).sum())
    uncertain = _KNOWN if plausible is None else _PLAUSIBLE
    tests = []
    # Large ratios speak against the covariate hypothesis, and small ones against the label one.
    for name, sign, posteriors, assumption, hypothesis in (
        ("covariate hypothesis", 1.0, raw, _KNOWN, "p(y | x) is the source's"),
        ("label hypothesis", -1.0, drawn_from, uncertain, "p(x | y) is the source's"),
    ):
        if count < _FEWEST:
            tests.append(_too_few(name, hypothesis, effect_name, count))
            continue
        if np.allclose(raw, changed, rtol=0, atol=1e-9):
            reason = "both hypotheses have the same posteriors: no label tells them apart"
            tests.append(
                untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))
            )
            continue
        null = _sums(sign * ratios, posteriors, simulations, seed)
        tests.append(
            HypothesisTest(
                name=name,
                hypothesis=hypothesis,
                statistic=statistic,
                p=permutation_p(sign * statistic, null),
                effect=statistic / count,
                effect_name=effect_name,
                minimum_detectable=sign * detectable(null) / count,
                counts=(count,),
                assumptions=(_CHOICE, assumption),
            )
        )
    return tests[0], tests[1]


def _checked(
    probabilities: Any, labels: Any, plausible: Any, simulations: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posteriors, labels, and the posteriors that labels are drawn from."""
    found = as_probabilities(probabilities, "probabilities")
    seen = as_labels(labels, "labels", count=len(found), classes=found.shape[1])
    enough_repetitions(simulations, "simulations")
    if plausible is None:
        return found, seen, found
    others = np.asarray(plausible, np.float64)
    if others.ndim != 3 or others.shape[1:] != found.shape or not len(others):
        raise ValueError(
            f"plausible posteriors have shape {others.shape}, wanted [draws, {len(found)}, "
            f"{found.shape[1]}]: the posteriors of the same examples, again and again"
        )
    rows = as_probabilities(others.reshape(-1, found.shape[1]), "plausible posteriors")
    return found, seen, rows.reshape(others.shape)


def _picked(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return table[np.arange(len(labels)), labels]


def _sums(scores: np.ndarray, posteriors: np.ndarray, simulations: int, seed: int) -> np.ndarray:
    """Sums over the examples of the scores of drawn labels, `[simulations]`."""
    sums = np.zeros(simulations)
    draws = label_draws(posteriors, simulations, np.random.default_rng(seed))
    for row, drawn in zip(scores, draws, strict=True):
        sums += row[drawn]
    return sums


def _certain(probabilities: np.ndarray, labels: np.ndarray) -> bool:
    """Whether no draw can differ from another and the labels are that draw."""
    return bool((probabilities.max(1) >= 1).all() and (_picked(probabilities, labels) >= 1).all())


def _too_few(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    reason = f"{count} labels; a test needs {_FEWEST}"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))


def _nothing_to_test(name: str, hypothesis: str, effect_name: str, count: int) -> HypothesisTest:
    reason = "every posterior is certain, and every label is as it says: nothing varies under H0"
    return untestable(name, hypothesis, reason, effect_name=effect_name, counts=(count,))
