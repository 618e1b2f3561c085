"""Training: plans, steps, the loop, evaluation, run folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.averaging import Soup as Soup
    from flaxtransfer.averaging import average as average
    from flaxtransfer.averaging import greedy_soup as greedy_soup
    from flaxtransfer.averaging import interpolate as interpolate
    from flaxtransfer.checkpoint.manager import CheckpointManager as CheckpointManager
    from flaxtransfer.losses import BinaryCrossEntropy as BinaryCrossEntropy
    from flaxtransfer.losses import CrossEntropy as CrossEntropy
    from flaxtransfer.losses import Huber as Huber
    from flaxtransfer.losses import SquaredError as SquaredError
    from flaxtransfer.losses import cross_entropy as cross_entropy
    from flaxtransfer.metrics import METRICS as METRICS
    from flaxtransfer.metrics import report as report
    from flaxtransfer.optimizers import migrate as migrate
    from flaxtransfer.sharding import make_mesh as make_mesh
    from flaxtransfer.sharding import place_batch as place_batch
    from flaxtransfer.sharding import place_replicated as place_replicated
    from flaxtransfer.sharding import topology_mesh as topology_mesh
    from flaxtransfer.training.cached_loader import cached_feed as cached_feed
    from flaxtransfer.training.console import Interrupted as Interrupted
    from flaxtransfer.training.console import read_metrics as read_metrics
    from flaxtransfer.training.evaluation import Evaluation as Evaluation
    from flaxtransfer.training.evaluation import Predictions as Predictions
    from flaxtransfer.training.evaluation import init_head_from_probe as init_head_from_probe
    from flaxtransfer.training.evaluation import recalibrate as recalibrate
    from flaxtransfer.training.loop import FitResult as FitResult
    from flaxtransfer.training.loop import NonFiniteLoss as NonFiniteLoss
    from flaxtransfer.training.lr_finder import RateSweep as RateSweep
    from flaxtransfer.training.lr_finder import find_learning_rates as find_learning_rates
    from flaxtransfer.training.plan_yaml import load_plan as load_plan
    from flaxtransfer.training.plan_yaml import plan_from_yaml as plan_from_yaml
    from flaxtransfer.training.plan_yaml import plan_to_yaml as plan_to_yaml
    from flaxtransfer.training.plan_yaml import save_plan as save_plan
    from flaxtransfer.training.prefix_cache import choose as choose
    from flaxtransfer.training.prefix_cache import split_phase as split_phase
    from flaxtransfer.training.prefix_cache import split_state as split_state
    from flaxtransfer.training.run_folder import environment as environment
    from flaxtransfer.training.run_folder import kept_splits as kept_splits
    from flaxtransfer.training.step import StepCost as StepCost
    from flaxtransfer.training.step import start as start
    from flaxtransfer.training.step import step_cost as step_cost
    from flaxtransfer.training.step import train_step as train_step

__getattr__, __dir__, __all__ = attach(__name__, __file__)
