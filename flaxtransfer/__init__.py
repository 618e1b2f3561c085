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
    from flaxtransfer import adapt as adapt
    from flaxtransfer import advice as advice
    from flaxtransfer import analysis as analysis
    from flaxtransfer import data as data
    from flaxtransfer import features as features
    from flaxtransfer import models as models
    from flaxtransfer import recipes as recipes
    from flaxtransfer import shift as shift
    from flaxtransfer import task as task
    from flaxtransfer import training as training
    from flaxtransfer import weights as weights
    from flaxtransfer.advice.advise import advise as advise
    from flaxtransfer.advice.auto import auto as auto
    from flaxtransfer.classifier import Classifier as Classifier
    from flaxtransfer.classifier import transfer as transfer
    from flaxtransfer.data.loader import eval_batches as eval_batches
    from flaxtransfer.data.loader import loaders as loaders
    from flaxtransfer.data.open import open_source as open_source
    from flaxtransfer.data.source import ArraySource as ArraySource
    from flaxtransfer.data.splits import stratified_split as stratified_split
    from flaxtransfer.groups import FROZEN as FROZEN
    from flaxtransfer.groups import Group as Group
    from flaxtransfer.groups import WarmupCosine as WarmupCosine
    from flaxtransfer.labels import ParamGroups as ParamGroups
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
    from flaxtransfer.masks import stage as stage
    from flaxtransfer.masks import stages as stages
    from flaxtransfer.masks import stem as stem
    from flaxtransfer.masks import up_to as up_to
    from flaxtransfer.masks import where as where
    from flaxtransfer.models import nnx as nnx
    from flaxtransfer.models.model import Model as Model
    from flaxtransfer.models.registry import resnet as resnet
    from flaxtransfer.optimizers import layerwise_decay as layerwise_decay
    from flaxtransfer.optimizers import partition as partition
    from flaxtransfer.overview import parameter_table as parameter_table
    from flaxtransfer.task import Task as Task
    from flaxtransfer.training.evaluation import evaluate as evaluate
    from flaxtransfer.training.evaluation import predict as predict
    from flaxtransfer.training.loop import FitOptions as FitOptions
    from flaxtransfer.training.loop import fit as fit
    from flaxtransfer.training.lr_finder import find_learning_rate as find_learning_rate
    from flaxtransfer.training.plan import Phase as Phase
    from flaxtransfer.training.plan import Plan as Plan
    from flaxtransfer.training.prefix_cache import Cache as Cache
    from flaxtransfer.weights.exports.exporting import export as export
    from flaxtransfer.weights.loading import load as load
    from flaxtransfer.weights.preprocessing import Preprocessing as Preprocessing
    from flaxtransfer.weights.pretrained import Pretrained as Pretrained
    from flaxtransfer.weights.pretrained import save as save

__getattr__, __dir__, __all__ = attach(__name__, __file__)
__version__ = "0.1.0"
