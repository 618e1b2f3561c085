"""Heads on features, in seconds: arrays in, values out."""

from flaxtransfer.features.checks import Standardisation, standardisation
from flaxtransfer.features.class_means import (
    Baseline,
    MeansHead,
    instant_baseline,
    linear_discriminant,
    nearest_mean,
)
from flaxtransfer.features.logistic import LogisticPath, logistic_path
from flaxtransfer.features.ridge import RidgePath, ridge_path
from flaxtransfer.features.sweep import (
    HeadSweep,
    SolvedHead,
    solved_head,
    stratified_folds,
    sweep_head,
)

__all__ = [
    "Baseline",
    "HeadSweep",
    "LogisticPath",
    "MeansHead",
    "RidgePath",
    "SolvedHead",
    "Standardisation",
    "instant_baseline",
    "linear_discriminant",
    "logistic_path",
    "nearest_mean",
    "ridge_path",
    "solved_head",
    "standardisation",
    "stratified_folds",
    "sweep_head",
]
