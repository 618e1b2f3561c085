"""Hypothesis tests, permutation nulls, corrections and confidence intervals.

What every test and every estimate of domain shift uses: the result type of a test, its p-value and
smallest detectable effect, Holm's correction for several tests, and intervals for a proportion and
for bootstrap replicates. Distances between samples and scores of features grow with the number of
features and shrink with the number of examples, even where there is no difference; each is
therefore reported with its permutation null.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from flaxtransfer.shift.checks import as_features, as_labels, same_width

__all__ = [
    "LEVEL",
    "POWER",
    "Distance",
    "HypothesisTest",
    "NullCalibrated",
    "Similarity",
    "Transferability",
    "bit_generator",
    "check_level",
    "check_repetitions",
    "check_replicates",
    "check_two_samples",
    "detectable_effect",
    "detectable_squared_effect",
    "encode_labels",
    "holm",
    "null_summary",
    "percentile_interval",
    "permutation_p",
    "random_folds",
    "random_permutations",
    "untestable",
    "wilson_interval",
]


LEVEL = 0.05
"""Significance level of ``HypothesisTest.minimum_detectable``."""

POWER = 0.8
"""Power of ``HypothesisTest.minimum_detectable``."""

_MIN_REPETITIONS = 19
"""With fewer, the smallest p-value 1 / (1 + repetitions) is above ``LEVEL``."""


@dataclasses.dataclass(frozen=True)
class HypothesisTest:
    """Result of a hypothesis test.

    Args:
        name: Name of the test.
        hypothesis: The null hypothesis in words, such as "source and target features have one
            distribution".
        statistic: The test statistic; NaN where it cannot be computed.
        p: Probability, under the null hypothesis, of a statistic at least as extreme; None where
            the test cannot be made, with the reason in ``not_testable``.
        effect: Size of the difference, in the unit ``effect_name``; does not depend on sample size.
        effect_name: What the effect measures, such as "AUC" or "total variation".
        minimum_detectable: The effect that this test finds with 80 % power at level 0.05; None
            where it is not known.
        counts: Sizes of the samples, in the order of the arguments.
        assumptions: What must hold for ``p`` to be valid.
        not_testable: Why there is no ``p``; "" where there is one.
        adjusted_p: ``p`` after ``holm``; None before.
        notes: What the reader must know, such as rows that occur in both samples or columns that
            were left out.
        members: The tests of a family, one per column, with their own adjusted p-values; empty for
            a single test.
    """

    name: str
    hypothesis: str
    statistic: float
    p: float | None
    effect: float
    effect_name: str
    minimum_detectable: float | None
    counts: tuple[int, ...]
    assumptions: tuple[str, ...] = ()
    not_testable: str = ""
    adjusted_p: float | None = None
    notes: tuple[str, ...] = ()
    members: tuple[HypothesisTest, ...] = ()

    def __post_init__(self) -> None:
        if (self.p is None) != bool(self.not_testable):
            raise ValueError(
                "exactly one of p and not_testable must be given, "
                f"got p={self.p!r} and not_testable={self.not_testable!r}"
            )
        if self.p is not None and not 0 <= self.p <= 1:
            raise ValueError(f"p must be between 0 and 1, got {self.p!r}")

    def rejected(self, level: float = 0.05) -> bool:
        """Whether the null hypothesis is rejected, by the adjusted p-value if there is one."""
        p = self.p if self.adjusted_p is None else self.adjusted_p
        return p is not None and p <= level

    def __str__(self) -> str:
        if self.p is None:
            return "\n".join([f"{self.name}: not testable, {self.not_testable}", *self._notes()])
        adjusted = "" if self.adjusted_p is None else f" (adjusted {self.adjusted_p:.3g})"
        smallest = self.minimum_detectable
        found = f"{self.effect_name} {self.effect:.3g}"
        if smallest is not None:
            found += f", detectable with 80 % power from {smallest:.3g}"
        return "\n".join(
            [f"{self.name}: p {self.p:.3g}{adjusted} if {self.hypothesis}; {found}", *self._notes()]
        )

    def _notes(self) -> list[str]:
        return [f"  note: {note}" for note in self.notes]


def holm(tests: Sequence[HypothesisTest]) -> tuple[HypothesisTest, ...]:
    """Holm's correction of p-values for several tests.

    Tests that could not be made are returned unchanged and do not count.

    >>> def tested(p):
    ...     return HypothesisTest("t", "H0", 0.0, p, 0.0, "AUC", None, (9, 9))
    >>> [test.adjusted_p for test in holm([tested(0.01), tested(0.04), tested(0.03)])]
    [0.03, 0.06, 0.06]

    References:
        S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    values = [test.p for test in tests if test.p is not None]
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    monotone = np.minimum(1.0, np.maximum.accumulate(np.asarray(values)[order] * factors))
    adjusted = dict(zip(order.tolist(), monotone.tolist(), strict=True))
    indices = iter(range(len(values)))
    return tuple(
        test if test.p is None else dataclasses.replace(test, adjusted_p=adjusted[next(indices)])
        for test in tests
    )


def untestable(
    name: str,
    hypothesis: str,
    reason: str,
    *,
    effect_name: str,
    counts: tuple[int, ...],
    notes: tuple[str, ...] = (),
) -> HypothesisTest:
    """A test that could not be made: no p-value, and the reason.

    >>> untestable("t", "H0", "one example", effect_name="AUC", counts=(1, 9)).rejected()
    False
    """
    return HypothesisTest(
        name=name,
        hypothesis=hypothesis,
        statistic=float("nan"),
        p=None,
        effect=float("nan"),
        effect_name=effect_name,
        minimum_detectable=None,
        counts=counts,
        not_testable=reason,
        notes=notes,
    )


def permutation_p(statistic: float, permuted: np.ndarray) -> float:
    """Permutation p-value: (1 + permuted statistics at least as large) / (1 + permutations).

    It is never 0.

    >>> permutation_p(2.0, np.array([1.0, 3.0, 0.0]))
    0.5

    References:
        B. Phipson, G. K. Smyth, "Permutation P-values should never be zero", 2010.
    """
    # Equal up to rounding counts as equal: the same sum in another order is not smaller.
    slack = 1e-12 * max(1.0, abs(statistic))
    return float((1 + (permuted >= statistic - slack).sum()) / (1 + len(permuted)))


def detectable_effect(null: np.ndarray) -> float:
    """Smallest effect that a test finds with 80 % power, from effects simulated under H0.

    It is the critical value at level 0.05 plus the standard deviation of the null times the 80 %
    quantile of the normal distribution. This is an approximation: it assumes that the statistic
    varies about its true value as it does under H0.

    >>> null = np.random.default_rng(0).normal(size=100_000)
    >>> round(detectable_effect(null), 1)  # 1.645 + 0.842
    2.5
    """
    return float(np.quantile(null, 1 - LEVEL) + norm.ppf(POWER) * np.std(null))


def detectable_squared_effect(null: np.ndarray) -> float:
    """Smallest squared distance that a test finds with 80 % power.

    The counterpart of ``detectable_effect`` for a squared distance, whose variance grows with its
    true value. A squared distance is a sum of squares of normal variables with weights w, minus its
    mean: under H0 its variance is 2 sum w^2 and its third cumulant 8 sum w^3. A true distance d
    adds 4 w d to the variance; the average w, from the cumulants, replaces the unknown one. In the
    simulations of ``experiments/shift_tests.py`` the power there is 0.79 for ``mmd_test`` and 0.68
    for ``residual_test``.

    >>> null = np.random.default_rng(0).normal(size=100_000) ** 2 - 1  # w = 1
    >>> round(detectable_squared_effect(null), 1)  # (1.96 + 0.84)^2 = 7.8 is exact
    7.7
    >>> round(detectable_squared_effect(null - 100), 1)  # an offset moves the result only
    -92.3
    """
    # Relative to the mean of the null, which is a little off zero after the bias correction.
    mean, z = float(null.mean()), float(norm.ppf(POWER))
    critical, variance = float(np.quantile(null, 1 - LEVEL)) - mean, float(np.var(null))
    if variance == 0:
        return mean + critical
    third = max(0.0, float(((null - null.mean()) ** 3).mean()))
    # The larger root of (d - critical)^2 = z^2 (variance + third / variance * d).
    slope = z**2 * third / variance
    half = critical + slope / 2
    return float(mean + half + np.sqrt(max(0.0, half**2 - critical**2 + z**2 * variance)))


def wilson_interval(successes: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a binomial proportion.

    It lies within 0 and 1, and has a positive width where no trial or every trial is a success,
    unlike the normal approximation.

    Args:
        successes: Number of successes.
        count: Number of trials.
        level: Confidence level.

    Raises:
        ValueError: No trials, more successes than trials, or a level outside of 0 and 1.

    >>> tuple(round(end, 4) for end in wilson_interval(8, 10))
    (0.4902, 0.9433)

    References:
        E. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(
            "successes must be between 0 and the number of trials, and that at least 1, "
            f"got {successes} successes of {count} trials"
        )
    z = float(norm.isf((1 - check_level(level)) / 2))
    fraction = successes / count
    middle = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = (
        z / (1 + z**2 / count) * np.sqrt(fraction * (1 - fraction) / count + (z / (2 * count)) ** 2)
    )
    # The observed fraction lies inside, whatever the rounding errors.
    return float(max(0.0, min(middle - half, fraction))), float(
        min(1.0, max(middle + half, fraction))
    )


def percentile_interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval, for statistics with little bias.

    Args:
        resampled: Bootstrap replicates ``[B]``.
        level: Confidence level.

    >>> percentile_interval(np.arange(9.0), 0.5)
    (2.0, 6.0)

    References:
        B. Efron, R. Tibshirani, "An introduction to the bootstrap", 1993.
    """
    tail = (1 - check_level(level)) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def check_level(level: float) -> float:
    """The confidence or significance level, checked.

    Raises:
        ValueError: Not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    return level


def check_repetitions(count: int, name: str) -> int:
    """The number of permutations or simulations, checked: a p-value of 0.05 must be reachable.

    Args:
        count: The number of repetitions.
        name: Name of the argument, for the error text.

    Raises:
        ValueError: Fewer than 19.
    """
    if count < _MIN_REPETITIONS:
        raise ValueError(
            f"{name} must be >= {_MIN_REPETITIONS}, got {count}: with fewer no p-value reaches "
            f"{LEVEL}; use 199 for a quick result, 999 for a precise one"
        )
    return int(count)


def check_replicates(replicates: int) -> int:
    """The number of bootstrap replicates, checked.

    Raises:
        ValueError: Not a whole number of at least 1.
    """
    if replicates < 1 or replicates != int(replicates):
        raise ValueError(f"replicates must be a whole number >= 1, got {replicates!r}; use 1000")
    return int(replicates)


_MIN_ROWS = 4

_MIN_PERMUTATIONS = 19
"""With fewer, the smallest p-value 1 / (1 + permutations) is above 0.05."""

_MAX_CLASSES = 2**31


@dataclasses.dataclass(frozen=True)
class NullCalibrated:
    """A statistic with its permutation null.

    Args:
        name: Name of the statistic.
        value: The statistic, in ``unit``.
        null_mean: Mean over random assignments of examples to the two samples, or of labels or rows
            to examples.
        null_sd: Standard deviation of the same.
        p: Permutation p-value, (1 + assignments with a value at least as large) /
            (1 + permutations).
        permutations: Number of random assignments.
        counts: Sizes of what the statistic is computed from.
        unit: Unit of the value.
        notes: What the reader must know.
    """

    name: str
    value: float
    null_mean: float
    null_sd: float
    p: float
    permutations: int
    counts: tuple[int, ...]
    unit: str = ""
    notes: tuple[str, ...] = ()

    @property
    def excess(self) -> float:
        """Value minus null mean: near 0, and sometimes negative, where there is no difference.

        Read it in units of ``null_sd`` and with the value: where there is a true distance,
        subtracting the null mean subtracts too much.
        """
        return self.value - self.null_mean

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        by_chance = f"by chance {self.null_mean:.4g} ± {self.null_sd:.2g}, p {self.p:.3g}"
        notes = [f"  note: {note}" for note in self.notes]
        return "\n".join([f"{self.name}: {self.value:.4g}{unit}; {by_chance}", *notes])


@dataclasses.dataclass(frozen=True)
class Distance(NullCalibrated):
    """Distance between two samples; ``counts`` are their sizes, in the order of the arguments.

    The value is biased upward, more so with fewer examples and with more features.
    """


@dataclasses.dataclass(frozen=True)
class Similarity(NullCalibrated):
    """Similarity of two representations of the same examples; ``counts`` is their number."""


@dataclasses.dataclass(frozen=True)
class Transferability(NullCalibrated):
    """Transferability score: how well features separate the classes; larger is better.

    ``counts`` are examples, features (or source classes) and classes. Compare scores of several
    networks only on the same examples.

    Args:
        effective_parameters: How many of the head's weights the labels determine; None for scores
            without such a number.
    """

    effective_parameters: float | None = None


def null_summary(value: float, null: np.ndarray) -> dict[str, Any]:
    """The fields of ``NullCalibrated`` from a value and its null ``[permutations]``.

    >>> null_summary(4.0, np.array([1.0, 2.0, 3.0]))
    {'value': 4.0, 'null_mean': 2.0, 'null_sd': 1.0, 'p': 0.25, 'permutations': 3}
    """
    return {
        "value": float(value),
        "null_mean": float(null.mean()),
        "null_sd": float(null.std(ddof=1)),
        "p": permutation_p(float(value), null),
        "permutations": len(null),
    }


def random_permutations(count: int, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """Random permutations of ``count`` rows, int64 ``[count]``; the same in every NumPy release.

    Raises:
        ValueError: Fewer than 19, with which no p-value reaches 0.05.

    >>> [order.tolist() for order in random_permutations(3, 19, seed=0)][:2]
    [[0, 1, 2], [1, 0, 2]]
    """
    if permutations < _MIN_PERMUTATIONS:
        raise ValueError(
            f"permutations must be >= {_MIN_PERMUTATIONS} to reach p <= 0.05, got {permutations}; "
            "199 is usual"
        )
    bits = bit_generator(seed, "orders")
    return (_random_permutation(count, bits) for _ in range(permutations))


def random_folds(count: int, folds: int, seed: int) -> np.ndarray:
    """Random folds: the fold of each row, int64 ``[count]``; sizes differ by at most one.

    The folds do not depend on samples or labels, so that they are the same in every permutation.

    Raises:
        ValueError: Fewer than 2 folds, or more folds than rows.

    >>> random_folds(5, 2, seed=0).tolist()
    [0, 1, 0, 0, 1]
    """
    if not 2 <= folds <= count:
        raise ValueError(
            f"folds must be between 2 and the number of examples, {count}, got {folds}; 5 is usual"
        )
    found = np.empty(count, np.int64)
    found[_random_permutation(count, bit_generator(seed, "folds"))] = np.arange(count) % folds
    return found


def bit_generator(seed: int, use: str) -> np.random.PCG64:
    """An independent random bit generator for each use of a seed.

    The caller's features may have been drawn with the same small seed; directions, folds or
    permutations from the same bits would then depend on these features.

    >>> bit_generator(0, "lines").random_raw() == np.random.PCG64(0).random_raw()
    False
    """
    return np.random.PCG64(np.random.SeedSequence((seed, *use.encode())))


def check_two_samples(source: Any, target: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features of both domains, float64, of one width and at least 4 rows each.

    Raises:
        ValueError: Fewer rows, different widths, or NaN or infinite numbers.

    >>> check_two_samples([[0.0]] * 4, [[1.0]] * 3)
    Traceback (most recent call last):
    ValueError: target features must have >= 4 rows for a distance, got 3
    """
    found = []
    for array, name in ((source, "source features"), (target, "target features")):
        features = as_features(array, name)
        if len(features) < _MIN_ROWS:
            raise ValueError(
                f"{name} must have >= {_MIN_ROWS} rows for a distance, got {len(features)}"
            )
        found.append(features)
    same_width(found[0], "source features", found[1], "target features")
    return found[0], found[1]


def encode_labels(labels: Any, count: int) -> tuple[np.ndarray, int]:
    """Labels renumbered 0 to C - 1 over the C classes that occur, int64 ``[count]``, and C.

    Classes without examples are left out.

    Raises:
        ValueError: Labels that are not class numbers or have another length; fewer than 4 examples;
            one class.

    >>> encode_labels([7, 2, 7, 2], 4)
    (array([1, 0, 1, 0]), 2)
    """
    if count < _MIN_ROWS:
        raise ValueError(f"a score needs >= {_MIN_ROWS} labeled examples, got {count}")
    names, found = np.unique(
        as_labels(labels, "labels", count=count, classes=_MAX_CLASSES), return_inverse=True
    )
    if len(names) < 2:
        raise ValueError(
            f"labels must have >= 2 classes for a score, got {count} labels of class {names[0]}"
        )
    return found, len(names)


def _random_permutation(count: int, bits: np.random.PCG64) -> np.ndarray:
    # NumPy guarantees that raw output does not change; it does not for ``Generator.permutation``.
    return np.argsort(bits.random_raw(count), kind="stable")
