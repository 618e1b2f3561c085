"""The shift report: findings, actions, and what cannot be known.

Values of this room as what JSON knows.

Features of two samples in few dimensions, chosen from both alike.

From what tests found to which kind of shift they speak for, as a table a person can check.

What to do about a shift, on what condition, and what nobody can know without target labels.

What is known of a shift, as one value: to print, to write, to act on.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from flaxtransfer.shift.accuracy import AccuracyEstimates
from flaxtransfer.shift.calibration_metrics import CalibrationError
from flaxtransfer.shift.prevalence import Prevalence
from flaxtransfer.shift.statistics import HypothesisTest

__all__ = [
    "NOT_IDENTIFIABLE",
    "Action",
    "Conclusion",
    "Findings",
    "ShiftReport",
    "Status",
    "Verdict",
    "actions",
    "conclude",
    "joint_projection",
    "to_json",
]


def to_json(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists, and numbers that are none as null.

    >>> from flaxtransfer.shift.report import Verdict
    >>> plain([Verdict("label", "supported", "because"), np.array([1.0, np.nan])])
    [{'kind': 'label', 'status': 'supported', 'evidence': 'because'}, [1.0, None]]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def joint_projection(
    source: np.ndarray, target: np.ndarray, *, dimensions: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the pooled features, in units of their overall spread.

    Tests on a thousand features see noise and little else. The axes come from source and target
    together: axes from the source alone would fit its examples better than the target's, and every
    test would find that.

    Args:
        source: `[n, D]`.
        target: `[m, D]`.
        dimensions: at most so many.

    Returns:
        `[n, d]` and `[m, d]`, float64; the mean square of all components together is d.

    >>> source, target = joint_projection(np.eye(3), np.zeros((2, 3)), dimensions=2)
    >>> source.shape, target.shape
    ((3, 2), (2, 2))
    """
    pooled = np.concatenate([source, target]).astype(np.float64)
    pooled = pooled - pooled.mean(0)
    if pooled.shape[1] > dimensions or pooled.shape[1] > len(pooled):
        left, values, _ = np.linalg.svd(pooled, full_matrices=False)
        pooled = left[:, :dimensions] * values[:dimensions]
    spread = np.sqrt(np.square(pooled).mean())
    pooled = pooled / spread if spread > 0 else pooled
    return pooled[: len(source)], pooled[len(source) :]


Status = Literal["supported", "rejected", "not testable"]
Conclusion = Literal[
    "none detected", "label", "covariate", "label and covariate", "concept", "undetermined"
]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Which null hypotheses fell; None where the question could not be asked.

    Args:
        moved: source and target features, or outputs, have one distribution.
        prior: the classes are as common as at the source.
        residual: reweighted classes of the source explain the target's features: label shift is
            all there is.
        as_it_was: labels of the target follow the source's probabilities as they are, which is
            what a covariate shift leaves true.
        adjusted: they follow the probabilities adjusted to the target's prevalence, which is what
            a label shift makes true.
        prefer: which of the two the labels' likelihood prefers beyond doubt; None for neither.
        detectable: the total variation of prevalence that the test of `prior` would have found with
            80 % power, whichever classes changed; None where not every change can be found.
    """

    moved: bool | None
    prior: bool | None
    residual: bool | None
    as_it_was: bool | None = None
    adjusted: bool | None = None
    prefer: Literal["label", "covariate"] | None = None
    detectable: float | None = None

    @property
    def labeled(self) -> bool:
        """Whether target labels were there to ask."""
        return self.as_it_was is not None and self.adjusted is not None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the data say of one kind of shift.

    Args:
        kind: "label", "covariate" or "concept".
        status: "supported", "rejected" (at the size of these samples) or "not testable".
        evidence: why, in a sentence.
    """

    kind: str
    status: Status
    evidence: str


def conclude(findings: Findings) -> tuple[Conclusion, tuple[Verdict, ...]]:
    """The kind of shift that the findings speak for, and a verdict on each kind.

    Without target labels a change of the classes' own distributions can look exactly like a change
    of prevalence, and a change of p(y | x) like nothing at all; verdicts say "not testable" there.

    >>> conclude(Findings(moved=True, prior=True, residual=False))[0]
    'label'
    >>> conclude(Findings(moved=False, prior=False, residual=False))[0]
    'none detected'
    """
    verdicts = (_label(findings), _covariate(findings), _concept(findings))
    return _conclusion(findings), verdicts


def _conclusion(found: Findings) -> Conclusion:
    if found.labeled and found.as_it_was and found.adjusted:
        return "concept"
    asked = [found.moved, found.prior, found.residual]
    if not any(asked):
        # With labels, a fallen "as it was" alone is a change that the features did not show.
        changed = found.as_it_was or found.moved is None or found.prior is None
        return "undetermined" if changed else "none detected"
    if found.residual is None:
        return "undetermined"
    if found.prior and found.residual and _labels_say(found) != "covariate":
        return "label and covariate"
    if found.residual:
        return "covariate"
    if found.prior:
        return "covariate" if _labels_say(found) == "covariate" else "label"
    preferred = _labels_say(found)
    return preferred or "undetermined"


def _labels_say(found: Findings) -> Literal["label", "covariate"] | None:
    """Which of label and covariate shift the target's labels leave standing."""
    if not found.labeled or (found.as_it_was and found.adjusted):
        return None
    if found.as_it_was:
        return "label"
    if found.adjusted:
        return "covariate"
    return found.prefer


def _label(found: Findings) -> Verdict:
    def verdict(status: Status, evidence: str) -> Verdict:
        return Verdict("label", status, evidence)

    if found.prior is None:
        return verdict(
            "not testable", "the shares of the classes cannot be told from these outputs"
        )
    if not found.prior:
        if _labels_say(found) == "label":
            return verdict("supported", "target labels follow the adjusted probabilities only")
        seen = "as far as can be seen"
        if found.detectable is not None and found.detectable < 1:
            seen = f"a change of {found.detectable:.2f} in total variation would have been seen"
        return verdict("rejected", f"the classes are as common as before: {seen}")
    if _labels_say(found) == "covariate":
        return verdict("rejected", "target labels contradict the adjusted probabilities")
    if found.residual is None:
        return verdict(
            "not testable",
            "prevalence has changed if the classes look as before, and that could not be tested",
        )
    if found.residual:
        return verdict(
            "not testable",
            "outputs have moved, but no prevalence explains the features: what was estimated under "
            "label shift alone is biased",
        )
    return verdict(
        "supported", "prevalence has changed, and with it alone the features are explained"
    )


def _covariate(found: Findings) -> Verdict:
    def verdict(status: Status, evidence: str) -> Verdict:
        return Verdict("covariate", status, evidence)

    if found.residual:
        return verdict("supported", "no prevalence of the source's classes explains the features")
    said = _labels_say(found)
    if (found.prior or found.moved) and said == "covariate":
        return verdict("supported", "something moved, and target labels follow p(y | x) as it was")
    if found.residual is None:
        return verdict("not testable", "the residual of a label shift could not be tested")
    if found.prior and said != "label":
        return verdict(
            "not testable",
            "classes that changed towards one another look like a changed prevalence; target "
            "labels would tell",
        )
    if found.moved and not found.prior:
        return verdict("not testable", "something moved, too little to say what")
    return verdict("rejected", "no change of the classes' own distributions can be seen")


def _concept(found: Findings) -> Verdict:
    if not found.labeled:
        return Verdict(
            "concept", "not testable", "p(y | x) of the target takes target labels to be seen"
        )
    if found.as_it_was and found.adjusted:
        return Verdict(
            "concept",
            "supported",
            "target labels contradict the probabilities both as they were and adjusted (or the "
            "model is badly calibrated there)",
        )
    return Verdict(
        "concept", "rejected", "target labels agree with the probabilities, as many as there are"
    )


NOT_IDENTIFIABLE = (
    "Whether the same image means another class now (concept shift): any p(y | x) of the target "
    "goes with the same unlabeled images.",
    "Label shift from covariate shift, where the classes' images moved towards one another: a "
    "mixture of the source's classes then explains them too.",
    "The accuracy on the target in general: every estimate assumes which kind of shift it is.",
    "Classes that the source did not have: their images are given to the classes it had.",
    "How the images of one class of the target are distributed.",
)
"""True of every report without target labels, whatever its tests found."""


@dataclasses.dataclass(frozen=True)
class Action:
    """Something to do.

    Args:
        what: to do.
        expected: what it should bring, as far as the data say; "" where they say nothing.
        guard: when not to do it, or how to see that it went wrong.
    """

    what: str
    expected: str
    guard: str


def actions(
    conclusion: Conclusion, *, gain: float | None = None, labels_needed: int | None = None
) -> tuple[Action, ...]:
    """What the conclusion asks for, the first thing first.

    Args:
        conclusion: of the report.
        gain: accuracy that a correction of the prior should bring if only the prior changed,
            between 0 and 1; None where it is not known.
        labels_needed: how many target labels would settle the question.

    >>> [action.what for action in actions("none detected")]
    ['Nothing: keep predicting as before.']
    """
    label_some = Action(
        "Label some target images, drawn at random"
        + (f": about {labels_needed}." if labels_needed else "."),
        "They tell label, covariate and concept shift apart, and measure the accuracy.",
        "Images picked by the model's confidence, or by how odd they look, answer other questions.",
    )
    correct = Action(
        "Correct the predictions for the target's prevalence (adjust_prior, predict "
        "--adjust-prior).",
        "" if gain is None else f"{100 * gain:+.1f} points of accuracy, if only the prior changed.",
        "Not under a covariate shift: it costs accuracy there. Re-estimate with every new batch.",
    )
    restate = Action(
        "Re-estimate the BatchNorm statistics on target images (adapt_batch_norm).",
        "",
        "Not where the prevalence changed too: statistics then follow the classes. Confidence and "
        "estimated accuracy have to rise; a network without BatchNorm has nothing to adapt.",
    )
    balanced = Action(
        "Re-estimate the BatchNorm statistics balanced over the classes, then diagnose again.",
        "",
        "Falls back to the source's statistics where one class is all there is. Correct the prior "
        "only if the residual test no longer rejects.",
    )
    early = Action(
        "With target labels: fine-tune the first stage for input-level changes (surgical).",
        "",
        "Hold out labels, and compare with the model as it is.",
    )
    relabel = Action(
        "Train the head again on target labels (feature_extraction, then more).",
        "",
        "Check first that both places mean the same by the classes' names.",
    )
    wait = Action(
        "Nothing: keep predicting as before.",
        "",
        "Nothing found is not nothing there: see the smallest effects that would have been found.",
    )
    return {
        "none detected": (wait,),
        "label": (correct, label_some),
        "covariate": (restate, early, label_some),
        "label and covariate": (balanced, label_some),
        "concept": (relabel,),
        "undetermined": (label_some,),
    }[conclusion]


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
        counts: held-out examples of the source, examples of the target, labeled ones among them.
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
        return {"version": 1, **to_json(self)}

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
