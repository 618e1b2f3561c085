"""Tests of single features and of predicted labels.

Kolmogorov-Smirnov tests compare each feature or class probability between source and target; the
chi-squared test compares how often each class is predicted. Use them to find what differs; for
differences between columns, in their correlation, use ``mmd_test``.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from flaxtransfer.shift.checks import as_features, as_probabilities, duplicate_row_notes, same_width
from flaxtransfer.shift.statistics import (
    LEVEL,
    POWER,
    HypothesisTest,
    check_repetitions,
    holm,
    permutation_p,
    untestable,
)

__all__ = [
    "kolmogorov_smirnov_test",
    "noncentrality",
    "predicted_label_test",
]

_KS_NAME = "Kolmogorov-Smirnov"

_KS_EFFECT = "largest distance of distribution functions"

_KS_MIN_ROWS = 5

_MAX_EXACT_ROWS = 10_000
"""Rows of the larger side up to which the p-value is exact, as in SciPy."""

_PREDICTED_NAME = "predicted labels"

_PREDICTED_HYPOTHESIS = "predicted classes are as frequent in the target as in the source"

_PREDICTED_EFFECT = "total variation"

_PREDICTED_MIN_ROWS = 5

_MIN_EXPECTED = 5.0
"""Cochran's rule: the chi-squared limit holds with at least this expected count per cell."""


def kolmogorov_smirnov_test(
    source: Any, target: Any, *, column_name: str = "feature"
) -> HypothesisTest:
    """Kolmogorov-Smirnov tests of every column, with Holm's correction.

    Use it for features, and for class probabilities, which summarize an image in few columns. It
    tests one column at a time; for what differs only between columns, in their correlation, use
    ``mmd_test``.

    Args:
        source: ``[n, D]`` features or probabilities, NumPy or JAX.
        target: ``[m, D]``.
        column_name: What a column is called, such as "feature" or "probability of class".

    Returns:
        The test of the family: p is the smallest adjusted p-value of a column, statistic and effect
        the largest distance, and ``members`` the tests of all columns, in order. Constant columns
        are not testable and do not count. Conservative for correlated or discrete columns.

    Raises:
        ValueError: Arrays of different width, with NaN, or without rows.

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
    notes = duplicate_row_notes(first, second)
    if min(counts) < _KS_MIN_ROWS:
        return untestable(
            _KS_NAME,
            hypothesis,
            f"{counts[0]} and {counts[1]} rows; each side needs >= {_KS_MIN_ROWS}",
            effect_name=_KS_EFFECT,
            counts=counts,
            notes=notes,
        )
    varies = (np.ptp(first, axis=0) > 0) | (np.ptp(second, axis=0) > 0)
    varies |= first[0] != second[0]
    members = holm(
        [
            _test_column(first[:, k], second[:, k], f"{column_name} {k}", int(varies.sum()))
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
        minimum_detectable=_detectable_distance(counts, len(tested)),
        counts=counts,
        assumptions=("examples are independent", "columns are continuous, or p is too large"),
        notes=notes,
        members=members,
    )


def predicted_label_test(
    source_predictions: Any,
    target_predictions: Any,
    *,
    permutations: int = 9999,
    seed: int = 0,
) -> HypothesisTest:
    """Chi-squared test of predicted labels: is each class predicted as often in target and source?

    Use it as quick evidence on prevalence that needs no calibration. It is not an estimate of
    prevalence (confusions blur it, see ``estimate_prevalence``), and a shift of the features alone
    changes predictions too.

    Pearson's chi-squared without continuity correction where every cell has an expected count of 5
    or more; otherwise the exact distribution given the margins, enumerated for two classes and
    simulated for more. The result depends on the table and the seed, not on the numbering of the
    classes.

    Args:
        source_predictions: ``[n]`` class numbers, or ``[n, K]`` probabilities, of which the largest
            counts.
        target_predictions: ``[m]`` or ``[m, K]``.
        permutations: Simulated tables for small counts.
        seed: Of the simulation.

    Raises:
        TypeError: Labels that are not whole numbers.
        ValueError: Probabilities of different classes, or one array of labels and one of
            probabilities.

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
    check_repetitions(permutations, "permutations")
    counts = (len(source), len(target))

    def untested(reason: str) -> HypothesisTest:
        return untestable(
            _PREDICTED_NAME,
            _PREDICTED_HYPOTHESIS,
            reason,
            effect_name=_PREDICTED_EFFECT,
            counts=counts,
        )

    if min(counts) < _PREDICTED_MIN_ROWS:
        return untested(
            f"{counts[0]} and {counts[1]} rows; each side needs >= {_PREDICTED_MIN_ROWS}"
        )
    # Classes that are never predicted are in neither array and drop out here.
    classes, coded = np.unique(np.concatenate([source, target]), return_inverse=True)
    if len(classes) == 1:
        return untested(f"every prediction is class {classes[0]}")
    table = np.stack(
        [
            np.bincount(coded[: len(source)], minlength=len(classes)),
            np.bincount(coded[len(source) :], minlength=len(classes)),
        ]
    )
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    freedom = len(classes) - 1
    if expected.min() >= _MIN_EXPECTED:
        p = float(stats.chi2.sf(statistic, freedom))
        method = "the chi-squared limit: every cell has an expected count of 5 or more"
    elif len(classes) == 2:
        p = _exact_p(table)
        method = "the exact distribution given the margins"
    else:
        p = _simulated_p(table, permutations, seed)
        method = (
            f"{permutations} simulated tables with the same margins: the smallest expected count "
            f"is {expected.min():.2g}"
        )
    frequencies = table / table.sum(1, keepdims=True)
    unit = 1 / counts[0] + 1 / counts[1]
    return HypothesisTest(
        name=_PREDICTED_NAME,
        hypothesis=_PREDICTED_HYPOTHESIS,
        statistic=statistic,
        p=p,
        effect=float(np.abs(frequencies[0] - frequencies[1]).sum() / 2),
        effect_name=_PREDICTED_EFFECT,
        # By the Cauchy-Schwarz inequality the total variation is at most half the root of the
        # chi-squared divergence: a shift this large is found whichever classes change.
        minimum_detectable=min(1.0, float(np.sqrt(noncentrality(freedom) * unit) / 2)),
        counts=counts,
        assumptions=("examples are independent", method),
    )


def noncentrality(freedom: int) -> float:
    """Noncentrality at which a chi-squared test at level 0.05 has 80 % power.

    >>> round(noncentrality(1), 3)  # (1.960 + 0.842) ** 2
    7.849
    """
    critical = stats.chi2.isf(LEVEL, freedom)

    def missing_power(value: float) -> float:
        return float(stats.ncx2.sf(critical, freedom, value)) - POWER

    return float(brentq(missing_power, 1e-6, 100 + 10 * freedom))


def _test_column(first: np.ndarray, second: np.ndarray, name: str, family: int) -> HypothesisTest:
    counts = (len(first), len(second))
    with warnings.catch_warnings():
        # SciPy warns where the exact count overflows and uses the limit.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ks_2samp(
            first, second, method="exact" if max(counts) <= _MAX_EXACT_ROWS else "asymp"
        )
    distance = float(found.statistic)
    return HypothesisTest(
        name=_KS_NAME,
        hypothesis=f"{name} has one distribution in source and target",
        statistic=distance,
        p=min(1.0, float(found.pvalue)),
        effect=distance,
        effect_name=_KS_EFFECT,
        minimum_detectable=_detectable_distance(counts, family),
        counts=counts,
    )


def _detectable_distance(counts: tuple[int, int], family: int) -> float:
    """The distance found with 80 % power after correction for a family of columns.

    The asymptotic critical value, sqrt(-log(level / 2) / 2) times sqrt(1 / n + 1 / m), plus the
    standard deviation of the difference of two proportions near one half.
    """
    critical = np.sqrt(-np.log(LEVEL / family / 2) / 2)
    unit = np.sqrt(1 / counts[0] + 1 / counts[1])
    return float(min(1.0, (critical + stats.norm.ppf(POWER) / 2) * unit))


def _as_predictions(source: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(source), np.asarray(target)
    if first.ndim != second.ndim or first.ndim not in (1, 2):
        raise ValueError(
            "source and target predictions must both be labels [n] or both be probabilities "
            f"[n, classes], got shapes {list(first.shape)} and {list(second.shape)}"
        )
    if first.ndim == 2:
        first = as_probabilities(source, "source probabilities")
        second = as_probabilities(target, "target probabilities")
        same_width(first, "source probabilities", second, "target probabilities")
        return first.argmax(1), second.argmax(1)
    for found, name in ((first, "source"), (second, "target")):
        if found.dtype.kind not in "iuf" or not np.array_equal(found, np.round(found)):
            raise TypeError(f"{name} predictions must be class numbers, got {found.dtype}")
    return first.astype(np.int64), second.astype(np.int64)


def _exact_p(table: np.ndarray) -> float:
    """Probability of the 2 x 2 tables that are at least as far from the expected one."""
    drawn, common, total = int(table[1].sum()), int(table[:, 0].sum()), int(table.sum())
    possible = np.arange(max(0, drawn + common - total), min(drawn, common) + 1)
    # In integers, so that the two tails of a symmetric table tie.
    distance = np.abs(possible * total - drawn * common)
    extreme = distance >= abs(int(table[1, 0]) * total - drawn * common)
    return float(min(1.0, stats.hypergeom.pmf(possible[extreme], total, common, drawn).sum()))


def _simulated_p(table: np.ndarray, permutations: int, seed: int) -> float:
    # Sorted by content, so that another numbering of the classes gives the same draws.
    table = table[:, np.lexsort((table[0], table.sum(0)))]
    column, row = table.sum(0), table.sum(1)
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(
        column, int(row[1]), size=permutations, method="marginals"
    )
    expected = row[1] * column / column.sum()
    # Both rows deviate by the same amount: the source's part of the sum is a constant factor.
    observed = float(((table[1] - expected) ** 2 / expected).sum())
    return permutation_p(observed, ((drawn - expected) ** 2 / expected).sum(1))
