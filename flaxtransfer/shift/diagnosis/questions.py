"""The questions of a diagnosis: which tests ask them, and of which family each is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.diagnosis.projection import joint_projection
from flaxtransfer.shift.hypotheses import HypothesisTest, holm
from flaxtransfer.shift.testing.classifier_test import classifier_test
from flaxtransfer.shift.testing.estimated_posteriors import corrected_posteriors
from flaxtransfer.shift.testing.few_labels import (
    label_residual_test,
    log_loss_test,
    posterior_ratio_tests,
)
from flaxtransfer.shift.testing.marginal_tests import kolmogorov_smirnov_test
from flaxtransfer.shift.testing.mmd import mmd_test
from flaxtransfer.shift.testing.predicted_labels import predicted_label_test
from flaxtransfer.shift.testing.prior_test import prior_test
from flaxtransfer.shift.testing.residual_test import residual_test

__all__ = ["Unlabelled", "WithLabels", "fell", "labelled_tests", "unlabelled_tests"]


@dataclasses.dataclass(frozen=True)
class Unlabelled:
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


def unlabelled_tests(
    source: Calibration,
    source_features: np.ndarray,
    probabilities: np.ndarray,
    features: np.ndarray,
    settings: dict[str, int],
) -> Unlabelled:
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
    return Unlabelled(first[:3], first[3:], residual)


def labelled_tests(
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


def fell(tests: Sequence[HypothesisTest], level: float) -> bool | None:
    """Whether one of them was rejected; None where none could be made."""
    if all(test.p is None for test in tests):
        return None
    return any(test.rejected(level) for test in tests)
