"""Are the model's predicted classes as frequent in the target as in the source?"""

from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from flaxtransfer.shift.checks import as_probabilities, same_width
from flaxtransfer.shift.hypotheses import (
    LEVEL,
    POWER,
    HypothesisTest,
    enough_repetitions,
    permutation_p,
    untestable,
)

__all__ = ["noncentrality", "predicted_label_test"]

_NAME = "predicted labels"
_HYPOTHESIS = "predicted classes are as frequent in the target as in the source"
_EFFECT = "total variation"
_FEWEST = 5
_EXPECTED = 5.0
"""Cochran's rule: the chi-square limit holds where each cell expects as many."""


def predicted_label_test(
    source_predictions: Any,
    target_predictions: Any,
    *,
    permutations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Whether the model predicts each class as often in the target as in the source.

    Quick evidence on prevalence that needs no calibration. It is not an estimate of prevalence
    (confusions blur it; see `estimate_prevalence`), and a shift of the features alone changes
    predictions too.

    Pearson's chi-square without continuity correction where every cell expects 5 or more; else
    the exact distribution given the margins, in full for two classes and by permutation for more.
    The outcome depends on the table and the seed, not on which number a class has.

    Args:
        source_predictions: `[n]` class numbers, or `[n, K]` probabilities, whose largest counts.
        target_predictions: `[m]` or `[m, K]`.
        permutations: for small counts.
        seed: for these.

    Raises:
        TypeError, ValueError: labels that are no whole numbers, probabilities of different classes,
            one array of labels and one of probabilities.

    >>> test = predicted_label_test([0] * 50 + [1] * 50, [0] * 20 + [1] * 60)
    >>> round(test.statistic, 3), round(test.p, 5), round(test.effect, 2)
    (11.688, 0.00063, 0.25)
    >>> predicted_label_test([1] * 50, [1] * 20).not_testable
    'every prediction is class 1'

    References:
        Z. Lipton, Y.-X. Wang, A. Smola, "Detecting and correcting for label shift with black box
        predictors", 2018 (the test on predicted labels).
    """
    source, target = _as_predictions(source_predictions, target_predictions)
    enough_repetitions(permutations, "permutations")
    counts = (len(source), len(target))

    def no(reason: str) -> HypothesisTest:
        return untestable(_NAME, _HYPOTHESIS, reason, effect_name=_EFFECT, counts=counts)

    if min(counts) < _FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_FEWEST}")
    # Classes that nobody was predicted to be are in neither array: they drop out here.
    classes, coded = np.unique(np.concatenate([source, target]), return_inverse=True)
    if len(classes) == 1:
        return no(f"every prediction is class {classes[0]}")
    table = np.stack(
        [
            np.bincount(coded[: len(source)], minlength=len(classes)),
            np.bincount(coded[len(source) :], minlength=len(classes)),
        ]
    )
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    freedom = len(classes) - 1
    if expected.min() >= _EXPECTED:
        p = float(stats.chi2.sf(statistic, freedom))
        how = "the chi-square limit: every cell expects 5 or more"
    elif len(classes) == 2:
        p = _exact(table)
        how = "the exact distribution given the margins"
    else:
        p = _permuted(table, permutations, seed)
        how = f"{permutations} tables with the same margins: a cell expects {expected.min():.2g}"
    shares = table / table.sum(1, keepdims=True)
    unit = 1 / counts[0] + 1 / counts[1]
    return HypothesisTest(
        name=_NAME,
        hypothesis=_HYPOTHESIS,
        statistic=statistic,
        p=p,
        effect=float(np.abs(shares[0] - shares[1]).sum() / 2),
        effect_name=_EFFECT,
        # By the inequality of Cauchy and Schwarz no shift has a larger total variation than half
        # the root of its chi-square divergence: this much is found whichever classes it is in.
        minimum_detectable=min(1.0, float(np.sqrt(noncentrality(freedom) * unit) / 2)),
        counts=counts,
        assumptions=("examples are independent", how),
    )


def noncentrality(freedom: int) -> float:
    """Of a chi-square statistic that exceeds its critical value at level 0.05 with 80 % power.

    >>> round(noncentrality(1), 3)  # (1.960 + 0.842) ** 2
    7.849
    """
    critical = stats.chi2.isf(LEVEL, freedom)

    def lacking(value: float) -> float:
        return stats.ncx2.sf(critical, freedom, value) - POWER

    return float(brentq(lacking, 1e-6, 100 + 10 * freedom))


def _as_predictions(source: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(source), np.asarray(target)
    if first.ndim != second.ndim or first.ndim not in (1, 2):
        raise ValueError(
            f"source predictions have shape {first.shape} and target predictions {second.shape}; "
            "both are labels [n], or both probabilities [n, classes]"
        )
    if first.ndim == 2:
        first = as_probabilities(source, "source probabilities")
        second = as_probabilities(target, "target probabilities")
        same_width(first, "source probabilities", second, "target probabilities")
        return first.argmax(1), second.argmax(1)
    for found, name in ((first, "source"), (second, "target")):
        if found.dtype.kind not in "iuf" or not np.array_equal(found, np.round(found)):
            raise TypeError(f"{name} predictions are class numbers, not {found.dtype}")
    return first.astype(np.int64), second.astype(np.int64)


def _exact(table: np.ndarray) -> float:
    """Probability of the 2 x 2 tables that are as far from what is expected."""
    drawn, common, total = int(table[1].sum()), int(table[:, 0].sum()), int(table.sum())
    possible = np.arange(max(0, drawn + common - total), min(drawn, common) + 1)
    # In whole numbers, so that the two ends of a symmetric table tie.
    distance = np.abs(possible * total - drawn * common)
    extreme = distance >= abs(int(table[1, 0]) * total - drawn * common)
    return float(min(1.0, stats.hypergeom.pmf(possible[extreme], total, common, drawn).sum()))


def _permuted(table: np.ndarray, permutations: int, seed: int) -> float:
    # In an order that the table alone decides: another numbering of the classes draws the same.
    table = table[:, np.lexsort((table[0], table.sum(0)))]
    column, row = table.sum(0), table.sum(1)
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(
        column, int(row[1]), size=permutations, method="marginals"
    )
    expected = row[1] * column / column.sum()
    # Both rows miss what is expected by the same: the source's share of the sum is a factor.
    observed = float(((table[1] - expected) ** 2 / expected).sum())
    return permutation_p(observed, ((drawn - expected) ** 2 / expected).sum(1))
