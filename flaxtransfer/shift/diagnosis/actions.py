"""What to do about a shift, on what condition, and what nobody can know without target labels."""

import dataclasses

from flaxtransfer.shift.diagnosis.verdicts import Conclusion

__all__ = ["NOT_IDENTIFIABLE", "Action", "actions"]

NOT_IDENTIFIABLE = (
    "Whether the same image means another class now (concept shift): any p(y | x) of the target "
    "goes with the same unlabelled images.",
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
        "With target labels: fine-tune the first stage for input-level changes (surgical).", "",
        "Hold out labels, and compare with the model as it is.",
    )  # fmt: skip
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
