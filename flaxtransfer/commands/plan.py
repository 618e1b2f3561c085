"""``flaxtransfer plan``: the plan of a strategy, printed or written to a file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from flaxtransfer.commands.options import AUTO, flag, is_file
from flaxtransfer.commands.subcommands import Plan
from flaxtransfer.models.registry import resnet
from flaxtransfer.recipes import RECIPES
from flaxtransfer.training.plan import Plan as TrainingPlan
from flaxtransfer.training.plan import plan_table
from flaxtransfer.training.plan_yaml import load_plan, save_plan
from flaxtransfer.types import Params


def plan(options: Plan, console: Console) -> None:
    """Runs ``flaxtransfer plan``."""
    model = resnet(options.model, classes=options.classes)
    params = model.abstract()["params"]
    made = strategy_plan(options.strategy, params, {})
    console.print(plan_table(made, params))
    if options.out is not None:
        save_plan(options.out, made)
        console.print(f"written to {options.out}", highlight=False, soft_wrap=True)


def check_settings(strategy: str, settings: Mapping[str, Any]) -> None:
    """Checks that a strategy takes the settings, before data and weights are read.

    Args:
        strategy: name of a recipe, or path of a YAML file.
        settings: arguments of the recipe by name; None is the recipe's own default. A file is
            complete and takes none.

    Raises:
        ValueError: a setting that the strategy does not take, with those that it takes.
    """
    given = [name for name, value in settings.items() if value is not None]
    if strategy == AUTO:
        if given:
            raise ValueError(
                f"--strategy {AUTO} chooses {', '.join(map(flag, given))} itself; name a strategy "
                "to set them"
            )
        return
    if is_file(strategy):
        if given:
            raise ValueError(
                f"{strategy} sets what {', '.join(map(flag, given))} would set; edit the file "
                "instead"
            )
        return
    takes = inspect.signature(RECIPES[strategy]).parameters
    if unknown := [name for name in given if name not in takes]:
        raise ValueError(
            f"the strategy {strategy} does not take {', '.join(map(flag, unknown))}; of these "
            f"options it takes {', '.join(flag(name) for name in settings if name in takes)}"
        )


def strategy_plan(strategy: str, params: Params, settings: Mapping[str, Any]) -> TrainingPlan:
    """The plan of a recipe or a file.

    Args:
        strategy: name of a recipe, or path of a YAML file.
        params: parameters of the network, or their shapes.
        settings: arguments of the recipe by name; None is the recipe's own default. A file is
            complete and takes none.

    Raises:
        ValueError: a setting that the strategy does not take, with those that it takes; a recipe
            whose measurements are not among the settings.
        FileNotFoundError: no such file.
    """
    check_settings(strategy, settings)
    if is_file(strategy):
        return load_plan(strategy)
    recipe = RECIPES[strategy]
    given = {name: value for name, value in settings.items() if value is not None}
    parameters = inspect.signature(recipe).parameters.values()
    measured = [p.name for p in parameters if p.default is p.empty and p.name != "params"]
    if missing := [name for name in measured if name not in given]:
        raise ValueError(
            f"the strategy {strategy} measures {' and '.join(missing)} on the images first; "
            f"flaxtransfer train --strategy {strategy} does so, and prints its plan before step 0"
        )
    return recipe(params, **given)
