"""A sweep over learning rates that leaves no trace."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.models import Model
from flaxtransfer.paths import suggest
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.training.feed import Feed
from flaxtransfer.training.phases import Phase
from flaxtransfer.training.state import start
from flaxtransfer.training.step import train_step
from flaxtransfer.types import Variables

__all__ = ["RateSweep", "find_learning_rate"]

_SMOOTHING = 0.9
_DIVERGED = 4.0
"""The sweep ends where the smoothed loss is so many times its least, as in fastai."""


@dataclass(frozen=True)
class RateSweep:
    """What ``find_learning_rate`` saw.

    Args:
      rates: learning rate of each step, rising.
      losses: training loss before each step, in nats.
      smoothed: the same as an exponential average, corrected for its start.
      suggestion: rate at which the smoothed loss fell fastest, or None where it never fell.
      diverged: whether the sweep ended because the loss had grown or was not finite.
      group: which group was swept; None for all.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool
    group: str | None = None

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("rate", "loss", "", title=f"learning rates of {self.group or 'all groups'}")
        # What comes after the loss has doubled would flatten all that is of interest.
        low, high = min(self.smoothed), min(max(self.smoothed), 2 * self.smoothed[0])
        for n in np.unique(np.linspace(0, len(self.rates) - 1, 16).astype(int)):
            bar = "█" * round(24 * min(1.0, (self.smoothed[n] - low) / max(high - low, 1e-12)))
            table.add_row(f"{self.rates[n]:.1e}", f"{self.smoothed[n]:.3f}", bar)
        console = Console(file=io.StringIO(), width=60, color_system=None)
        console.print(table)
        found = "the loss never fell" if self.suggestion is None else f"{self.suggestion:.1e}"
        return f"{console.file.getvalue().rstrip()}\nsuggestion: {found}"  # type: ignore[attr-defined]


def find_learning_rate(
    model: Model,
    variables: Variables,
    phase: Phase,
    feed: Feed,
    *,
    group: str | None = None,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> RateSweep:
    """Trains a copy at rising learning rates and looks where the loss falls fastest.

    Use it to get the order of magnitude for new data or a new optimizer; validation decides among
    the rates near it. Nothing is left behind: variables are copied, batches and random keys are
    functions of the step, and nothing is written, so that training afterwards is bit for bit what
    it would have been.

    Args:
      model: the network.
      variables: where to start; not changed.
      phase: which leaves move, with which optimizers; its learning rates are not used.
      feed: its training batches from the first one on.
      group: sweep this group alone, with all others standing still; by default every group has the
        same rate.
      lowest: rate of the first step.
      highest: rate of the last step.
      steps: how many, unless the loss diverges before.
      seed: of the random key.
      mesh: devices; by default all of them.

    Raises:
      ValueError: numbers out of range, no such group, or one that is frozen or no ``Group``.

    References:
      L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (range test).
      J. Howard, S. Gugger, "fastai: A Layered API for Deep Learning", 2020 (the steepest slope).
    """
    _check_numbers(lowest, highest, steps)
    growth = (highest / lowest) ** (1 / (steps - 1))

    def rate(step: Any) -> Any:
        return lowest * growth**step

    swept = replace(phase, groups=_swept(phase, group, rate), patience=None, ema=None)
    swept = swept.resolve(variables["params"], feed.steps_per_epoch)
    mesh = mesh or make_mesh()
    state = place_replicated(start(variables, swept, seed), mesh)
    step = train_step(model, swept, feed)
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    batches = feed.train(0)
    try:
        for number in range(steps):
            batch = next(batches)
            placed = place_batch({k: batch[k] for k in ("image", "label")}, mesh)
            state, metrics = step(state, placed)
            loss = float(metrics["loss"])
            if not math.isfinite(loss):
                diverged = True
                break
            losses.append(loss)
            average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
            smoothed.append(average / (1 - _SMOOTHING ** (number + 1)))
            if smoothed[-1] > _DIVERGED * min(smoothed):
                diverged = True
                break
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    rates = [lowest * growth**number for number in range(len(losses))]
    return RateSweep(
        tuple(rates), tuple(losses), tuple(smoothed), _steepest(rates, smoothed), diverged, group
    )


def _swept(phase: Phase, group: str | None, rate: Any) -> dict[str, Any]:
    """The phase's groups at the rising rate; all but ``group`` stand still where one is given."""
    tunable = [name for name, value in phase.groups.items() if isinstance(value, Group)]
    bare = [n for n, g in phase.groups.items() if g is not FROZEN and n not in tunable]
    if group is None and bare:
        raise ValueError(
            f"the learning rates of {', '.join(bare)} are hidden in optax transformations; give "
            "them as ft.Group"
        )
    if group is not None and group not in tunable:
        raise ValueError(
            f"no group {group!r} with a learning rate{suggest(group, tunable)}; there are "
            f"{', '.join(tunable) or 'none'}"
        )
    return {
        name: replace(value, learning_rate=rate)
        if isinstance(value, Group) and group in (None, name)
        else FROZEN
        for name, value in phase.groups.items()
    }


def _steepest(rates: list[float], smoothed: list[float]) -> float | None:
    if len(smoothed) < 3:
        return None
    slopes = np.gradient(np.array(smoothed), np.log(rates))
    lowest = int(np.argmin(slopes))
    return rates[lowest] if slopes[lowest] < 0 else None


def _check_numbers(lowest: float, highest: float, steps: int) -> None:
    problems = []
    if not 0 < lowest < highest < math.inf:
        problems.append(f"rates rise from a lowest above 0, not from {lowest} to {highest}")
    if steps < 3:
        problems.append(f"steps is {steps}, wanted 3 or more")
    if problems:
        raise ValueError("; ".join(problems))
