"""A plan as a table that a person reads before step 0."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flaxtransfer.groups import FROZEN, trainable_mask
from flaxtransfer.groups import Group as OptimizerGroup
from flaxtransfer.paths import flatten
from flaxtransfer.schedules import WarmupCosine
from flaxtransfer.training.phases import Phase, Plan
from flaxtransfer.types import Params

_WIDTH = 120
"""Characters a line of ``plan_text``, where there is no terminal to ask."""


def plan_table(plan: Plan, params: Params | None = None) -> Any:
    """What moves in each phase, how fast and for how long, as a renderable of rich.

    Args:
      plan: whose phases hold rules or resolved labels.
      params: of the network that it is meant for, or their shapes: adds the numbers of
        parameters, and of the BatchNorms that use batch statistics ("BN").

    Raises:
      ValueError: the plan does not fit the parameters.
    """
    table = Table("phase", "label", "leaves", "peak rate", "decay")
    resolved = plan.resolve(params) if params is not None else plan
    if params is not None:
        table.add_column("parameters", justify="right")
        table.add_column("BN", justify="right")
    for phase, fitted in zip(plan.phases, resolved.phases, strict=True):
        sizes = {} if params is None else _sizes(fitted, params)
        for number, (name, group) in enumerate(phase.groups.items()):
            cells = [f"{phase.name}\n{_length(phase)}" if number == 0 else ""]
            rule = phase.labels.get(name)
            cells += [name, "" if isinstance(rule, Mapping) or rule is None else str(rule)]
            cells += _pace(group)
            if params is not None:
                by_batch = len(fitted.batch_norm_policy()) if number == 0 else ""
                cells += [f"{sizes.get(name, 0):,}", str(by_batch)]
            table.add_row(*cells, end_section=number == len(phase.groups) - 1)
    for column in table.columns[3:]:
        column.no_wrap = True
    notes = _notes(plan) + ([] if params is None else _repeats(resolved))
    return Group(table, *(Text(note) for note in notes))


def plan_text(plan: Plan, params: Params | None = None) -> str:
    """``plan_table`` as plain text."""
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    console.print(plan_table(plan, params))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _length(phase: Phase) -> str:
    unit, number = ("epochs", phase.epochs) if phase.steps is None else ("steps", phase.steps)
    text = f"{number:g} {unit}"
    text = text if phase.patience is None else f"{text}, patience {phase.patience}"
    return f"{text}\nfrom a linear probe" if phase.probe else text


def _pace(group: Any) -> list[str]:
    if group is FROZEN:
        return ["frozen", ""]
    if not isinstance(group, OptimizerGroup):
        return ["–", "–"]
    rate: Any = group.learning_rate
    if isinstance(rate, WarmupCosine):
        text = f"{rate.peak:.2g}"
    else:
        text = "schedule" if callable(rate) else f"{rate:.2g}"
    decay = f"{group.weight_decay:g}" if group.weight_decay else "–"
    return [text, f"{decay} → start" if group.decay_toward == "start" else decay]


def _sizes(phase: Phase, params: Params) -> dict[str, int]:
    leaves = flatten(params)
    sizes: dict[str, int] = {}
    for path, name in flatten(phase.labels).items():
        sizes[name] = sizes.get(name, 0) + leaves[path].size
    return sizes


def _notes(plan: Plan) -> list[str]:
    if plan.patience is None:
        return []
    phases = "a phase" if plan.patience == 1 else f"{plan.patience} phases in a row"
    least = [f"{100 * plan.min_gain:g} %"] if plan.min_gain else []
    least += [f"{plan.min_z:g} standard errors"] if plan.min_z else []
    gain = f" by more than {' and '.join(least)} a phase" if least else ""
    return [f"Ends after {phases} without better validation{gain}; what did not help is undone."]


def _repeats(plan: Plan) -> list[str]:
    """Phases that move the leaves of the one before: meant for another pace, or a mistake."""
    moving = [jax.tree.leaves(trainable_mask(p.labels, p.groups)) for p in plan.phases]
    return [
        f"Phase {plan.phases[n].name!r} moves the same leaves as {plan.phases[n - 1].name!r}."
        for n in range(1, len(moving))
        if moving[n] == moving[n - 1]
    ]
