"""The diagnosis: which kind of shift a target has, as far as the data tell.

The questions of a diagnosis: which tests ask them, and of which family each is.

Which kind of shift a target has, as far as the data tell: the decision procedure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.special import softmax

from flaxtransfer.shift.accuracy import accuracy_without_labels
from flaxtransfer.shift.calibration import Calibration, CalibrationMethod, calibrate
from flaxtransfer.shift.calibration_metrics import calibration_error
from flaxtransfer.shift.checks import as_features, as_labels, as_logits, same_width
from flaxtransfer.shift.concept_shift import (
    label_residual_test,
    log_loss_test,
    posterior_ratio_tests,
)
from flaxtransfer.shift.label_shift import prior_test, residual_test
from flaxtransfer.shift.marginals import kolmogorov_smirnov_test, predicted_label_test
from flaxtransfer.shift.prevalence import estimate_prevalence
from flaxtransfer.shift.prior_correction import adjust_prior
from flaxtransfer.shift.report import (
    NOT_IDENTIFIABLE,
    Findings,
    ShiftReport,
    actions,
    conclude,
    joint_projection,
)
from flaxtransfer.shift.sample_size import corrected_posteriors, labels_needed
from flaxtransfer.shift.statistics import HypothesisTest, holm
from flaxtransfer.shift.two_sample import classifier_test, mmd_test

__all__ = [
    "Unlabeled",
    "WithLabels",
    "any_rejected",
    "diagnose",
    "labeled_tests",
    "unlabeled_tests",
]


@dataclasses.dataclass(frozen=True)
class Unlabeled:
    """What features and outputs alone can answer."""

    moved: tuple[HypothesisTest, ...]
    prior: tuple[HypothesisTest, ...]
    residual: HypothesisTest

    @property
    def all(self) -> tuple[HypothesisTest, ...]:
        """In the order of the questions."""
        return (*self.moved, *self.prior, self.residual)


@dataclasses.dataclass(frozen=True)
class WithLabels:
    """What a few target labels can answer; all empty where there are none."""

    as_it_was: tuple[HypothesisTest, ...] = ()
    adjusted: tuple[HypothesisTest, ...] = ()
    ratios: tuple[HypothesisTest, ...] = ()

    @property
    def all(self) -> tuple[HypothesisTest, ...]:
        """In the order of the questions."""
        return (*self.as_it_was, *self.adjusted, *self.ratios)


def unlabeled_tests(
    source: Calibration,
    source_features: np.ndarray,
    probabilities: np.ndarray,
    features: np.ndarray,
    settings: dict[str, int],
) -> Unlabeled:
    """One family asks whether anything moved; the residual answers another question, alone."""
    near, far = joint_projection(source_features, features)
    first = holm(
        [
            mmd_test(near, far, **settings),
            classifier_test(near, far, **settings),
            kolmogorov_smirnov_test(
                source.probabilities, probabilities, column_name="probability of class"
            ),
            predicted_label_test(source.probabilities, probabilities, seed=settings["seed"]),
            prior_test(probabilities, source, **settings),
        ]
    )
    residual = residual_test(
        near,
        far,
        probabilities,
        source,
        simulations=settings["permutations"],
        seed=settings["seed"],
    )
    return Unlabeled(first[:3], first[3:], residual)


def labeled_tests(
    source: Calibration,
    probabilities: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> WithLabels:
    """Whether the labels follow the probabilities, as they are and corrected for prevalence."""
    where, labels = known
    if not len(where):
        return WithLabels()
    raw = probabilities[where]
    corrected = corrected_posteriors(where, probabilities, source, seed=seed)

    def under(name: str, posteriors: Any) -> tuple[HypothesisTest, ...]:
        tests = (log_loss_test, label_residual_test)
        return tuple(
            dataclasses.replace(test, name=f"{test.name}, {name}")
            for test in holm([ask(posteriors, labels, seed=seed) for ask in tests])
        )

    return WithLabels(
        as_it_was=under("p(y | x) as it was", raw),
        adjusted=under("p(y | x) adjusted", corrected),
        ratios=posterior_ratio_tests(raw, corrected, labels, seed=seed),
    )


def any_rejected(tests: Sequence[HypothesisTest], level: float) -> bool | None:
    """Whether one of them was rejected; None where none could be made."""
    if all(test.p is None for test in tests):
        return None
    return any(test.rejected(level) for test in tests)


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
    labeled: tuple[Any, Any] | None = None,
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
        labeled: positions among the target examples, and their labels; drawn at random, or the
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
    known = _labeled(labeled, len(logits), source.classes)
    settings = {"permutations": permutations, "seed": seed}

    unlabeled = unlabeled_tests(source, own_features, probabilities, features, settings)
    prevalences = tuple(
        estimate_prevalence(probabilities, source, method=method, seed=seed) for method in _METHODS
    )
    likeliest = prevalences[0]
    adjusted = adjust_prior(probabilities, likeliest) if likeliest.identifiable else probabilities
    with_labels = labeled_tests(source, probabilities, known, seed)
    prior, likelihood_ratio = any_rejected(unlabeled.prior, level), unlabeled.prior[-1]
    if not prior and (likelihood_ratio.p is None or not likeliest.identifiable):
        # Outputs of few examples, or of a model that knows nothing, stay as they are whatever the
        # shares are.
        prior = None
    findings = Findings(
        moved=any_rejected(unlabeled.moved, level),
        prior=prior,
        residual=any_rejected([unlabeled.residual], level),
        as_it_was=any_rejected(with_labels.as_it_was, level),
        adjusted=any_rejected(with_labels.adjusted, level),
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
        tests=(*unlabeled.all, *with_labels.all),
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


def _labeled(
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
