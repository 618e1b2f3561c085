"""What is known of a shift, as one value: to print, to write, to act on."""

import dataclasses
from typing import Any

from flaxtransfer.shift.accuracy.accuracy import AccuracyEstimates
from flaxtransfer.shift.calibration.calibration_error import CalibrationError
from flaxtransfer.shift.diagnosis.actions import Action
from flaxtransfer.shift.diagnosis.plain import plain
from flaxtransfer.shift.diagnosis.verdicts import Conclusion, Verdict
from flaxtransfer.shift.hypotheses import HypothesisTest
from flaxtransfer.shift.prevalence.prevalence import Prevalence

__all__ = ["ShiftReport"]


@dataclasses.dataclass(frozen=True, eq=False)
class ShiftReport:
    """The result of `diagnose`.

    Args:
        conclusion: the kind of shift that the findings speak for: a hypothesis, not a fact.
        verdicts: on label, covariate and concept shift, with the evidence.
        tests: every test that was made or could not be, p-values adjusted for their number.
        prevalences: of the target by several estimators; intervals at their level. They hold if
            label shift is all there is.
        accuracy: on the target, estimated in several ways; each assumes something else.
        calibration: of the source's probabilities on held-out examples.
        actions: what to do, the first thing first.
        not_identifiable: what nobody can know from these data.
        labels_needed: target labels that would settle the question; None where it is settled, or
            nothing can be said.
        counts: held-out examples of the source, examples of the target, labelled ones among them.
        level: of the tests.
        class_names: of the K classes.
        notes: what a reader has to know: small samples, classes without examples, rows that
            both samples share.
    """

    conclusion: Conclusion
    verdicts: tuple[Verdict, ...]
    tests: tuple[HypothesisTest, ...]
    prevalences: tuple[Prevalence, ...]
    accuracy: AccuracyEstimates
    calibration: CalibrationError
    actions: tuple[Action, ...]
    not_identifiable: tuple[str, ...]
    labels_needed: int | None
    counts: tuple[int, int, int]
    level: float
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def verdict(self, kind: str) -> Verdict:
        """The verdict on "label", "covariate" or "concept"."""
        found = {verdict.kind: verdict for verdict in self.verdicts}
        if kind not in found:
            raise ValueError(f"no verdict on {kind!r}; there are {', '.join(found)}")
        return found[kind]

    def to_json(self) -> dict[str, Any]:
        """Plain objects, lists and numbers; `report.schema.json` beside this file says which."""
        return {"version": 1, **plain(self)}

    def __str__(self) -> str:
        held_out, count, labels = self.counts
        lines = [
            f"shift: {self.conclusion} ({held_out} held-out examples of the source, {count} of the "
            f"target, {labels} of them with labels; level {self.level:g})"
        ]
        lines += [f"{each.kind} shift: {each.status}, {each.evidence}" for each in self.verdicts]
        lines += map(str, (*self.tests, *self.prevalences[:1], self.accuracy, self.calibration))
        for number, action in enumerate(self.actions, 1):
            text = " ".join(filter(None, (action.what, action.expected)))
            lines.append(f"{number}. {text} Guard: {action.guard}")
        lines += [f"not knowable: {text}" for text in self.not_identifiable]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
