"""Learning rates that stretch with the phase they are used in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import optax

__all__ = ["WarmupCosine"]


@dataclass(frozen=True)
class WarmupCosine:
    """A linear warm-up from 0 to the peak, then half a cosine down to the end.

    A schedule of optax is a function of the step and has to be told its length; this one is a
    value that can be printed, compared and written to a file, and takes the length of the phase in
    which it is used.

    Args:
      peak: highest learning rate.
      warmup: share of the steps that rise, at least 0 and less than 1. It is one step at least,
        unless it is 0.
      end: learning rate after the last step, as a share of the peak.

    Raises:
      ValueError: numbers out of range; all in one text.

    References:
      I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
      P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017 (warm-up).

    >>> rate = WarmupCosine(1e-3).over(100)
    >>> [float(rate(step)).__round__(6) for step in (0, 10, 100)]
    [0.0, 0.001, 0.0]
    """

    peak: float
    warmup: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}, wanted a number of at least 0{below}"
            for name, value, limit, below in (
                ("peak", self.peak, math.inf, ""),
                ("warmup", self.warmup, 1, " and less than 1"),
                ("end", self.end, math.inf, ""),
            )
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < limit
        ]
        if problems:
            raise ValueError("no schedule: " + "; ".join(problems))

    def over(self, steps: int) -> Any:
        """The optax schedule for a phase of so many steps; for equal ones the same function."""
        return _schedule(self, steps)

    def __mul__(self, factor: float) -> WarmupCosine:
        """The same shape at another height."""
        return replace(self, peak=self.peak * factor)


@lru_cache(maxsize=1024)
def _schedule(rate: WarmupCosine, steps: int) -> Any:
    rising = max(1, int(steps * rate.warmup)) if rate.warmup else 0
    # optax wants at least one step that falls.
    return optax.warmup_cosine_decay_schedule(
        0.0 if rising else rate.peak,
        rate.peak,
        rising,
        max(steps, rising + 1),
        end_value=rate.end * rate.peak,
    )
