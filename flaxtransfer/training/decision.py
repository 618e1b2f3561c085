"""Whether the next phase begins: the rule of a plan, applied to what validation has shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flaxtransfer.training.feed import Feed
from flaxtransfer.training.phases import Plan
from flaxtransfer.training.position import Position


@dataclass(frozen=True)
class Decision:
    """What follows the end of a phase.

    Args:
      goes_on: whether another phase begins.
      evidence: the numbers behind it, for the metrics; empty where nothing was decided.
      text: the same for a person; empty for the first phase, which is compared with nothing.
    """

    goes_on: bool
    evidence: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


def score(plan: Plan, position: Position, accuracy: float) -> float:
    """What validations of different phases are compared by; see ``Plan.min_gain``."""
    return accuracy - plan.min_gain * position.phase


def decide(plan: Plan, position: Position) -> Decision:
    """Applies the plan's rule at the end of a phase."""
    names = [phase.name for phase in plan.phases]
    here, following = names[position.phase], names[position.phase + 1 : position.phase + 2]
    unhelpful = 0 if position.helped else position.unhelpful + 1
    goes_on = bool(following) and (plan.patience is None or unhelpful < plan.patience)
    if position.best is None or len(names) == 1:
        return Decision(goes_on)
    evidence = {
        "phase": here,
        "score": position.phase_best,
        "score_before": position.best_before,
        "kept": position.helped,
        "next": following[0] if goes_on else None,
    }
    if position.best_before is None or position.phase_best is None:
        return Decision(goes_on, evidence)
    text = (
        f"phase {here!r} {'is kept' if position.helped else 'is undone'}: validation score "
        f"{position.phase_best:.4f}, before it {position.best_before:.4f}"
    )
    if following and not goes_on:
        text += f"; {following[0]!r} is not begun"
    return Decision(goes_on, evidence, text)


def check_feed(plan: Plan, feed: Feed) -> None:
    """Refuses rules that the data cannot answer, before anything is computed.

    Raises:
      ValueError: patience without a validation set, recalibration or a probe without a pass over
        the training images; all in one text.
    """
    problems = []
    if feed.validation is None:
        impatient = [f"phase {p.name!r}" for p in plan.phases if p.patience is not None]
        impatient += ["the plan"] if plan.patience is not None else []
        if impatient:
            problems.append(
                f"patience needs a validation set, and there is none; it is asked for by "
                f"{', '.join(impatient)}"
            )
    if feed.calibration is None:
        problems += [
            f"phase {phase.name!r} {what}, but the feed has no pass over the training images "
            "(Feed.calibration)"
            for phase in plan.phases
            for what, asked in (
                ("recalibrates", phase.recalibrate is not None),
                ("begins with a probe", phase.probe),
            )
            if asked
        ]
    if problems:
        raise ValueError("; ".join(problems))
