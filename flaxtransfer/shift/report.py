"""Shift report: verdicts, recommended actions, and what cannot be known.

``conclude`` maps the findings of the tests to a kind of shift by a decision table; ``actions`` are
what each conclusion recommends. A ``ShiftReport`` holds all results of a diagnosis, to print or to
write as JSON.
"""

from __future__ import annotations

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

Status = Literal["supported", "rejected", "not testable"]

Conclusion = Literal[
    "none detected", "label", "covariate", "label and covariate", "concept", "undetermined"
]

NOT_IDENTIFIABLE = (
    "Whether the same image now has another label (concept shift): every p(y | x) of the target is "
    "consistent with the same unlabeled images.",
    "Label shift from covariate shift where the images of the classes became similar to each "
    "other: a mixture of the source's classes explains them too.",
    "The accuracy on the target in general: every estimate assumes one kind of shift.",
    "Classes that the source did not have: their images are assigned to the source's classes.",
    "How the images of one class of the target are distributed.",
)
"""True of every report without target labels, whatever the tests found."""


@dataclasses.dataclass(frozen=True, eq=False)
class ShiftReport:
    """Result of ``diagnose``.

    Args:
        conclusion: The kind of shift that the findings favor: a hypothesis, not a fact.
        verdicts: On label, covariate and concept shift, with the evidence.
        tests: Every test, those that could not be made included; p-values adjusted for their
            number.
        prevalences: Of the target by several estimators, valid under pure label shift.
        accuracy: On the target, by several estimators with different assumptions.
        calibration: Of the source's uncalibrated probabilities on held-out examples.
        actions: Recommended actions, most important first.
        not_identifiable: What cannot be known from these data.
        labels_needed: Target labels that would decide; None where nothing is to decide or the
            number is not known.
        counts: Held-out examples of the source, target examples, labeled target examples.
        level: Significance level of the tests.
        class_names: Of the K classes.
        notes: What the reader must know: small samples, classes without examples, rows that both
            samples have.
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
        """The verdict on one kind of shift: "label", "covariate" or "concept".

        Raises:
            ValueError: Another kind.
        """
        verdicts = {verdict.kind: verdict for verdict in self.verdicts}
        if kind not in verdicts:
            raise ValueError(f"kind must be one of {', '.join(verdicts)}, got {kind!r}")
        return verdicts[kind]

    def to_json(self) -> dict[str, Any]:
        """The report as plain objects, lists and numbers that follow ``report.schema.json``."""
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
        lines += [f"cannot be known: {text}" for text in self.not_identifiable]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Verdict on one kind of shift.

    Args:
        kind: "label", "covariate" or "concept".
        status: "supported", "rejected" (at these sample sizes) or "not testable".
        evidence: The reason, in one sentence.
    """

    kind: str
    status: Status
    evidence: str


@dataclasses.dataclass(frozen=True)
class Action:
    """Recommended action.

    Args:
        what: What to do.
        expected: The expected benefit, as far as the data determine it; "" where they do not.
        guard: When not to do it, or how to notice that it failed.
    """

    what: str
    expected: str
    guard: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """Which null hypotheses were rejected; None where a test could not be made.

    Args:
        any_shift: Source and target features, or outputs, have one distribution.
        prior: The classes are as common as at the source.
        residual: A mixture of the source's classes explains the target's features (label shift
            only).
        source_posteriors: The target's labels follow the source's posteriors unchanged, which holds
            under covariate shift.
        adjusted_posteriors: They follow the posteriors adjusted to the target's prevalence, which
            holds under label shift.
        preferred: The hypothesis that the likelihood ratio of the labels favors; None for neither.
        minimum_detectable: The total variation of prevalence that the test of ``prior`` finds with
            80 % power, whichever classes change; None where not every change can be found.
    """

    any_shift: bool | None
    prior: bool | None
    residual: bool | None
    source_posteriors: bool | None = None
    adjusted_posteriors: bool | None = None
    preferred: Literal["label", "covariate"] | None = None
    minimum_detectable: float | None = None

    @property
    def labeled(self) -> bool:
        """Whether there were target labels to test."""
        return self.source_posteriors is not None and self.adjusted_posteriors is not None


def conclude(findings: Findings) -> tuple[Conclusion, tuple[Verdict, ...]]:
    """Conclusion on the kind of shift from the findings, and a verdict on each kind.

    Without target labels a change of the classes' own distributions can look exactly like a change
    of prevalence, and a change of p(y | x) like no change; the verdicts are "not testable" there.

    >>> conclude(Findings(any_shift=True, prior=True, residual=False))[0]
    'label'
    >>> conclude(Findings(any_shift=False, prior=False, residual=False))[0]
    'none detected'
    """
    verdicts = (_label(findings), _covariate(findings), _concept(findings))
    return _conclusion(findings), verdicts


def actions(
    conclusion: Conclusion, *, gain: float | None = None, labels_needed: int | None = None
) -> tuple[Action, ...]:
    """Recommended actions for a conclusion, most important first.

    Args:
        conclusion: Of the report.
        gain: Accuracy that prior correction should gain if only the prior changed, between 0 and 1;
            None where it is not known.
        labels_needed: How many target labels would decide; None where it is not known.

    >>> [action.what for action in actions("none detected")]
    ['Nothing: keep predicting as before.']
    """
    label_targets = Action(
        "Label some target images, drawn at random"
        + (f": about {labels_needed}." if labels_needed else "."),
        "They distinguish label, covariate and concept shift, and measure the accuracy.",
        "Not images chosen by the model's confidence or by how unusual they look: they answer "
        "other questions.",
    )
    correct = Action(
        "Correct the predictions for the target's prevalence (adjust_prior, predict "
        "--adjust-prior).",
        "" if gain is None else f"{100 * gain:+.1f} points of accuracy, if only the prior changed.",
        "Not under covariate shift, where it costs accuracy. Estimate again for every new batch.",
    )
    recalibrate_norm = Action(
        "Recompute the BatchNorm statistics on target images (adapt_batch_norm).",
        "",
        "Not where the prevalence changed too: the statistics then follow the classes. Confidence "
        "and estimated accuracy must increase; a network without BatchNorm has nothing to adapt.",
    )
    balanced = Action(
        "Recompute the BatchNorm statistics balanced over the classes, then diagnose again.",
        "",
        "It falls back to the source's statistics where the target has one class only. Correct "
        "the prior only if the residual test no longer rejects.",
    )
    fine_tune_stem = Action(
        "With target labels: fine-tune the first stage for input-level changes (surgical "
        "fine-tuning).",
        "",
        "Hold out labels, and compare with the unchanged model.",
    )
    relabel = Action(
        "Train the head again on target labels (feature_extraction, then more).",
        "",
        "First check that the class names mean the same at both sites.",
    )
    keep = Action(
        "Nothing: keep predicting as before.",
        "",
        "A shift that was not detected may still exist: see the smallest detectable effects.",
    )
    return {
        "none detected": (keep,),
        "label": (correct, label_targets),
        "covariate": (recalibrate_norm, fine_tune_stem, label_targets),
        "label and covariate": (balanced, label_targets),
        "concept": (relabel,),
        "undetermined": (label_targets,),
    }[conclusion]


def joint_projection(
    source: np.ndarray, target: np.ndarray, *, dimensions: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the pooled features, scaled to unit mean square.

    Tests on a thousand features see mostly noise. The axes come from source and target together:
    axes from the source alone would fit its examples better than the target's, and every test would
    detect that.

    Args:
        source: ``[n, D]``.
        target: ``[m, D]``.
        dimensions: Most components.

    Returns:
        ``[n, d]`` and ``[m, d]``, float64; the mean squared norm of a row is d.

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


def to_json(value: Any) -> Any:
    """Dataclasses as objects, arrays as lists, and numbers that are not finite as null.

    >>> from flaxtransfer.shift.report import Verdict
    >>> to_json([Verdict("label", "supported", "because"), np.array([1.0, np.nan])])
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


def _conclusion(findings: Findings) -> Conclusion:
    if findings.labeled and findings.source_posteriors and findings.adjusted_posteriors:
        return "concept"
    detected = [findings.any_shift, findings.prior, findings.residual]
    if not any(detected):
        # Rejected source posteriors alone are a change that the features do not show.
        changed = findings.source_posteriors or findings.any_shift is None or findings.prior is None
        return "undetermined" if changed else "none detected"
    if findings.residual is None:
        return "undetermined"
    if findings.prior and findings.residual and _favored_by_labels(findings) != "covariate":
        return "label and covariate"
    if findings.residual:
        return "covariate"
    if findings.prior:
        return "covariate" if _favored_by_labels(findings) == "covariate" else "label"
    preferred = _favored_by_labels(findings)
    return preferred or "undetermined"


def _favored_by_labels(findings: Findings) -> Literal["label", "covariate"] | None:
    """Which of label and covariate shift the target's labels do not reject."""
    if not findings.labeled or (findings.source_posteriors and findings.adjusted_posteriors):
        return None
    if findings.source_posteriors:
        return "label"
    if findings.adjusted_posteriors:
        return "covariate"
    return findings.preferred


def _label(findings: Findings) -> Verdict:
    def verdict(status: Status, evidence: str) -> Verdict:
        return Verdict("label", status, evidence)

    if findings.prior is None:
        return verdict("not testable", "these outputs do not determine the prevalence")
    if not findings.prior:
        if _favored_by_labels(findings) == "label":
            return verdict("supported", "target labels agree with the adjusted probabilities only")
        power = "at these sample sizes"
        if findings.minimum_detectable is not None and findings.minimum_detectable < 1:
            power = (
                f"a change of {findings.minimum_detectable:.2f} in total variation is detectable"
            )
        return verdict("rejected", f"no change of prevalence was detected: {power}")
    if _favored_by_labels(findings) == "covariate":
        return verdict("rejected", "target labels contradict the adjusted probabilities")
    if findings.residual is None:
        return verdict(
            "not testable",
            "prevalence has changed if the classes look as before, which could not be tested",
        )
    if findings.residual:
        return verdict(
            "not testable",
            "outputs have changed, but no prevalence explains the features: estimates that assume "
            "label shift are biased",
        )
    return verdict("supported", "prevalence has changed, and this alone explains the features")


def _covariate(findings: Findings) -> Verdict:
    def verdict(status: Status, evidence: str) -> Verdict:
        return Verdict("covariate", status, evidence)

    if findings.residual:
        return verdict("supported", "no mixture of the source's classes explains the features")
    favored = _favored_by_labels(findings)
    if (findings.prior or findings.any_shift) and favored == "covariate":
        return verdict(
            "supported", "a shift was detected, and target labels agree with p(y | x) of the source"
        )
    if findings.residual is None:
        return verdict("not testable", "the residual test of label shift could not be made")
    if findings.prior and favored != "label":
        return verdict(
            "not testable",
            "classes that became similar to each other look like a changed prevalence; target "
            "labels can decide",
        )
    if findings.any_shift and not findings.prior:
        return verdict("not testable", "a shift was detected, too small to determine its kind")
    return verdict("rejected", "no change within the classes was detected")


def _concept(findings: Findings) -> Verdict:
    if not findings.labeled:
        return Verdict(
            "concept", "not testable", "testing p(y | x) of the target needs target labels"
        )
    if findings.source_posteriors and findings.adjusted_posteriors:
        return Verdict(
            "concept",
            "supported",
            "target labels contradict both the unchanged and the adjusted probabilities (or the "
            "model is badly calibrated there)",
        )
    return Verdict("concept", "rejected", "the target labels agree with the probabilities")
