"""Transfer learning for pre-trained ResNets in JAX.

Everything public is here under one name; the rooms behind it are imported when a name is first
used, so that ``import flaxtransfer`` costs little more than jax itself.

>>> import flaxtransfer as ft
>>> mask = ft.stage(4) - ft.batch_norm()
>>> mask
stage(4) - batch_norm()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer import shift as shift
    from flaxtransfer.adapt.batch_norm import adapt_batch_norm as adapt_batch_norm
    from flaxtransfer.adapt.batch_norm import adapt_batch_norm_balanced as adapt_batch_norm_balanced
    from flaxtransfer.adapt.entropy import minimise_entropy as minimise_entropy
    from flaxtransfer.adapt.scores import Evidence as Evidence
    from flaxtransfer.adapt.scores import evidence as evidence
    from flaxtransfer.analysis.profile import Profile as Profile
    from flaxtransfer.analysis.profile import probe_profile as probe_profile
    from flaxtransfer.analysis.stem import StemReport as StemReport
    from flaxtransfer.analysis.stem import stem_report as stem_report
    from flaxtransfer.averaging import Soup as Soup
    from flaxtransfer.averaging import average as average
    from flaxtransfer.averaging import greedy_soup as greedy_soup
    from flaxtransfer.averaging import interpolate as interpolate
    from flaxtransfer.batchnorm import Norm as Norm
    from flaxtransfer.batchnorm import policy as policy
    from flaxtransfer.checkpoint.manager import Checkpoints as Checkpoints
    from flaxtransfer.classifier import TransferReport as TransferReport
    from flaxtransfer.classifier import transfer as transfer
    from flaxtransfer.data.band_statistics import band_patches as band_patches
    from flaxtransfer.data.band_statistics import band_preprocessing as band_preprocessing
    from flaxtransfer.data.loaders import Batch as Batch
    from flaxtransfer.data.loaders import Examples as Examples
    from flaxtransfer.data.loaders import Feed as Feed
    from flaxtransfer.data.loaders import held_out as held_out
    from flaxtransfer.data.loaders import source_feed as source_feed
    from flaxtransfer.data.open import open_source as open_source
    from flaxtransfer.data.source import ArraySource as ArraySource
    from flaxtransfer.data.source import Source as Source
    from flaxtransfer.data.splits import Splits as Splits
    from flaxtransfer.data.splits import stratified_split as stratified_split
    from flaxtransfer.features.checks import Standardisation as Standardisation
    from flaxtransfer.features.checks import standardisation as standardisation
    from flaxtransfer.features.class_means import Baseline as Baseline
    from flaxtransfer.features.class_means import MeansHead as MeansHead
    from flaxtransfer.features.class_means import instant_baseline as instant_baseline
    from flaxtransfer.features.class_means import linear_discriminant as linear_discriminant
    from flaxtransfer.features.class_means import nearest_mean as nearest_mean
    from flaxtransfer.features.extract import pooled_features as pooled_features
    from flaxtransfer.features.extract import segment_features as segment_features
    from flaxtransfer.features.logistic import LogisticPath as LogisticPath
    from flaxtransfer.features.logistic import logistic_path as logistic_path
    from flaxtransfer.features.ridge import RidgePath as RidgePath
    from flaxtransfer.features.ridge import ridge_path as ridge_path
    from flaxtransfer.features.sweep import HeadSweep as HeadSweep
    from flaxtransfer.features.sweep import SolvedHead as SolvedHead
    from flaxtransfer.features.sweep import solved_head as solved_head
    from flaxtransfer.features.sweep import stratified_folds as stratified_folds
    from flaxtransfer.features.sweep import sweep_head as sweep_head
    from flaxtransfer.labels import label as label
    from flaxtransfer.labels import rest as rest
    from flaxtransfer.masks import Mask as Mask
    from flaxtransfer.masks import adapter as adapter
    from flaxtransfer.masks import batch_norm as batch_norm
    from flaxtransfer.masks import biases as biases
    from flaxtransfer.masks import everything as everything
    from flaxtransfer.masks import glob as glob
    from flaxtransfer.masks import head as head
    from flaxtransfer.masks import kernels as kernels
    from flaxtransfer.masks import matrices as matrices
    from flaxtransfer.masks import parse as parse
    from flaxtransfer.masks import resolve as resolve
    from flaxtransfer.masks import stage as stage
    from flaxtransfer.masks import stages as stages
    from flaxtransfer.masks import stem as stem
    from flaxtransfer.masks import up_to as up_to
    from flaxtransfer.models import nnx as nnx
    from flaxtransfer.models.config import Adapter as Adapter
    from flaxtransfer.models.config import ResNetConfig as ResNetConfig
    from flaxtransfer.models.model import Model as Model
    from flaxtransfer.models.registry import ARCHITECTURES as ARCHITECTURES
    from flaxtransfer.models.registry import RESNETS as RESNETS
    from flaxtransfer.models.registry import resnet as resnet
    from flaxtransfer.optimizers import FROZEN as FROZEN
    from flaxtransfer.optimizers import Group as Group
    from flaxtransfer.optimizers import frozen as frozen
    from flaxtransfer.optimizers import layerwise_decay as layerwise_decay
    from flaxtransfer.optimizers import merge as merge
    from flaxtransfer.optimizers import migrate as migrate
    from flaxtransfer.optimizers import partition as partition
    from flaxtransfer.optimizers import trainable as trainable
    from flaxtransfer.parameter_table import table as table
    from flaxtransfer.report.figures import rate_picture as rate_picture
    from flaxtransfer.schedules import WarmupCosine as WarmupCosine
    from flaxtransfer.strategies import RECIPES as RECIPES
    from flaxtransfer.strategies.measured import curvature_scaled as curvature_scaled
    from flaxtransfer.strategies.measured import gradient_scaled as gradient_scaled
    from flaxtransfer.strategies.recipes import batch_norm_only as batch_norm_only
    from flaxtransfer.strategies.recipes import discriminative as discriminative
    from flaxtransfer.strategies.recipes import feature_extraction as feature_extraction
    from flaxtransfer.strategies.recipes import from_scratch as from_scratch
    from flaxtransfer.strategies.recipes import full_fine_tuning as full_fine_tuning
    from flaxtransfer.strategies.recipes import head_then_fine_tune as head_then_fine_tune
    from flaxtransfer.strategies.recipes import l2_sp as l2_sp
    from flaxtransfer.strategies.recipes import (
        linear_probe_then_fine_tune as linear_probe_then_fine_tune,
    )
    from flaxtransfer.strategies.recipes import progressive_unfreezing as progressive_unfreezing
    from flaxtransfer.strategies.recipes import surgical as surgical
    from flaxtransfer.training.console import Interrupted as Interrupted
    from flaxtransfer.training.evaluation import Evaluation as Evaluation
    from flaxtransfer.training.evaluation import Predictions as Predictions
    from flaxtransfer.training.evaluation import evaluate as evaluate
    from flaxtransfer.training.evaluation import predict as predict
    from flaxtransfer.training.loop import Fitted as Fitted
    from flaxtransfer.training.loop import NonFiniteLoss as NonFiniteLoss
    from flaxtransfer.training.loop import Options as Options
    from flaxtransfer.training.loop import fit as fit
    from flaxtransfer.training.lr_finder import RateSweep as RateSweep
    from flaxtransfer.training.lr_finder import find_learning_rate as find_learning_rate
    from flaxtransfer.training.lr_finder import find_learning_rates as find_learning_rates
    from flaxtransfer.training.plan import Phase as Phase
    from flaxtransfer.training.plan import Plan as Plan
    from flaxtransfer.training.plan_yaml import load_plan as load_plan
    from flaxtransfer.training.plan_yaml import plan_from_yaml as plan_from_yaml
    from flaxtransfer.training.plan_yaml import plan_to_yaml as plan_to_yaml
    from flaxtransfer.training.plan_yaml import save_plan as save_plan
    from flaxtransfer.training.prefix_cache import Cache as Cache
    from flaxtransfer.training.recalibration import recalibrate as recalibrate
    from flaxtransfer.training.run_folder import environment as environment
    from flaxtransfer.training.task import SmoothedCrossEntropy as SmoothedCrossEntropy
    from flaxtransfer.training.task import cross_entropy as cross_entropy
    from flaxtransfer.types import Params as Params
    from flaxtransfer.types import Variables as Variables
    from flaxtransfer.weights.export.export import Exported as Exported
    from flaxtransfer.weights.export.export import export as export
    from flaxtransfer.weights.load import load as load
    from flaxtransfer.weights.preprocessing import Preprocessing as Preprocessing
    from flaxtransfer.weights.preprocessing import normalised as normalised
    from flaxtransfer.weights.preprocessing import pixels as pixels
    from flaxtransfer.weights.pretrained import Checkpoint as Checkpoint
    from flaxtransfer.weights.save import fold_adapter as fold_adapter
    from flaxtransfer.weights.save import save as save

__getattr__, __dir__, __all__ = attach(__name__, __file__)
__version__ = "0.1.0"
