"""Diagnosis: which kind of shift a target has, as far as the data determine it.

``diagnose`` runs all tests and estimates in the order of a decision procedure and returns a
``ShiftReport``: has anything shifted; has the prevalence changed; does prevalence alone explain the
features; and, with target labels, does p(y | x) hold unchanged or adjusted.
"""

from __future__ import annotations

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
    labels_needed,
    log_loss_test,
    posterior_ratio_tests,
)
from flaxtransfer.shift.label_shift import prior_test, residual_test
from flaxtransfer.shift.marginals import kolmogorov_smirnov_test, predicted_label_test
from flaxtransfer.shift.prevalence import estimate_prevalence
from flaxtransfer.shift.prior_correction import adjust_prior, corrected_posteriors
from flaxtransfer.shift.report import (
    NOT_IDENTIFIABLE,
    Findings,
    ShiftReport,
    actions,
    conclude,
    joint_projection,
)
from flaxtransfer.shift.statistics import HypothesisTest, holm
from flaxtransfer.shift.two_sample import classifier_test, mmd_test

__all__ = [
    "LabeledTests",
    "UnlabeledTests",
    "any_rejected",
    "diagnose",
    "labeled_tests",
    "unlabeled_tests",
]

_MIN_PER_CLASS = 5

_MIN_TARGETS = 50

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
    """Diagnosis of domain shift: which kind of shift does a target have?

    Use it when a model that was validated in one place is used in another. It tests in order: has
    anything shifted; are the classes as common; does prevalence alone explain the features; and,
    with some target labels, does p(y | x) hold unchanged or adjusted. The three kinds are defined
    by what stays the same (p(x | y), p(y | x), neither), and data of one kind can look like
    another: the conclusion is a hypothesis, and the report lists how it could be wrong.

    Args:
        source_logits: ``[n, K]`` logits or log-probabilities of held-out examples of the source.
        source_labels: ``[n]``, from 0 to K - 1.
        source_features: ``[n, D]`` of the same examples, the input of the head.
        target_logits: ``[m, K]`` of target examples.
        target_features: ``[m, D]``.
        labeled: Positions among the target examples and their labels, drawn at random; otherwise
            the result is about another population.
        calibration: Method of ``calibrate``.
        class_names: K names; numbers by default.
        level: Significance level, after correction for the number of tests.
        permutations: Permutations or simulations per test.
        seed: Of all random draws.

    Returns:
        A report. Tests that these data do not allow are in it, with the reason.

    Raises:
        ValueError: Arrays that are invalid or do not belong together, or a level outside of 0 and
            1.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(300) % 2
    >>> features = rng.normal(size=(300, 2)) + np.stack([2 * labels, 0 * labels], 1)
    >>> logits = np.stack([1 - 2 * features[:, 0], 2 * features[:, 0] - 1], 1) / 2
    >>> held_out = (logits[:200], labels[:200], features[:200])
    >>> diagnose(*held_out, logits[200:], features[200:], permutations=99).conclusion
    'none detected'

    References:
        S. Rabanser, S. Guennemann, Z. Lipton, "Failing loudly: an empirical study of methods for
        detecting dataset shift", 2019.
        Z. Lipton, Y.-X. Wang, A. Smola, "Detecting and correcting for label shift with black box
        predictors", 2018.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    logits = as_logits(target_logits, "target logits")
    features = as_features(target_features, "target features")
    held_out_features = as_features(source_features, "source features")
    source = calibrate(source_logits, source_labels, method=calibration)
    same_width(held_out_features, "source features", features, "target features")
    names = _check_class_names(class_names, source.classes)
    probabilities = source.apply(logits)
    known = _check_labeled(labeled, len(logits), source.classes)
    settings = {"permutations": permutations, "seed": seed}

    unlabeled = unlabeled_tests(source, held_out_features, probabilities, features, settings)
    prevalences = tuple(
        estimate_prevalence(probabilities, source, method=method, seed=seed) for method in _METHODS
    )
    most_likely = prevalences[0]
    adjusted = (
        adjust_prior(probabilities, most_likely) if most_likely.identifiable else probabilities
    )
    with_labels = labeled_tests(source, probabilities, known, seed)
    prior, likelihood_ratio = any_rejected(unlabeled.prior, level), unlabeled.prior[-1]
    if not prior and (likelihood_ratio.p is None or not most_likely.identifiable):
        # The outputs of few examples, or of an uninformative model, do not depend on prevalence.
        prior = None
    findings = Findings(
        any_shift=any_rejected(unlabeled.any_shift, level),
        prior=prior,
        residual=any_rejected([unlabeled.residual], level),
        source_posteriors=any_rejected(with_labels.source_posteriors, level),
        adjusted_posteriors=any_rejected(with_labels.adjusted_posteriors, level),
        preferred=_preferred(with_labels.ratios, level),
        minimum_detectable=likelihood_ratio.minimum_detectable,
    )
    conclusion, verdicts = conclude(findings)
    needed = labels_needed(probabilities, adjusted, seed=seed)
    gain = None
    if most_likely.identifiable:
        before = adjusted[np.arange(len(adjusted)), probabilities.argmax(1)]
        gain = float((adjusted.max(1) - before).mean())
    return ShiftReport(
        conclusion=conclusion,
        verdicts=verdicts,
        tests=(*unlabeled.all, *with_labels.all),
        prevalences=prevalences,
        accuracy=accuracy_without_labels(
            source, probabilities, most_likely if most_likely.identifiable else None, seed=seed
        ),
        calibration=calibration_error(
            softmax(as_logits(source_logits, "source logits"), axis=1), source.labels, seed=seed
        ),
        actions=actions(conclusion, gain=gain, labels_needed=needed.count),
        not_identifiable=NOT_IDENTIFIABLE[1:] if len(known[0]) else NOT_IDENTIFIABLE,
        labels_needed=needed.count,
        counts=(len(held_out_features), len(features), len(known[0])),
        level=level,
        class_names=names,
        notes=(*source.notes, *_small_sample_notes(source, len(features), names)),
    )


@dataclasses.dataclass(frozen=True)
class UnlabeledTests:
    """Tests on features and outputs without labels."""

    any_shift: tuple[HypothesisTest, ...]
    prior: tuple[HypothesisTest, ...]
    residual: HypothesisTest

    @property
    def all(self) -> tuple[HypothesisTest, ...]:
        """All tests, in the order of the decision procedure."""
        return (*self.any_shift, *self.prior, self.residual)


def unlabeled_tests(
    source: Calibration,
    source_features: np.ndarray,
    probabilities: np.ndarray,
    features: np.ndarray,
    settings: dict[str, int],
) -> UnlabeledTests:
    """Tests on features and outputs: one family for any shift and prior, and the residual test."""
    source_projected, target_projected = joint_projection(source_features, features)
    first = holm(
        [
            mmd_test(source_projected, target_projected, **settings),
            classifier_test(source_projected, target_projected, **settings),
            kolmogorov_smirnov_test(
                source.probabilities, probabilities, column_name="probability of class"
            ),
            predicted_label_test(source.probabilities, probabilities, seed=settings["seed"]),
            prior_test(probabilities, source, **settings),
        ]
    )
    residual = residual_test(
        source_projected,
        target_projected,
        probabilities,
        source,
        simulations=settings["permutations"],
        seed=settings["seed"],
    )
    return UnlabeledTests(first[:3], first[3:], residual)


@dataclasses.dataclass(frozen=True)
class LabeledTests:
    """Tests on a few target labels; all empty without labels."""

    source_posteriors: tuple[HypothesisTest, ...] = ()
    adjusted_posteriors: tuple[HypothesisTest, ...] = ()
    ratios: tuple[HypothesisTest, ...] = ()

    @property
    def all(self) -> tuple[HypothesisTest, ...]:
        """All tests, in the order of the decision procedure."""
        return (*self.source_posteriors, *self.adjusted_posteriors, *self.ratios)


def labeled_tests(
    source: Calibration,
    probabilities: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> LabeledTests:
    """Whether labels follow the posteriors, unchanged and corrected for prevalence."""
    rows, labels = known
    if not len(rows):
        return LabeledTests()
    raw = probabilities[rows]
    corrected = corrected_posteriors(rows, probabilities, source, seed=seed)

    def tests_of(name: str, posteriors: Any) -> tuple[HypothesisTest, ...]:
        tests = (log_loss_test, label_residual_test)
        return tuple(
            dataclasses.replace(test, name=f"{test.name}, {name}")
            for test in holm([test_fn(posteriors, labels, seed=seed) for test_fn in tests])
        )

    return LabeledTests(
        source_posteriors=tests_of("p(y | x) unchanged", raw),
        adjusted_posteriors=tests_of("p(y | x) adjusted", corrected),
        ratios=posterior_ratio_tests(raw, corrected, labels, seed=seed),
    )


def any_rejected(tests: Sequence[HypothesisTest], level: float) -> bool | None:
    """Whether any of the tests was rejected; None where none could be made."""
    if all(test.p is None for test in tests):
        return None
    return any(test.rejected(level) for test in tests)


def _preferred(
    ratios: Sequence[HypothesisTest], level: float
) -> Literal["label", "covariate"] | None:
    covariate, label = (test.rejected(level) for test in ratios) if ratios else (False, False)
    if covariate == label:
        return None
    return "label" if covariate else "covariate"


def _check_labeled(
    given: tuple[Any, Any] | None, count: int, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and labels, both empty without labels."""
    if given is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows = as_labels(given[0], "positions of labels", count=len(given[0]), classes=count)
    if len(np.unique(rows)) < len(rows):
        raise ValueError("positions of labels must be different, got an example twice")
    labels = as_labels(given[1], "target labels", count=len(rows), classes=classes)
    return rows, labels


def _small_sample_notes(source: Calibration, count: int, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on samples that are too small."""
    notes = []
    examples = np.bincount(source.labels, minlength=source.classes)
    if rare := [name for name, size in zip(names, examples, strict=True) if size < _MIN_PER_CLASS]:
        notes.append(
            f"fewer than {_MIN_PER_CLASS} held-out examples at the source: {', '.join(rare)}"
        )
    if count < _MIN_TARGETS:
        notes.append(f"{count} target examples show large shifts only; use {_MIN_TARGETS} or more")
    return tuple(notes)


def _check_class_names(given: Sequence[str], classes: int) -> tuple[str, ...]:
    if given and len(given) != classes:
        raise ValueError(f"class_names must have {classes} names, got {len(given)}")
    return tuple(given) or tuple(map(str, range(classes)))
