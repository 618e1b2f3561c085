"""Where in a plan a run stands: the part of a checkpoint that is not an array."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flaxtransfer.training.phases import Phase


@dataclass(frozen=True)
class Position:
    """A phase, how far it has come, and how validation has gone.

    Args:
      phase: index of the phase.
      phase_start: step of the run at which the phase began.
      phase_step: steps done in the phase.
      best: best validation accuracy of the run so far, or None before any.
      without_improvement: validations of this phase since its own best.
      phase_best: best validation accuracy of this phase, or None.
    """

    phase: int = 0
    phase_start: int = 0
    phase_step: int = 0
    best: float | None = None
    without_improvement: int = 0
    phase_best: float | None = None

    @property
    def step(self) -> int:
        """Step of the run."""
        return self.phase_start + self.phase_step

    def out_of_patience(self, phase: Phase) -> bool:
        """Whether the phase ends because validation has not improved for long enough."""
        return phase.patience is not None and self.without_improvement >= phase.patience

    def validated(self, accuracy: float) -> Position:
        """The position after a validation."""
        improved = self.phase_best is None or accuracy > self.phase_best
        return replace(
            self,
            best=accuracy if self.best is None else max(self.best, accuracy),
            phase_best=accuracy if improved else self.phase_best,
            without_improvement=0 if improved else self.without_improvement + 1,
        )
