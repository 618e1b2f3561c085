"""``flaxtransfer plan``: print a strategy, or write it to a file, without running it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from flaxtransfer.models.registry import ARCHITECTURES, resnet
from flaxtransfer.paths import suggest
from flaxtransfer.recipes import RECIPES
from flaxtransfer.training.plan import Plan as TrainingPlan
from flaxtransfer.training.plan import plan_table
from flaxtransfer.training.plan_yaml import load_plan, save_plan
from flaxtransfer.types import Params


@dataclass(frozen=True)
class Plan:
    """Print what a strategy would do to a network, phase by phase, without running it.

    Example: flaxtransfer plan --strategy progressive_unfreezing --model resnet50 --out plan.yaml

    Args:
      strategy: a recipe (feature_extraction, batch_norm_only, head_then_fine_tune,
        linear_probe_then_fine_tune, progressive_unfreezing, discriminative, surgical, l2_sp,
        full_fine_tuning, from_scratch) or the path of a plan, such as plan.yaml. Those that have
        to measure on images (curvature_scaled, gradient_scaled) are printed by train.
      model: architecture, such as resnet18 or resnet50.
      classes: outputs of the head.
      out: also write the plan to this file, to be edited and given to train --strategy.
    """

    strategy: str = "head_then_fine_tune"
    model: str = "resnet18"
    classes: int = 10
    out: Path | None = None


def plan(options: Plan, console: Console) -> None:
    """Runs ``flaxtransfer plan``."""
    if options.model not in ARCHITECTURES:
        raise ValueError(
            f"unknown model {options.model!r}{suggest(options.model, list(ARCHITECTURES))}; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    model = resnet(replace(ARCHITECTURES[options.model], classes=options.classes))
    params = model.abstract()["params"]
    made = strategy_plan(options.strategy, params, {})
    console.print(plan_table(made, params))
    if options.out is not None:
        save_plan(options.out, made)
        console.print(f"written to {options.out}", highlight=False, soft_wrap=True)


def is_file(strategy: str) -> bool:
    """Whether a strategy is the path of a plan, rather than the name of a recipe."""
    return strategy.endswith((".yaml", ".yml"))


def strategy_plan(strategy: str, params: Params, settings: Mapping[str, Any]) -> TrainingPlan:
    """The plan that a name or a file means.

    Args:
      strategy: name of a recipe, or path of a YAML file.
      params: of the network.
      settings: arguments of the recipe by name; None is the recipe's own default. A file is
        complete in itself and takes none.

    Raises:
      ValueError: an unknown name, a setting that the recipe does not take, with what there is; a
        recipe whose measurements are not among the settings.
      FileNotFoundError: no such file.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if is_file(strategy):
        if given:
            options = ", ".join(_option(name) for name in given)
            raise ValueError(f"{strategy} says all that {options} would; edit the file instead")
        return load_plan(strategy)
    if strategy not in RECIPES:
        raise ValueError(
            f"no strategy {strategy!r}{suggest(strategy, RECIPES)}; there are "
            f"{', '.join(RECIPES)}, and the path of a plan, such as plan.yaml"
        )
    recipe = RECIPES[strategy]
    known = [name for name in inspect.signature(recipe).parameters if name != "params"]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(
            f"the strategy {strategy} takes no {', '.join(map(_option, unknown))}; of these "
            f"options it takes {', '.join(_option(n) for n in settings if n in known)}"
        )
    wanted = inspect.signature(recipe).parameters.values()
    unmeasured = [p.name for p in wanted if p.default is p.empty and p.name != "params"]
    if missing := [name for name in unmeasured if name not in given]:
        raise ValueError(
            f"the strategy {strategy} measures {' and '.join(missing)} on the images first; "
            f"flaxtransfer train --strategy {strategy} does, and prints its plan before step 0"
        )
    return recipe(params, **given)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
