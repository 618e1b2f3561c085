"""Estimates of an accuracy without labels, each with what it assumes; never one alone."""

import dataclasses

__all__ = ["AccuracyEstimate", "AccuracyEstimates"]


@dataclasses.dataclass(frozen=True)
class AccuracyEstimate:
    """One way to guess a target's accuracy.

    Args:
        name: of the method.
        value: between 0 and 1; None where the method has none.
        low: lower end of the bootstrap's interval, or of what is possible where `value` is None;
            None where nothing is known.
        high: upper end.
        assumes: what has to hold of the target.
        not_available: why there is no value; "" where there is one.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    assumes: str
    not_available: str = ""

    def __post_init__(self) -> None:
        if (self.value is None) != bool(self.not_available):
            raise ValueError("an estimate has a value, or a reason why it has none")


@dataclasses.dataclass(frozen=True)
class AccuracyEstimates:
    """Several estimates of one accuracy, side by side: their spread is part of the answer.

    Args:
        source_accuracy: of the validation examples, which have labels.
        source_low: lower end of its Wilson interval.
        source_high: upper end.
        estimates: of the target's accuracy.
        counts: validation examples and target examples.
        level: of all intervals.
        notes: what a reader has to know.
    """

    source_accuracy: float
    source_low: float
    source_high: float
    estimates: tuple[AccuracyEstimate, ...]
    counts: tuple[int, int]
    level: float
    notes: tuple[str, ...] = ()

    @property
    def lowest(self) -> float:
        """Of the values."""
        return min(each.value for each in self.estimates if each.value is not None)

    @property
    def highest(self) -> float:
        """Of the values."""
        return max(each.value for each in self.estimates if each.value is not None)

    def __getitem__(self, name: str) -> AccuracyEstimate:
        for each in self.estimates:
            if each.name == name:
                return each
        names = ", ".join(repr(each.name) for each in self.estimates)
        raise KeyError(f"no estimate {name!r}; there are {names}")

    def __str__(self) -> str:
        count, size = self.counts
        width = max(len(each.name) for each in self.estimates)
        lines = [
            f"accuracy without labels, {size} target example(s); intervals of {self.level:.0%}",
            f"{'validation':{width}}  {self.source_accuracy:8.4f}  "
            f"{_interval(self.source_low, self.source_high)}  {count} example(s) with labels",
        ]
        for each in self.estimates:
            value = "       -" if each.value is None else f"{each.value:8.4f}"
            interval = _interval(each.low, each.high)
            lines.append(f"{each.name:{width}}  {value}  {interval}  if {each.assumes}")
            if each.not_available:
                lines.append(f"{'':{width}}  {each.not_available}")
        lines.append(f"{'spread':{width}}  {'':8}  {_interval(self.lowest, self.highest)}")
        return "\n".join([*lines, *self.notes])


def _interval(low: float | None, high: float | None) -> str:
    return " " * 16 if low is None or high is None else f"{low:.4f} to {high:.4f}"
