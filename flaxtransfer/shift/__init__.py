"""Domain shift: which kind it is, what of it can be corrected, and what cannot be known.

Arrays in, values out: features, logits, probabilities and labels of any model, of numpy or JAX.
Names are looked up when they are used, so that who corrects a prior need not wait for a classifier.

>>> import flaxtransfer as ft
>>> ft.shift.adjust_prior([[0.5, 0.5]], [0.9, 0.1], source_prior=[0.5, 0.5])
array([[0.9, 0.1]])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxtransfer.shift.accuracy.accuracy import (
        accuracy_without_labels as accuracy_without_labels,
    )
    from flaxtransfer.shift.accuracy.accuracy_estimates import AccuracyEstimate as AccuracyEstimate
    from flaxtransfer.shift.accuracy.accuracy_estimates import (
        AccuracyEstimates as AccuracyEstimates,
    )
    from flaxtransfer.shift.accuracy.recall import (
        prevalence_weighted_recall as prevalence_weighted_recall,
    )
    from flaxtransfer.shift.batch_statistics import Moments as Moments
    from flaxtransfer.shift.calibration.calibrating import calibrate as calibrate
    from flaxtransfer.shift.calibration.calibration import Calibration as Calibration
    from flaxtransfer.shift.calibration.calibration import logits_of as logits_of
    from flaxtransfer.shift.calibration.calibration_error import (
        CalibrationError as CalibrationError,
    )
    from flaxtransfer.shift.calibration.calibration_error import brier_score as brier_score
    from flaxtransfer.shift.calibration.calibration_error import (
        calibration_error as calibration_error,
    )
    from flaxtransfer.shift.calibration.calibration_error import (
        negative_log_likelihood as negative_log_likelihood,
    )
    from flaxtransfer.shift.calibration.reliability import ReliabilityBin as ReliabilityBin
    from flaxtransfer.shift.calibration.reliability import reliability as reliability
    from flaxtransfer.shift.diagnosis.actions import Action as Action
    from flaxtransfer.shift.diagnosis.diagnosis import diagnose as diagnose
    from flaxtransfer.shift.diagnosis.projection import joint_projection as joint_projection
    from flaxtransfer.shift.diagnosis.shift_report import ShiftReport as ShiftReport
    from flaxtransfer.shift.diagnosis.verdicts import Findings as Findings
    from flaxtransfer.shift.diagnosis.verdicts import Verdict as Verdict
    from flaxtransfer.shift.diagnosis.verdicts import conclude as conclude
    from flaxtransfer.shift.distances.cka import debiased_cka as debiased_cka
    from flaxtransfer.shift.distances.class_distance import class_distance as class_distance
    from flaxtransfer.shift.distances.frechet import bures_wasserstein as bures_wasserstein
    from flaxtransfer.shift.distances.frechet import frechet_distance as frechet_distance
    from flaxtransfer.shift.distances.proxy_a import proxy_a_distance as proxy_a_distance
    from flaxtransfer.shift.distances.sliced_wasserstein import (
        sliced_wasserstein as sliced_wasserstein,
    )
    from flaxtransfer.shift.hypotheses import HypothesisTest as HypothesisTest
    from flaxtransfer.shift.hypotheses import holm as holm
    from flaxtransfer.shift.nulls import Distance as Distance
    from flaxtransfer.shift.nulls import Similarity as Similarity
    from flaxtransfer.shift.nulls import Transferability as Transferability
    from flaxtransfer.shift.prevalence.correction import adjust_prior as adjust_prior
    from flaxtransfer.shift.prevalence.estimation import estimate_prevalence as estimate_prevalence
    from flaxtransfer.shift.prevalence.guarded_correction import PriorCorrection as PriorCorrection
    from flaxtransfer.shift.prevalence.guarded_correction import correct_prior as correct_prior
    from flaxtransfer.shift.prevalence.prevalence import Prevalence as Prevalence
    from flaxtransfer.shift.testing.classifier_test import classifier_test as classifier_test
    from flaxtransfer.shift.testing.estimated_posteriors import (
        EstimatedPosteriors as EstimatedPosteriors,
    )
    from flaxtransfer.shift.testing.estimated_posteriors import (
        corrected_posteriors as corrected_posteriors,
    )
    from flaxtransfer.shift.testing.few_labels import label_residual_test as label_residual_test
    from flaxtransfer.shift.testing.few_labels import log_loss_test as log_loss_test
    from flaxtransfer.shift.testing.few_labels import posterior_ratio_tests as posterior_ratio_tests
    from flaxtransfer.shift.testing.labels_needed import LabelsNeeded as LabelsNeeded
    from flaxtransfer.shift.testing.labels_needed import labels_needed as labels_needed
    from flaxtransfer.shift.testing.marginal_tests import (
        kolmogorov_smirnov_test as kolmogorov_smirnov_test,
    )
    from flaxtransfer.shift.testing.mmd import mmd_test as mmd_test
    from flaxtransfer.shift.testing.predicted_labels import (
        predicted_label_test as predicted_label_test,
    )
    from flaxtransfer.shift.testing.prior_test import prior_test as prior_test
    from flaxtransfer.shift.testing.residual_test import residual_test as residual_test
    from flaxtransfer.shift.transferability.h_score import h_score as h_score
    from flaxtransfer.shift.transferability.leep import leep as leep
    from flaxtransfer.shift.transferability.logme import logme as logme

_HOME = {
    "accuracy.accuracy": ("accuracy_without_labels",),
    "accuracy.recall": ("prevalence_weighted_recall",),
    "accuracy.accuracy_estimates": ("AccuracyEstimate", "AccuracyEstimates"),
    "diagnosis.actions": ("Action",),
    "batch_statistics": ("Moments",),
    "calibration.calibrating": ("calibrate",),
    "calibration.calibration": ("Calibration", "logits_of"),
    "calibration.calibration_error": (
        "CalibrationError", "brier_score", "calibration_error", "negative_log_likelihood",
    ),
    "distances.cka": ("debiased_cka",),
    "distances.class_distance": ("class_distance",),
    "testing.classifier_test": ("classifier_test",),
    "prevalence.correction": ("adjust_prior",),
    "diagnosis.diagnosis": ("diagnose",),
    "prevalence.estimation": ("estimate_prevalence",),
    "prevalence.guarded_correction": ("PriorCorrection", "correct_prior"),
    "testing.few_labels": ("label_residual_test", "log_loss_test", "posterior_ratio_tests"),
    "distances.frechet": ("bures_wasserstein", "frechet_distance"),
    "transferability.h_score": ("h_score",),
    "hypotheses": ("HypothesisTest", "holm"),
    "testing.estimated_posteriors": ("EstimatedPosteriors", "corrected_posteriors"),
    "testing.labels_needed": ("LabelsNeeded", "labels_needed"),
    "transferability.leep": ("leep",),
    "transferability.logme": ("logme",),
    "testing.marginal_tests": ("kolmogorov_smirnov_test",),
    "testing.mmd": ("mmd_test",),
    "nulls": ("Distance", "Similarity", "Transferability"),
    "testing.predicted_labels": ("predicted_label_test",),
    "prevalence.prevalence": ("Prevalence",),
    "testing.prior_test": ("prior_test",),
    "diagnosis.projection": ("joint_projection",),
    "distances.proxy_a": ("proxy_a_distance",),
    "calibration.reliability": ("ReliabilityBin", "reliability"),
    "testing.residual_test": ("residual_test",),
    "diagnosis.shift_report": ("ShiftReport",),
    "distances.sliced_wasserstein": ("sliced_wasserstein",),
    "diagnosis.verdicts": ("Findings", "Verdict", "conclude"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
