"""From what tests found to which kind of shift they speak for, as a table a person can check."""

import dataclasses
from typing import Literal

__all__ = ["Conclusion", "Findings", "Status", "Verdict", "conclude"]

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
    def labelled(self) -> bool:
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
    if found.labelled and found.as_it_was and found.adjusted:
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
    if not found.labelled or (found.as_it_was and found.adjusted):
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
    if not found.labelled:
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
