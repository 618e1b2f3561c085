"""Which single feature, class probability or predicted label is distributed differently?"""

import warnings
from typing import Any

import numpy as np
from scipy import stats

from flaxtransfer.shift.checks import as_features, same_width
from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.hypotheses import LEVEL, POWER, HypothesisTest, holm, untestable

__all__ = ["kolmogorov_smirnov_test"]

_NAME = "Kolmogorov-Smirnov"
_EFFECT = "largest distance of distribution functions"
_FEWEST = 5
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
    if min(counts) < _FEWEST:
        return untestable(
            _NAME, hypothesis, f"{counts[0]} and {counts[1]} rows; each side needs {_FEWEST}",
            effect_name=_EFFECT, counts=counts, notes=notes,
        )  # fmt: skip
    varies = (np.ptp(first, axis=0) > 0) | (np.ptp(second, axis=0) > 0)
    varies |= first[0] != second[0]
    members = holm(
        [
            _column(first[:, k], second[:, k], f"{column_name} {k}", int(varies.sum()))
            if varies[k]
            else untestable(
                _NAME, f"{column_name} {k} has one distribution", "it is constant",
                effect_name=_EFFECT, counts=counts,
            )
            for k in range(width)
        ]
    )  # fmt: skip
    tested = [member for member in members if member.p is not None]
    if not tested:
        return untestable(
            _NAME, hypothesis, f"every {column_name} is constant and equal on both sides",
            effect_name=_EFFECT, counts=counts, notes=notes,
        )  # fmt: skip
    largest = max(range(width), key=lambda k: members[k].effect if varies[k] else -1.0)
    notes = (f"{column_name} {largest} differs most", *notes)
    if len(tested) < width:
        notes += (f"{width - len(tested)} of {width} columns are constant and were left out",)
    return HypothesisTest(
        name=_NAME,
        hypothesis=hypothesis,
        statistic=members[largest].statistic,
        p=min(float(member.adjusted_p or 0.0) for member in tested),
        effect=members[largest].effect,
        effect_name=_EFFECT,
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
        name=_NAME,
        hypothesis=f"{name} has one distribution in source and target",
        statistic=distance,
        p=min(1.0, float(found.pvalue)),
        effect=distance,
        effect_name=_EFFECT,
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
