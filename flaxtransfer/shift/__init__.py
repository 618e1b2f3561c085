"""Domain shift: tests, estimates, corrections, and what cannot be known.

Arrays in, values out: features, logits, probabilities and labels of any model, NumPy or JAX. Use
``diagnose`` for a full report, or single functions: ``calibrate`` first, then
``estimate_prevalence``, ``correct_prior`` or ``accuracy_without_labels``. More estimators and their
parts are in the modules of this room.

>>> import flaxtransfer as ft
>>> ft.shift.adjust_prior([[0.5, 0.5]], [0.9, 0.1], source_prior=[0.5, 0.5])
array([[0.9, 0.1]])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.shift.accuracy import AccuracyEstimate as AccuracyEstimate
    from flaxtransfer.shift.accuracy import AccuracyEstimates as AccuracyEstimates
    from flaxtransfer.shift.accuracy import accuracy_without_labels as accuracy_without_labels
    from flaxtransfer.shift.calibration import Calibration as Calibration
    from flaxtransfer.shift.calibration import calibrate as calibrate
    from flaxtransfer.shift.calibration import logits_of as logits_of
    from flaxtransfer.shift.calibration_metrics import CalibrationError as CalibrationError
    from flaxtransfer.shift.calibration_metrics import ReliabilityBin as ReliabilityBin
    from flaxtransfer.shift.calibration_metrics import calibration_error as calibration_error
    from flaxtransfer.shift.calibration_metrics import reliability as reliability
    from flaxtransfer.shift.concept_shift import LabelsNeeded as LabelsNeeded
    from flaxtransfer.shift.concept_shift import label_residual_test as label_residual_test
    from flaxtransfer.shift.concept_shift import labels_needed as labels_needed
    from flaxtransfer.shift.concept_shift import log_loss_test as log_loss_test
    from flaxtransfer.shift.concept_shift import posterior_ratio_tests as posterior_ratio_tests
    from flaxtransfer.shift.diagnosis import diagnose as diagnose
    from flaxtransfer.shift.label_shift import prior_test as prior_test
    from flaxtransfer.shift.label_shift import residual_test as residual_test
    from flaxtransfer.shift.likelihood import likelihood_pass as likelihood_pass
    from flaxtransfer.shift.likelihood import maximize_likelihood as maximize_likelihood
    from flaxtransfer.shift.marginals import kolmogorov_smirnov_test as kolmogorov_smirnov_test
    from flaxtransfer.shift.marginals import predicted_label_test as predicted_label_test
    from flaxtransfer.shift.prevalence import Prevalence as Prevalence
    from flaxtransfer.shift.prevalence import estimate_prevalence as estimate_prevalence
    from flaxtransfer.shift.prior_correction import EstimatedPosteriors as EstimatedPosteriors
    from flaxtransfer.shift.prior_correction import PriorCorrection as PriorCorrection
    from flaxtransfer.shift.prior_correction import adjust_prior as adjust_prior
    from flaxtransfer.shift.prior_correction import correct_prior as correct_prior
    from flaxtransfer.shift.prior_correction import corrected_posteriors as corrected_posteriors
    from flaxtransfer.shift.report import Action as Action
    from flaxtransfer.shift.report import Conclusion as Conclusion
    from flaxtransfer.shift.report import ShiftReport as ShiftReport
    from flaxtransfer.shift.report import Verdict as Verdict
    from flaxtransfer.shift.statistics import HypothesisTest as HypothesisTest
    from flaxtransfer.shift.statistics import NullCalibrated as NullCalibrated
    from flaxtransfer.shift.two_sample import classifier_test as classifier_test
    from flaxtransfer.shift.two_sample import mmd_test as mmd_test

__getattr__, __dir__, __all__ = attach(__name__, __file__)
