"""Transfer learning for pre-trained ResNets in JAX.

Everything public is here under one name; the rooms behind it are imported when a name is first
used, so that ``import flaxtransfer`` costs little more than jax itself.

>>> import flaxtransfer as ft
>>> mask = ft.stage(4) - ft.batch_norm()
>>> mask
stage(4) - batch_norm()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxtransfer import shift
    from flaxtransfer.analysis.profile import Profile, probe_profile
    from flaxtransfer.analysis.stem import StemReport, stem_report
    from flaxtransfer.architectures import ResNetConfig
    from flaxtransfer.averaging import Soup, average, greedy_soup, interpolate
    from flaxtransfer.bands import Adapter
    from flaxtransfer.batchnorm import Norm, policy
    from flaxtransfer.catalogue import ARCHITECTURES, RESNETS
    from flaxtransfer.checkpoint import Checkpoints
    from flaxtransfer.data import ArraySource, Source, Splits, open_source, stratified_split
    from flaxtransfer.domain.batch_norm import adapt_batch_norm
    from flaxtransfer.domain.class_balanced import adapt_batch_norm_balanced
    from flaxtransfer.domain.entropy import minimise_entropy
    from flaxtransfer.domain.evidence import Evidence, evidence
    from flaxtransfer.exports import Exported, export
    from flaxtransfer.features import (
        Baseline,
        HeadSweep,
        LogisticPath,
        MeansHead,
        RidgePath,
        SolvedHead,
        Standardisation,
        instant_baseline,
        linear_discriminant,
        logistic_path,
        nearest_mean,
        ridge_path,
        solved_head,
        standardisation,
        stratified_folds,
        sweep_head,
    )
    from flaxtransfer.features.extraction import pooled_features, segment_features
    from flaxtransfer.folding import fold_adapter
    from flaxtransfer.labels import label, rest
    from flaxtransfer.masks import (
        Mask,
        adapter,
        batch_norm,
        biases,
        everything,
        glob,
        head,
        kernels,
        matrices,
        parse,
        resolve,
        stage,
        stages,
        stem,
        up_to,
    )
    from flaxtransfer.models import nnx
    from flaxtransfer.models.model import Model
    from flaxtransfer.models.resnet import resnet
    from flaxtransfer.optimizers import (
        FROZEN,
        Group,
        carry,
        frozen,
        layerwise_decay,
        merge,
        partition,
        trainable,
    )
    from flaxtransfer.overview import table
    from flaxtransfer.pretrained import TransferReport, transfer
    from flaxtransfer.report.rate_picture import rate_picture
    from flaxtransfer.schedules import WarmupCosine
    from flaxtransfer.strategies import (
        RECIPES,
        batch_norm_only,
        curvature_scaled,
        discriminative,
        feature_extraction,
        from_scratch,
        full_fine_tuning,
        gradient_scaled,
        head_then_fine_tune,
        l2_sp,
        linear_probe_then_fine_tune,
        progressive_unfreezing,
        surgical,
    )
    from flaxtransfer.training.band_statistics import band_patches, band_preprocessing
    from flaxtransfer.training.caching import Cache
    from flaxtransfer.training.evaluation import Evaluation, Predictions, evaluate, predict
    from flaxtransfer.training.feed import Batch, Examples, Feed, held_out, source_feed
    from flaxtransfer.training.finder import RateSweep, find_learning_rate, find_learning_rates
    from flaxtransfer.training.interrupts import Interrupted
    from flaxtransfer.training.loop import Fitted, NonFiniteLoss, Options, fit
    from flaxtransfer.training.losses import SmoothedCrossEntropy, cross_entropy
    from flaxtransfer.training.phases import Phase, Plan
    from flaxtransfer.training.plan_file import load_plan, plan_from_yaml, plan_to_yaml, save_plan
    from flaxtransfer.training.recalibration import recalibrate
    from flaxtransfer.training.run_folder import environment
    from flaxtransfer.types import Params, Variables
    from flaxtransfer.weights import Checkpoint, Preprocessing, load, normalised, pixels, save

_ROOMS = {
    "analysis.stem": ("StemReport", "stem_report"),
    "analysis.profile": ("Profile", "probe_profile"),
    "architectures": ("ResNetConfig",),
    "catalogue": ("ARCHITECTURES", "RESNETS"),
    "averaging": ("Soup", "average", "greedy_soup", "interpolate"),
    "bands": ("Adapter",),
    "batchnorm": ("Norm", "policy"),
    "checkpoint": ("Checkpoints",),
    "data": ("ArraySource", "Source", "Splits", "open_source", "stratified_split"),
    "domain.batch_norm": ("adapt_batch_norm",),
    "domain.class_balanced": ("adapt_batch_norm_balanced",),
    "domain.entropy": ("minimise_entropy",),
    "domain.evidence": ("Evidence", "evidence"),
    "exports": ("Exported", "export"),
    "features": (
        "Baseline", "HeadSweep", "LogisticPath", "MeansHead", "RidgePath", "SolvedHead",
        "Standardisation", "instant_baseline", "linear_discriminant", "logistic_path",
        "nearest_mean", "ridge_path", "solved_head", "standardisation", "stratified_folds",
        "sweep_head",
    ),
    "folding": ("fold_adapter",),
    "features.extraction": ("pooled_features", "segment_features"),
    "labels": ("label", "rest"),
    "masks": (
        "Mask", "adapter", "batch_norm", "biases", "everything", "glob", "head", "kernels",
        "matrices", "parse", "resolve", "stage", "stages", "stem", "up_to",
    ),
    "models": ("Model", "nnx", "resnet"),
    "optimizers": (
        "FROZEN", "Group", "carry", "frozen", "layerwise_decay", "merge", "partition", "trainable",
    ),
    "schedules": ("WarmupCosine",),
    "strategies": (
        "RECIPES", "batch_norm_only", "curvature_scaled", "discriminative", "feature_extraction",
        "from_scratch", "full_fine_tuning", "gradient_scaled", "head_then_fine_tune", "l2_sp",
        "linear_probe_then_fine_tune", "progressive_unfreezing", "surgical",
    ),
    "overview": ("table",),
    "report.rate_picture": ("rate_picture",),
    "training.caching": ("Cache",),
    "training.band_statistics": ("band_patches", "band_preprocessing"),
    "training.evaluation": ("Evaluation", "Predictions", "evaluate", "predict"),
    "training.feed": ("Batch", "Examples", "Feed", "held_out", "source_feed"),
    "training.finder": ("RateSweep", "find_learning_rate", "find_learning_rates"),
    "training.interrupts": ("Interrupted",),
    "training.loop": ("Fitted", "NonFiniteLoss", "Options", "fit"),
    "training.losses": ("SmoothedCrossEntropy", "cross_entropy"),
    "training.phases": ("Phase", "Plan"),
    "training.plan_file": ("load_plan", "plan_from_yaml", "plan_to_yaml", "save_plan"),
    "training.recalibration": ("recalibrate",),
    "training.run_folder": ("environment",),
    "pretrained": ("TransferReport", "transfer"),
    "types": ("Params", "Variables"),
    "weights": ("Checkpoint", "Preprocessing", "load", "normalised", "pixels", "save"),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_WHOLE_ROOMS = ("shift",)
"""Rooms that are used by their own name, as in ``ft.shift.diagnose``."""

__all__ = sorted([*_ROOM_OF, *_WHOLE_ROOMS])
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _WHOLE_ROOMS:
        return importlib.import_module(f"flaxtransfer.{name}")
    try:
        room = _ROOM_OF[name]
    except KeyError:
        raise AttributeError(f"module 'flaxtransfer' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"flaxtransfer.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
