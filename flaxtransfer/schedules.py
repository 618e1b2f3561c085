"""Learning-rate schedules.

Schedules that are values and take their length from the phase in which they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import optax

__all__ = ["WarmupCosine"]


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warmup from 0 to the peak, then cosine decay to the end.

    An optax schedule is a function of the step with a fixed length; this one is a value that can be
    printed, compared and written to a file, and takes its length from the phase.

    Args:
        peak: highest learning rate.
        warmup: fraction of the steps, >= 0 and < 1; at least one step, unless it is 0.
        end: learning rate after the last step, as a fraction of the peak.

    Raises:
        ValueError: numbers out of range; all in one text.

    References:
        I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
        P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017
        (warm-up).

    >>> rate = WarmupCosine(1e-3).over(100)
    >>> [float(rate(step)).__round__(6) for step in (0, 10, 100)]
    [0.0, 0.001, 0.0]
    """

    peak: float
    warmup: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be >= 0{below}, got {value!r}"
            for name, value, limit, below in (
                ("peak", self.peak, math.inf, ""),
                ("warmup", self.warmup, 1, " and < 1"),
                ("end", self.end, math.inf, ""),
            )
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < limit
        ]
        if problems:
            raise ValueError("invalid WarmupCosine: " + "; ".join(problems))

    def over(self, steps: int) -> Any:
        """The optax schedule for ``steps`` steps; the same object for equal arguments."""
        return _schedule(self, steps)

    def __mul__(self, factor: float) -> WarmupCosine:
        """The schedule with its peak multiplied by ``factor``."""
        return replace(self, peak=self.peak * factor)


@lru_cache(maxsize=1024)
def _schedule(rate: WarmupCosine, steps: int) -> Any:
    rising = max(1, int(steps * rate.warmup)) if rate.warmup else 0
    # optax needs at least one step of decay.
    return optax.warmup_cosine_decay_schedule(
        0.0 if rising else rate.peak,
        rate.peak,
        rising,
        max(steps, rising + 1),
        end_value=rate.end * rate.peak,
    )
