"""How common each class is: the one type that every estimator of it returns."""

import dataclasses

import numpy as np

__all__ = ["Prevalence"]

_ROWS = 20
"""Classes that are printed, at most."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prevalence:
    """Estimated shares of the classes in a target population.

    Args:
        method: which estimator, "maximum likelihood", "BBSE, soft".
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
        likelihood_ratio: 2 m times the rise of the mean log-likelihood over that of the source
            prior; about chi-squared with K - 1 degrees of freedom where nothing has shifted.
        raw: `[K]`, the shares by the inverse of the confusion matrix, negative ones included.
        condition: of the confusion matrix; infinite where it has no inverse.
        smallest_singular_value: of the confusion matrix: errors are multiplied by its inverse.
        confused: the two classes that can be told apart least.
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
    likelihood_ratio: float | None = None
    raw: np.ndarray | None = None
    condition: float | None = None
    smallest_singular_value: float | None = None
    confused: tuple[int, int] | None = None

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

    def __str__(self) -> str:
        validation, target = self.counts
        lines = [f"prevalence by {self.method}: {target} targets, {validation} validation examples"]
        if not self.identifiable:
            lines.append(f"NOT IDENTIFIABLE: {self.reason}")
        lines.append(f"{'class':>7} {'source':>8} {'target':>8}   {self.level:.0%} interval")
        largest = np.sort(np.argsort(-self.estimate, kind="stable")[:_ROWS])
        for k in largest.tolist():
            row = f"{k:>7} {self.source[k]:>8.4f} {self.estimate[k]:>8.4f}"
            if np.isfinite(self.low[k]):
                row += f"   {self.low[k]:.4f} to {self.high[k]:.4f}"
            lines.append(row)
        if len(self.estimate) > _ROWS:
            lines.append(f"    and {len(self.estimate) - _ROWS} smaller ones")
        gap = "" if self.gap is None else f", certificate {self.gap:.1e}"
        lines.append(f"total variation from the source {self.total_variation:.4f}{gap}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
