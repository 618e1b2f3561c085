"""Hypothesis tests, corrections for many of them, and confidence intervals.

The result of a statistical test, and the correction for asking several questions at once.

Confidence intervals: of a share, and of a statistic that was resampled.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

__all__ = [
    "LEVEL",
    "POWER",
    "HypothesisTest",
    "checked_level",
    "checked_replicates",
    "detectable",
    "detectable_square",
    "enough_repetitions",
    "holm",
    "percentile_interval",
    "permutation_p",
    "untestable",
    "wilson_interval",
]


LEVEL = 0.05
"""The level that `minimum_detectable` is given at."""

POWER = 0.8
"""The power that `minimum_detectable` is given at."""

_FEWEST_REPETITIONS = 19
"""With fewer, (1 + 0) / (1 + repetitions) never reaches `LEVEL`."""


@dataclasses.dataclass(frozen=True)
class HypothesisTest:
    """What a test asked and what it found.

    Args:
        name: of the test.
        hypothesis: H0 in words, "source and target features have one distribution".
        statistic: of the test; NaN where it could not be computed.
        p: probability, under H0, of a statistic at least as extreme; None where the question could
            not be tested, with the reason in `not_testable`.
        effect: how large the difference is, in the unit of `effect_name`; free of sample size.
        effect_name: what the effect measures, "AUC", "total variation".
        minimum_detectable: the effect that this test would have found with 80 % power; None where
            nothing is known about it.
        counts: sizes of the samples, in the order of the arguments.
        assumptions: what has to hold for `p` to mean what it says.
        not_testable: why there is no `p`; "" where there is one.
        adjusted_p: `p` after `holm`; None before.
        notes: what was found on the way and has to be known: rows that both samples share, columns
            that were left out.
        members: the tests that a family is made of, one a column, with their own adjusted p-values;
            empty for a single test.
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
    members: tuple["HypothesisTest", ...] = ()

    def __post_init__(self) -> None:
        if (self.p is None) != bool(self.not_testable):
            raise ValueError("a test has a p-value, or a reason why it has none")
        if self.p is not None and not 0 <= self.p <= 1:
            raise ValueError(f"a p-value lies between 0 and 1, not {self.p!r}")

    def rejected(self, level: float = 0.05) -> bool:
        """Whether H0 is rejected; the adjusted p-value counts where there is one."""
        p = self.p if self.adjusted_p is None else self.adjusted_p
        return p is not None and p <= level

    def __str__(self) -> str:
        if self.p is None:
            return "\n".join([f"{self.name}: not testable, {self.not_testable}", *self._notes()])
        adjusted = "" if self.adjusted_p is None else f" (adjusted {self.adjusted_p:.3g})"
        least = self.minimum_detectable
        found = f"{self.effect_name} {self.effect:.3g}"
        if least is not None:
            found += f", from {least:.3g} on it would be found in 4 of 5 cases"
        return "\n".join(
            [f"{self.name}: p {self.p:.3g}{adjusted} if {self.hypothesis}; {found}", *self._notes()]
        )

    def _notes(self) -> list[str]:
        return [f"  note: {note}" for note in self.notes]


def holm(tests: Sequence[HypothesisTest]) -> tuple[HypothesisTest, ...]:
    """The same tests with adjusted p-values; those that could not be tested do not count.

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
    raised = np.minimum(1.0, np.maximum.accumulate(np.asarray(values)[order] * factors))
    adjusted = dict(zip(order.tolist(), raised.tolist(), strict=True))
    numbers = iter(range(len(values)))
    return tuple(
        test if test.p is None else dataclasses.replace(test, adjusted_p=adjusted[next(numbers)])
        for test in tests
    )


def permutation_p(statistic: float, permuted: np.ndarray) -> float:
    """(1 + permuted statistics that are at least as large) / (1 + permutations), never 0.

    >>> permutation_p(2.0, np.array([1.0, 3.0, 0.0]))
    0.5

    References:
        B. Phipson, G. K. Smyth, "Permutation P-values should never be zero", 2010.
    """
    # Equal up to rounding counts as equal: the same sum in another order is not smaller.
    slack = 1e-12 * max(1.0, abs(statistic))
    return float((1 + (permuted >= statistic - slack).sum()) / (1 + len(permuted)))


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


def detectable(null: np.ndarray) -> float:
    """The true effect that is found with 80 % power, from effects simulated under H0.

    The critical value at level 0.05, and as many standard deviations on top as 80 % of a normal
    distribution reach down from its mean. An approximation: it takes the statistic to vary about
    its true value as it does under H0.

    >>> null = np.random.default_rng(0).normal(size=100_000)
    >>> round(detectable(null), 1)  # 1.645 + 0.842
    2.5
    """
    return float(np.quantile(null, 1 - LEVEL) + norm.ppf(POWER) * np.std(null))


def detectable_square(null: np.ndarray) -> float:
    """As `detectable`, of a squared distance, which varies more the larger it is.

    A squared distance is a sum of squares of normal numbers, of weights w, with its mean
    subtracted: variance 2 sum w^2 and third cumulant 8 sum w^3 under H0. A true distance d adds 4
    times its w to the variance; the average w, by the cumulants, stands for the unknown one. In
    `experiments/shift_tests.py`'s worlds the power there is 0.79 for `mmd_test`, and 0.68 for
    `residual_test`.

    >>> null = np.random.default_rng(0).normal(size=100_000) ** 2 - 1  # w = 1
    >>> round(detectable_square(null), 1)  # (1.96 + 0.84)^2 = 7.8 is exact
    7.7
    >>> round(detectable_square(null - 100), 1)  # wherever zero is
    -92.3
    """
    # From the null's mean, which correcting for sampling leaves a little off zero.
    mean, z = float(null.mean()), float(norm.ppf(POWER))
    critical, variance = float(np.quantile(null, 1 - LEVEL)) - mean, float(np.var(null))
    if variance == 0:
        return mean + critical
    third = max(0.0, float(((null - null.mean()) ** 3).mean()))
    # Of the quadratic equation (d - critical)^2 = z^2 (variance + third / variance * d).
    slope = z**2 * third / variance
    half = critical + slope / 2
    return float(mean + half + np.sqrt(max(0.0, half**2 - critical**2 + z**2 * variance)))


def enough_repetitions(count: int, name: str) -> int:
    """The number of permutations or simulations, where a p-value of 0.05 can be reached with it.

    Raises:
        ValueError: fewer than 19.
    """
    if count < _FEWEST_REPETITIONS:
        raise ValueError(
            f"{name}={count}: with fewer than {_FEWEST_REPETITIONS} no p-value reaches {LEVEL}; "
            "199 are quick, 999 are good"
        )
    return int(count)


def wilson_interval(successes: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """An interval for a probability, from how often it happened.

    It stays inside of 0 and 1 and has a width where nothing or everything happened, which the
    normal approximation has not.

    Raises:
        ValueError: no trials, more successes than trials, a level outside of 0 and 1.

    >>> tuple(round(end, 4) for end in wilson_interval(8, 10))
    (0.4902, 0.9433)

    References:
        E. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} trials have no interval")
    z = float(norm.isf((1 - checked_level(level)) / 2))
    share = successes / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    # The share itself is inside, also where rounding says otherwise.
    return float(max(0.0, min(middle - half, share))), float(min(1.0, max(middle + half, share)))


def percentile_interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The middle of a bootstrap's values: for statistics without much bias.

    >>> percentile_interval(np.arange(9.0), 0.5)
    (2.0, 6.0)

    References:
        B. Efron, R. Tibshirani, "An introduction to the bootstrap", 1993.
    """
    tail = (1 - checked_level(level)) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def checked_level(level: float) -> float:
    """The same level.

    Raises:
        ValueError: it is no share between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; it lies between 0 and 1, as 0.95")
    return level


def checked_replicates(replicates: int) -> int:
    """The same number.

    Raises:
        ValueError: it is no whole number from 1 up.
    """
    if replicates < 1 or replicates != int(replicates):
        raise ValueError(f"replicates is {replicates!r}; a bootstrap has one at least, better 1000")
    return int(replicates)
