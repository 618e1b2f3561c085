"""Heads on features, in seconds: arrays in, values out."""

from flaxtransfer.features.logistic import LogisticPath, logistic_path
from flaxtransfer.features.means import MeansHead, linear_discriminant, nearest_mean
from flaxtransfer.features.ridge import RidgePath, ridge_path
from flaxtransfer.features.solved import SolvedHead, solved_head
from flaxtransfer.features.standardise import Standardisation, standardisation
from flaxtransfer.features.sweep import Sweep, stratified_folds, sweep

__all__ = [
    "LogisticPath",
    "MeansHead",
    "RidgePath",
    "SolvedHead",
    "Standardisation",
    "Sweep",
    "linear_discriminant",
    "logistic_path",
    "nearest_mean",
    "ridge_path",
    "solved_head",
    "standardisation",
    "stratified_folds",
    "sweep",
]
