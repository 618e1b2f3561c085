"""Feature-space classifiers: linear heads on features of a frozen network, within seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.features.class_means import Baseline as Baseline
    from flaxtransfer.features.class_means import MeansHead as MeansHead
    from flaxtransfer.features.class_means import baseline as baseline
    from flaxtransfer.features.class_means import linear_discriminant as linear_discriminant
    from flaxtransfer.features.class_means import nearest_class_mean as nearest_class_mean
    from flaxtransfer.features.inputs import Standardization as Standardization
    from flaxtransfer.features.inputs import pooled_features as pooled_features
    from flaxtransfer.features.inputs import segment_features as segment_features
    from flaxtransfer.features.inputs import standardization as standardization
    from flaxtransfer.features.inputs import stratified_folds as stratified_folds
    from flaxtransfer.features.logistic import LogisticPath as LogisticPath
    from flaxtransfer.features.logistic import logistic_path as logistic_path
    from flaxtransfer.features.ridge import CrossValidation as CrossValidation
    from flaxtransfer.features.ridge import RidgePath as RidgePath
    from flaxtransfer.features.ridge import cross_validate as cross_validate
    from flaxtransfer.features.ridge import ridge_path as ridge_path
    from flaxtransfer.features.sweep import HeadSweep as HeadSweep
    from flaxtransfer.features.sweep import LinearProbe as LinearProbe
    from flaxtransfer.features.sweep import fit_linear_probe as fit_linear_probe
    from flaxtransfer.features.sweep import sweep_head as sweep_head

__getattr__, __dir__, __all__ = attach(__name__, __file__)
