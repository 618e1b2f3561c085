"""Where in a plan a run stands: the part of a checkpoint that is not an array."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flaxtransfer.training.phases import Phase


@dataclass(frozen=True)
class Position:
    """A phase, how far it has come, and how validation has gone.

    Args:
      phase: index of the phase.
      phase_start: step of the run at which the phase began.
      phase_step: steps done in the phase.
      best: best validation score of the run so far, or None before any.
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

    def next_phase(self) -> Position:
        """The position before the first step of the next phase."""
        return Position(
            phase=self.phase + 1,
            phase_start=self.step,
            best=self.best,
            best_before=self.best,
            unhelpful=0 if self.helped else self.unhelpful + 1,
            examples=self.examples,
            hits_before=self.hits if self.helped else self.hits_before,
        )

    def validated(self, score: float, correct: np.ndarray) -> Position:
        """The position after a validation: its score, and bool [examples], what it got right."""
        improved = self.phase_best is None or score > self.phase_best
        return replace(
            self,
            best=score if self.best is None else max(self.best, score),
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
