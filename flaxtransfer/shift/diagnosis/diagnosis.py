"""Which kind of shift a target has, as far as the data tell: the decision procedure."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.special import softmax

from flaxtransfer.shift.accuracy.accuracy import accuracy_without_labels
from flaxtransfer.shift.calibration.calibrating import CalibrationMethod, calibrate
from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.calibration.calibration_error import calibration_error
from flaxtransfer.shift.checks import as_features, as_labels, as_logits, same_width
from flaxtransfer.shift.diagnosis.actions import NOT_IDENTIFIABLE, actions
from flaxtransfer.shift.diagnosis.questions import fell, labelled_tests, unlabelled_tests
from flaxtransfer.shift.diagnosis.shift_report import ShiftReport
from flaxtransfer.shift.diagnosis.verdicts import Findings, conclude
from flaxtransfer.shift.hypotheses import HypothesisTest
from flaxtransfer.shift.prevalence.correction import adjust_prior
from flaxtransfer.shift.prevalence.estimation import estimate_prevalence
from flaxtransfer.shift.testing.labels_needed import labels_needed

__all__ = ["diagnose"]

_FEW = 5
_SMALL = 50
_METHODS: tuple[Literal["maximum_likelihood", "bbse_soft", "rlls"], ...] = (
    "maximum_likelihood",
    "bbse_soft",
    "rlls",
)


def diagnose(
    source_logits: Any,
    source_labels: Any,
    source_features: Any,
    target_logits: Any,
    target_features: Any,
    *,
    labelled: tuple[Any, Any] | None = None,
    calibration: CalibrationMethod = "bias_corrected",
    class_names: Sequence[str] = (),
    level: float = 0.05,
    permutations: int = 499,
    seed: int = 0,
) -> ShiftReport:
    """Tests, estimates, weighs up, and says what speaks for which kind of shift.

    You want it when a model that was validated in one place is used in another. The order is that
    of questions: has anything moved; are the classes as common; does prevalence alone explain the
    features; and, with some target labels, does p(y | x) hold as it was or adjusted. The three
    kinds are defined by what stays the same (p(x | y), p(y | x), neither), and data of one kind can
    look like another: conclusions are hypotheses, and say how they could be wrong.

    Args:
        source_logits: `[n, K]` logits or log-probabilities of held-out examples of the source.
        source_labels: `[n]`, from 0 to K - 1.
        source_features: `[n, D]` of the same examples, what the head sees.
        target_logits: `[m, K]` of target examples.
        target_features: `[m, D]`.
        labelled: positions among the target examples, and their labels; drawn at random, or the
            answers are those of another population.
        calibration: see `calibrate`.
        class_names: K names; numbers by default.
        level: at which hypotheses fall, after correction for the number of tests.
        permutations: or simulations, of each test.
        seed: of all that is drawn.

    Returns:
        A report. Tests that these data do not allow are in it, with the reason.

    Raises:
        ValueError: arrays that are broken or do not belong together, a level outside of 0 and 1.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(300) % 2
    >>> features = rng.normal(size=(300, 2)) + np.stack([2 * labels, 0 * labels], 1)
    >>> logits = np.stack([1 - 2 * features[:, 0], 2 * features[:, 0] - 1], 1) / 2
    >>> held_out = (logits[:200], labels[:200], features[:200])
    >>> diagnose(*held_out, logits[200:], features[200:], permutations=99).conclusion
    'none detected'

    References:
        S. Rabanser, S. Guennemann, Z. Lipton, "Failing loudly: an empirical study of methods for
        detecting dataset shift", 2019. Z. Lipton, Y.-X. Wang, A. Smola, "Detecting and correcting
        for label shift with black box predictors", 2018.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level!r}; it lies between 0 and 1")
    logits = as_logits(target_logits, "target logits")
    features = as_features(target_features, "target features")
    own_features = as_features(source_features, "source features")
    source = calibrate(source_logits, source_labels, method=calibration)
    same_width(own_features, "source features", features, "target features")
    names = _names(class_names, source.classes)
    probabilities = source.apply(logits)
    known = _labelled(labelled, len(logits), source.classes)
    settings = {"permutations": permutations, "seed": seed}

    unlabelled = unlabelled_tests(source, own_features, probabilities, features, settings)
    prevalences = tuple(
        estimate_prevalence(probabilities, source, method=method, seed=seed) for method in _METHODS
    )
    likeliest = prevalences[0]
    adjusted = adjust_prior(probabilities, likeliest) if likeliest.identifiable else probabilities
    with_labels = labelled_tests(source, probabilities, known, seed)
    prior, likelihood_ratio = fell(unlabelled.prior, level), unlabelled.prior[-1]
    if not prior and (likelihood_ratio.p is None or not likeliest.identifiable):
        # Outputs of few examples, or of a model that knows nothing, stay as they are whatever the
        # shares are.
        prior = None
    findings = Findings(
        moved=fell(unlabelled.moved, level),
        prior=prior,
        residual=fell([unlabelled.residual], level),
        as_it_was=fell(with_labels.as_it_was, level),
        adjusted=fell(with_labels.adjusted, level),
        prefer=_preferred(with_labels.ratios, level),
        detectable=likelihood_ratio.minimum_detectable,
    )
    conclusion, verdicts = conclude(findings)
    needed = labels_needed(probabilities, adjusted, seed=seed)
    gain = None
    if likeliest.identifiable:
        before = adjusted[np.arange(len(adjusted)), probabilities.argmax(1)]
        gain = float((adjusted.max(1) - before).mean())
    return ShiftReport(
        conclusion=conclusion,
        verdicts=verdicts,
        tests=(*unlabelled.all, *with_labels.all),
        prevalences=prevalences,
        accuracy=accuracy_without_labels(
            source, probabilities, likeliest if likeliest.identifiable else None, seed=seed
        ),
        calibration=calibration_error(
            softmax(as_logits(source_logits, "source logits"), axis=1), source.labels, seed=seed
        ),
        actions=actions(conclusion, gain=gain, labels_needed=needed.count),
        not_identifiable=NOT_IDENTIFIABLE[1:] if len(known[0]) else NOT_IDENTIFIABLE,
        labels_needed=needed.count,
        counts=(len(own_features), len(features), len(known[0])),
        level=level,
        class_names=names,
        notes=(*source.notes, *_small(source, len(features), names)),
    )


def _preferred(
    ratios: Sequence[HypothesisTest], level: float
) -> Literal["label", "covariate"] | None:
    covariate, label = (test.rejected(level) for test in ratios) if ratios else (False, False)
    if covariate == label:
        return None
    return "label" if covariate else "covariate"


def _labelled(
    given: tuple[Any, Any] | None, count: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and labels, both empty where there are none."""
    if given is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    where = as_labels(given[0], "positions of labels", count=len(given[0]), classes=count)
    if len(np.unique(where)) < len(where):
        raise ValueError("positions of labels name an example twice; one label for each")
    labels = as_labels(given[1], "target labels", count=len(where), classes=classes)
    return where, labels


def _small(source: Calibration, count: int, names: Sequence[str]) -> tuple[str, ...]:
    """What is too little to be sure of anything."""
    notes = []
    examples = np.bincount(source.labels, minlength=source.classes)
    if rare := [name for name, number in zip(names, examples, strict=True) if number < _FEW]:
        notes.append(f"fewer than {_FEW} held-out examples at the source: {', '.join(rare)}")
    if count < _SMALL:
        notes.append(f"{count} target examples show large shifts only; {_SMALL} or more are better")
    return tuple(notes)


def _names(given: Sequence[str], classes: int) -> tuple[str, ...]:
    if given and len(given) != classes:
        raise ValueError(f"{len(given)} class names, and the logits are of {classes} classes")
    return tuple(given) or tuple(map(str, range(classes)))
