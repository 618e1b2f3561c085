"""How common each class is: the one type that every estimator of it returns."""

import dataclasses

import numpy as np

__all__ = ["Prevalence"]


@dataclasses.dataclass(frozen=True, eq=False)
class Prevalence:
    """Estimated shares of the classes in a target population.

    Args:
        method: which estimator, "maximum likelihood", "BBSE".
        estimate: `[K]`, non-negative, sums to 1.
        low: `[K]`, lower ends of the intervals; NaN where there are none.
        high: `[K]`, upper ends.
        level: of the intervals, 0.95.
        source: `[K]`, the prior that the estimate is relative to: q / p are the weights.
        counts: validation examples and target examples.
        gap: optimality certificate of a likelihood: what the mean log-likelihood can still rise
            by, at most; None for estimators that are no maximum.
        identifiable: whether the target's data determine the estimate at all.
        reason: why not; "" where they do.
        notes: what a reader has to know: negative raw solutions, the pair of classes that are
            confused most, classes that were left out.
    """

    method: str
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    source: np.ndarray
    counts: tuple[int, int]
    gap: float | None = None
    identifiable: bool = True
    reason: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.identifiable == bool(self.reason):
            raise ValueError("an estimate is identifiable, or there is a reason why it is not")

    @property
    def total_variation(self) -> float:
        """Distance of the estimate from the source prior, between 0 and 1."""
        return float(np.abs(self.estimate - self.source).sum() / 2)

    @property
    def effective_classes(self) -> float:
        """exp(entropy): 1 where one class is all there is, K where all are equally common."""
        shares = self.estimate[self.estimate > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))
