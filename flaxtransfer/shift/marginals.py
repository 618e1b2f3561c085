"""Tests of single features and of predicted labels.

Which single feature, class probability or predicted label is distributed differently?

Are the model's predicted classes as frequent in the target as in the source?
"""

import warnings
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from flaxtransfer.shift.checks import as_features, as_probabilities, duplicate_notes, same_width
from flaxtransfer.shift.statistics import (
    LEVEL,
    POWER,
    HypothesisTest,
    enough_repetitions,
    holm,
    permutation_p,
    untestable,
)

__all__ = ["kolmogorov_smirnov_test", "noncentrality", "predicted_label_test"]


_KS_NAME = "Kolmogorov-Smirnov"
_KS_EFFECT = "largest distance of distribution functions"
_KS_FEWEST = 5
_EXACT = 10_000
"""Rows of the larger side up to which the p-value is exact, as in scipy."""


def kolmogorov_smirnov_test(
    source: Any, target: Any, *, column_name: str = "feature"
) -> HypothesisTest:
    """Whether each column has one distribution in source and target, and which differs most.

    For features, and for class probabilities (where few columns carry what the model makes of an
    image). One test a column and Holm's correction over all of them; what differs only between
    columns, in their correlation, is for `mmd_test`.

    Args:
        source: `[n, D]` features or probabilities, numpy or JAX.
        target: `[m, D]`.
        column_name: what a column is called: "feature", "probability of class".

    Returns:
        The test of the family: p is the smallest adjusted p-value of a column, statistic and effect
        the largest distance, and `members` the tests of all columns, in order. Constant columns
        are not testable and do not count. Conservative where columns are correlated or discrete.

    Raises:
        ValueError: arrays of different width, with NaN, of no rows.

    >>> rng = np.random.default_rng(0)
    >>> source, target = rng.normal(size=(200, 3)), rng.normal(size=(100, 3)) + [0, 1, 0]
    >>> test = kolmogorov_smirnov_test(source, target)
    >>> test.rejected(), test.notes[0], [member.rejected() for member in test.members]
    (True, 'feature 1 differs most', [False, True, False])

    References:
        S. Rabanser, S. Guennemann, Z. Lipton, "Failing loudly: an empirical study of methods for
        detecting dataset shift", 2019.
    """
    first = as_features(source, "source columns")
    second = as_features(target, "target columns")
    width = same_width(first, "source columns", second, "target columns")
    counts = (len(first), len(second))
    hypothesis = f"every {column_name} has one distribution in source and target"
    notes = duplicate_notes(first, second)
    if min(counts) < _KS_FEWEST:
        return untestable(
            _KS_NAME,
            hypothesis,
            f"{counts[0]} and {counts[1]} rows; each side needs {_KS_FEWEST}",
            effect_name=_KS_EFFECT,
            counts=counts,
            notes=notes,
        )
    varies = (np.ptp(first, axis=0) > 0) | (np.ptp(second, axis=0) > 0)
    varies |= first[0] != second[0]
    members = holm(
        [
            _column(first[:, k], second[:, k], f"{column_name} {k}", int(varies.sum()))
            if varies[k]
            else untestable(
                _KS_NAME,
                f"{column_name} {k} has one distribution",
                "it is constant",
                effect_name=_KS_EFFECT,
                counts=counts,
            )
            for k in range(width)
        ]
    )
    tested = [member for member in members if member.p is not None]
    if not tested:
        return untestable(
            _KS_NAME,
            hypothesis,
            f"every {column_name} is constant and equal on both sides",
            effect_name=_KS_EFFECT,
            counts=counts,
            notes=notes,
        )
    largest = max(range(width), key=lambda k: members[k].effect if varies[k] else -1.0)
    notes = (f"{column_name} {largest} differs most", *notes)
    if len(tested) < width:
        notes += (f"{width - len(tested)} of {width} columns are constant and were left out",)
    return HypothesisTest(
        name=_KS_NAME,
        hypothesis=hypothesis,
        statistic=members[largest].statistic,
        p=min(float(member.adjusted_p or 0.0) for member in tested),
        effect=members[largest].effect,
        effect_name=_KS_EFFECT,
        minimum_detectable=_detectable(counts, len(tested)),
        counts=counts,
        assumptions=("examples are independent", "columns are continuous, or p is too large"),
        notes=notes,
        members=members,
    )


def _column(first: np.ndarray, second: np.ndarray, name: str, family: int) -> HypothesisTest:
    counts = (len(first), len(second))
    with warnings.catch_warnings():
        # Where the exact count overflows, scipy says so and takes the limit.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ks_2samp(first, second, method="exact" if max(counts) <= _EXACT else "asymp")
    distance = float(found.statistic)
    return HypothesisTest(
        name=_KS_NAME,
        hypothesis=f"{name} has one distribution in source and target",
        statistic=distance,
        p=min(1.0, float(found.pvalue)),
        effect=distance,
        effect_name=_KS_EFFECT,
        minimum_detectable=_detectable(counts, family),
        counts=counts,
    )


def _detectable(counts: tuple[int, int], family: int) -> float:
    """The distance found with 80 % power after correction for a family of columns.

    The limit of the critical value, sqrt(-log(level / 2) / 2) times sqrt(1 / n + 1 / m), and on
    top what the difference of two shares, near one half, varies by.
    """
    critical = np.sqrt(-np.log(LEVEL / family / 2) / 2)
    unit = np.sqrt(1 / counts[0] + 1 / counts[1])
    return float(min(1.0, (critical + stats.norm.ppf(POWER) / 2) * unit))


_PREDICTED_NAME = "predicted labels"
_PREDICTED_HYPOTHESIS = "predicted classes are as frequent in the target as in the source"
_PREDICTED_EFFECT = "total variation"
_PREDICTED_FEWEST = 5
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
        return untestable(
            _PREDICTED_NAME,
            _PREDICTED_HYPOTHESIS,
            reason,
            effect_name=_PREDICTED_EFFECT,
            counts=counts,
        )

    if min(counts) < _PREDICTED_FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_PREDICTED_FEWEST}")
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
        name=_PREDICTED_NAME,
        hypothesis=_PREDICTED_HYPOTHESIS,
        statistic=statistic,
        p=p,
        effect=float(np.abs(shares[0] - shares[1]).sum() / 2),
        effect_name=_PREDICTED_EFFECT,
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
