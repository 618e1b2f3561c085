"""Heads on features, in seconds: arrays in, values out."""

from flaxtransfer.features.baseline import Baseline, instant_baseline
from flaxtransfer.features.folds import stratified_folds
from flaxtransfer.features.logistic import LogisticPath, logistic_path
from flaxtransfer.features.means import MeansHead, linear_discriminant, nearest_mean
from flaxtransfer.features.ridge import RidgePath, ridge_path
from flaxtransfer.features.solved import SolvedHead, solved_head
from flaxtransfer.features.standardise import Standardisation, standardisation
from flaxtransfer.features.sweep import HeadSweep, sweep_head

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
