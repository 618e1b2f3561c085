"""A sweep over learning rates that leaves no trace."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import DataLoaders, reading
from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.overview import terminal
from flaxtransfer.paths import suggest
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.training.selection import prepared
from flaxtransfer.training.step import start, train_step

__all__ = ["RateSweep", "find_learning_rate", "find_learning_rates"]


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
        suggestion: rate at which the smoothed loss fell fastest, or None where it never fell. It is
            a rate to begin with, not the best one.
        diverged: whether the sweep ended because the loss had grown or was not finite.
        group: which group was swept; None for all.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool
    group: str | None = None

    @property
    def valley(self) -> float | None:
        """The middle of the longest fall of the smoothed loss; None where it never fell.

        A fall is a strictly falling subsequence, so that noise does not break it, as in fastai's
        "valley". It is the more robust suggestion: no single steep stretch draws it to itself.
        """
        # By step: how long the longest fall to it is, and from which step it comes.
        falls: list[tuple[int, int]] = []
        for n, loss in enumerate(self.smoothed):
            above = [k for k in range(n) if self.smoothed[k] > loss]
            before = max(above, key=lambda k: falls[k][0], default=-1)
            falls.append((1 if before < 0 else falls[before][0] + 1, before))
        length, step = max(((fall[0], -n) for n, fall in enumerate(falls)), default=(0, 0))
        if length < 3:
            return None
        step = -step
        for _ in range((length - 1) // 2):
            step = falls[step][1]
        return self.rates[step]

    def __str__(self) -> str:
        from rich.table import Table

        table = Table("rate", "loss", "", title=f"learning rates of {self.group or 'all groups'}")
        # What comes after the loss has doubled would flatten all that is of interest.
        low, high = min(self.smoothed), min(max(self.smoothed), 2 * self.smoothed[0])
        for n in np.unique(np.linspace(0, len(self.rates) - 1, 16).astype(int)):
            bar = "█" * round(24 * min(1.0, (self.smoothed[n] - low) / max(high - low, 1e-12)))
            table.add_row(f"{self.rates[n]:.1e}", f"{self.smoothed[n]:.3f}", bar)
        console = terminal(file=io.StringIO(), width=60, color_system=None)
        console.print(table)
        found = "the loss never fell"
        if self.suggestion is not None:
            found = f"suggestion: {self.suggestion:.1e}, where the loss fell fastest"
        if self.valley is not None:
            found += f"; middle of the fall: {self.valley:.1e}"
        return f"{console.file.getvalue().rstrip()}\n{found}"  # type: ignore[attr-defined]


def find_learning_rate(
    network: Classifier,
    phase: Phase,
    feed: DataLoaders,
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
        network: where to start; not changed.
        phase: which leaves move, with which optimizers; its learning rates are not used.
        feed: its training batches from the first one on.
        group: sweep this group alone, with all others standing still: what moves beside it at rates
            of its own would be part of the loss, and of the suggestion. By default every group has
            the same rate.
        lowest: rate of the first step.
        highest: rate of the last step.
        steps: how many, unless the loss diverges before.
        seed: of the random key.
        mesh: devices; by default all of them.

    Raises:
        ValueError: numbers out of range, no such group, or one that is frozen or no ``Group``; the
            loss is not finite from the start, or no gradient comes down to the group.

    Example (see ``RateSweep`` for what comes back):

        sweep = ft.find_learning_rate(network, plan.phases[0], feed, group="head")
        print(sweep)

    References:
        L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017 (range test). J.
        Howard, S. Gugger, "fastai: A Layered API for Deep Learning", 2020 (the steepest slope and
        the valley).
    """
    check_sweep(phase, group, lowest, highest, steps)
    growth = (highest / lowest) ** (1 / (steps - 1))

    def rate(step: Any) -> Any:
        return lowest * growth**step

    swept = replace(phase, groups=_swept(phase, group, rate), patience=None, ema=None)
    network, plan = prepared(network, Plan([swept]), feed)
    swept = plan.phases[0]
    mesh = mesh or make_mesh()
    state = place_replicated(start(network.variables, swept, seed), mesh)
    step = train_step(network.model, swept, feed, network.task, mesh)
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    with reading(feed, 0) as batches:
        for number in range(steps):
            batch = next(batches)
            placed = place_batch({k: batch[k] for k in ("image", "label")}, mesh)
            state, metrics = step(state, placed)
            if number == 0 and not float(metrics["gradient_norm"]):
                raise ValueError(
                    f"{group or 'the network'} gets no gradient, so that no rate can be told from "
                    "another: what lies above it is at zero, as a new head is; train the head first"
                )
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
    if not losses:
        raise ValueError(
            "the loss is not finite before any step; the weights or the images are not sound"
        )
    rates = [lowest * growth**number for number in range(len(losses))]
    return RateSweep(
        tuple(rates), tuple(losses), tuple(smoothed), steepest(rates, smoothed), diverged, group
    )


def find_learning_rates(
    network: Classifier, phase: Phase, feed: DataLoaders, **settings: Any
) -> dict[str, RateSweep]:
    """A sweep for each group of the phase by itself, all others standing still.

    Use it where groups shall have rates of their own. Each sweep starts from ``variables``; none
    leaves a trace.

    Args:
        network: where to start; not changed.
        phase: which leaves move, with which optimizers.
        feed: its training batches from the first one on.
        **settings: as for ``find_learning_rate``: lowest, highest, steps, seed, mesh.

    Returns:
        By the name of each group that has a learning rate, in the order of the phase.

    Raises:
        ValueError: as for ``find_learning_rate``; or no group has a learning rate.
    """
    names = _tunable(phase)
    if not names:
        raise ValueError(f"phase {phase.name!r} has no group with a learning rate")
    return {
        name: find_learning_rate(network, phase, feed, group=name, **settings) for name in names
    }


def _tunable(phase: Phase) -> list[str]:
    return [name for name, value in phase.groups.items() if isinstance(value, Group)]


def _swept(phase: Phase, group: str | None, rate: Any) -> dict[str, Any]:
    """The phase's groups at the rising rate; all but ``group`` stand still where one is given."""
    return {
        name: replace(value, learning_rate=rate)
        if isinstance(value, Group) and group in (None, name)
        else FROZEN
        for name, value in phase.groups.items()
    }


def steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate at which a smoothed loss falls fastest over the logarithm; None where it never does.

    Slopes are taken over a tenth of the sweep, and not at its start: from one step to the next, and
    while the average has few steps to go by, the steepest one is luck.
    """
    if len(smoothed) < 3:
        return None
    wide = max(1, len(rates) // 20)
    middle = np.arange(wide, len(rates) - wide)
    falls = np.array(smoothed)[middle + wide] - np.array(smoothed)[middle - wide]
    skipped = min(round(1 / (1 - _SMOOTHING)), len(middle) // 4)
    lowest = skipped + int(np.argmin(falls[skipped:]))
    return rates[middle[lowest]] if falls[lowest] < 0 else None


def check_sweep(phase: Phase, group: str | None, lowest: float, highest: float, steps: int) -> None:
    """Refuses what ``find_learning_rate`` would refuse, before anything is computed.

    Raises:
        ValueError: see there; all in one text.
    """
    problems = []
    tunable = _tunable(phase)
    bare = [n for n, g in phase.groups.items() if g is not FROZEN and n not in tunable]
    if group is None and bare:
        problems.append(
            f"the learning rates of {', '.join(bare)} are hidden in optax transformations; give "
            "them as ft.Group"
        )
    if group is not None and group not in tunable:
        problems.append(
            f"phase {phase.name!r} has no group {group!r} with a learning rate"
            f"{suggest(group, tunable)}; there are {', '.join(tunable) or 'none'}"
        )
    if not 0 < lowest < highest < math.inf:
        problems.append(f"rates must rise from a lowest above 0, got {lowest} to {highest}")
    if steps < 3:
        problems.append(f"steps must be 3 or more, got {steps}")
    if problems:
        raise ValueError("; ".join(problems))
