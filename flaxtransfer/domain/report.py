"""What an adaptation did, or why it did nothing, as a person reads it."""

from __future__ import annotations

from dataclasses import dataclass

from flaxtransfer.domain.reestimation import LayerStatistics, Reestimated
from flaxtransfer.domain.standing import Standing

__all__ = ["BatchNormReport", "Candidate"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network that was considered.

    Args:
      name: "source", "target statistics", "balanced, round 1".
      standing: on the target; None where no calibration was given.
      effective_images: behind its statistics, by Kish's formula; None for the source.
    """

    name: str
    standing: Standing | None
    effective_images: float | None


@dataclass(frozen=True, eq=False)
class BatchNormReport:
    """How BatchNorm statistics were adapted.

    Args:
      adapted: whether the variables that came back have new statistics.
      refusals: why not; with ``guard="warn"``, what would have been a reason.
      notes: what a person should know.
      statistics: what was measured, also where it was refused.
      candidates: the networks that were considered, the source's first.
      chosen: the name of the one that came back.
    """

    adapted: bool
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    statistics: Reestimated
    candidates: tuple[Candidate, ...]
    chosen: str

    @property
    def before(self) -> Standing | None:
        """Of the source's network."""
        return self.candidates[0].standing

    @property
    def after(self) -> Standing | None:
        """Of the network that came back."""
        return next(c.standing for c in self.candidates if c.name == self.chosen)

    @property
    def farthest(self) -> LayerStatistics:
        """The BatchNorm whose statistics moved most."""
        return max(self.statistics.layers, key=lambda layer: layer.distance)

    def __str__(self) -> str:
        found = self.statistics
        lines = [
            f"BatchNorm statistics of {found.images} target images, "
            f"{100 * found.share:.0f} % source; {found.passes} "
            f"pass{'' if found.passes == 1 else 'es'}{'' if found.exact else ', not exact'}; "
            f"farthest at {self.farthest.path}: {self.farthest.distance:.2f} standard deviations"
        ]
        for one in self.candidates:
            if one.standing is not None:
                mark = " (returned)" if one.name == self.chosen else ""
                lines.append(f"{one.name}{mark}: {one.standing}")
        word = "reason against it" if self.adapted else "not adapted"
        lines += [f"{word}: {reason}" for reason in self.refusals]
        return "\n".join([*lines, *self.notes])
