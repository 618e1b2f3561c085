"""Progress through a plan, and the decision whether the next phase begins.

``Progress`` is the part of a checkpoint that is not an array. ``decide`` applies the rule of a plan
to what validation has shown, by a paired test on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flaxtransfer.data.loader import DataLoaders
from flaxtransfer.training.plan import Phase, Plan


@dataclass(frozen=True)
class Progress:
    """A phase, how far it has come, and how validation has gone.

    Args:
        phase: index of the phase.
        phase_start: step of the run at which the phase began.
        phase_step: steps done in the phase.
        best: best validation score of the run so far, or None before any.
        best_step: the step that had it first.
        without_improvement: validations of this phase since its own best.
        phase_best: best validation score of this phase, or None.
        best_before: ``best`` when the phase began.
        unhelpful: phases in a row, up to the one before this, that did not better ``best``.
        examples: of the validation set; 0 before any validation.
        hits: which of them the best of this phase got right, as bits in hexadecimal, or None.
        hits_before: the same of the best when the phase began.
    """

    phase: int = 0
    phase_start: int = 0
    phase_step: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    phase_best: float | None = None
    best_before: float | None = None
    unhelpful: int = 0
    examples: int = 0
    hits: str | None = None
    hits_before: str | None = None

    @property
    def step(self) -> int:
        """Step of the run."""
        return self.phase_start + self.phase_step

    def out_of_patience(self, phase: Phase) -> bool:
        """Whether the phase ends because validation has not improved for long enough."""
        return phase.patience is not None and self.without_improvement >= phase.patience

    @property
    def helped(self) -> bool:
        """Whether the phase has bettered the run's validation score; the first one always has."""
        if self.best_before is None:
            return True
        return self.best is not None and self.best > self.best_before

    def next_phase(self) -> Progress:
        """The position before the first step of the next phase."""
        return Progress(
            phase=self.phase + 1,
            phase_start=self.step,
            best=self.best,
            best_step=self.best_step,
            best_before=self.best,
            unhelpful=0 if self.helped else self.unhelpful + 1,
            examples=self.examples,
            hits_before=self.hits if self.helped else self.hits_before,
        )

    def validated(self, score: float, correct: np.ndarray) -> Progress:
        """The position after a validation: its score, and bool [examples], what it got right."""
        improved = self.phase_best is None or score > self.phase_best
        first = self.best is None or score > self.best
        return replace(
            self,
            best=score if first else self.best,
            best_step=self.step if first else self.best_step,
            phase_best=score if improved else self.phase_best,
            examples=len(correct),
            hits=bits(correct) if improved else self.hits,
            without_improvement=0 if improved else self.without_improvement + 1,
        )


def bits(correct: np.ndarray) -> str:
    """Bool [examples] as a hexadecimal number, which fits into the record of a checkpoint.

    >>> bits(np.array([True, False, True]))
    'a0'
    """
    return np.packbits(correct).tobytes().hex()


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


@dataclass(frozen=True)
class Comparison:
    """Two states on the same validation images.

    Args:
        before: images that the earlier state gets right.
        won: images that only the later one gets right.
        lost: images that only the earlier one does.
        examples: all images.
    """

    before: int
    won: int
    lost: int
    examples: int

    @classmethod
    def of(cls, before: str, after: str, examples: int) -> Comparison:
        """Compares two records of what was right; see ``position.bits``."""
        old, new = int(before, 16), int(after, 16)
        won, lost = (new & ~old).bit_count(), (old & ~new).bit_count()
        return cls(old.bit_count(), won, lost, examples)

    def gain(self, min_z: float = 0.0) -> float:
        """Accuracy gained, as a share, less ``min_z`` of its standard errors.

        >>> Comparison(before=80, won=9, lost=1, examples=100).gain()
        0.08
        >>> Comparison(before=80, won=4, lost=0, examples=100).gain(min_z=2.0)
        0.0
        """
        return (self.won - self.lost - min_z * math.sqrt(self.won + self.lost)) / self.examples

    @property
    def z(self) -> float:
        """The gain in its standard errors; 0 where the two states agree on every image."""
        return (self.won - self.lost) / math.sqrt(max(1, self.won + self.lost))

    def to_json(self) -> dict[str, float | int]:
        """What a metrics file holds of it."""
        return {
            "accuracy_before": self.before / self.examples,
            "accuracy": (self.before + self.won - self.lost) / self.examples,
            "won": self.won,
            "lost": self.lost,
            "examples": self.examples,
            "z": self.z,
        }

    def __str__(self) -> str:
        found = self.to_json()
        return (
            f"validation accuracy {100 * found['accuracy']:.2f} %, before it "
            f"{100 * found['accuracy_before']:.2f} %; {self.won} images won and {self.lost} lost "
            f"of {self.examples} (z {self.z:.1f})"
        )


def score(plan: Plan, position: Progress, correct: np.ndarray) -> float:
    """What validations of one phase, and of different phases, are ranked by.

    In the first phase it is the accuracy; from then on the score that has to be beaten plus the
    gain over it on the same images, less what ``Plan.min_gain`` and ``Plan.min_z`` ask for. So a
    state is the best of the run exactly when its phase has helped, and only one has to be kept.
    """
    if position.best_before is None or position.hits_before is None:
        return float(correct.mean())
    compared = Comparison.of(position.hits_before, bits(correct), len(correct))
    return position.best_before + compared.gain(plan.min_z) - plan.min_gain


def decide(plan: Plan, position: Progress) -> Decision:
    """Applies the plan's rule at the end of a phase."""
    names = [phase.name for phase in plan.phases]
    here, following = names[position.phase], names[position.phase + 1 : position.phase + 2]
    unhelpful = 0 if position.helped else position.unhelpful + 1
    goes_on = bool(following) and (plan.patience is None or unhelpful < plan.patience)
    if position.best is None or len(names) == 1:
        return Decision(goes_on)
    evidence: dict[str, Any] = {
        "phase": here,
        "score": position.phase_best,
        "score_before": position.best_before,
        "kept": position.helped,
        "next": following[0] if goes_on else None,
    }
    if position.hits is None:
        return Decision(goes_on, evidence)
    if position.hits_before is None:
        return Decision(goes_on, evidence | {"accuracy": position.phase_best})
    compared = Comparison.of(position.hits_before, position.hits, position.examples)
    evidence |= compared.to_json()
    text = f"phase {here!r} {'is kept' if position.helped else 'is undone'}: {compared}"
    if following and not goes_on:
        text += f"; {following[0]!r} is not begun"
    return Decision(goes_on, evidence, text)


def check_feed(plan: Plan, feed: DataLoaders) -> None:
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
