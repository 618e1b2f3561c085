"""``flaxtransfer params``: the parameter table of a network, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optax
from rich.console import Console

from flaxtransfer.batchnorm import policy
from flaxtransfer.commands.subcommands import RATES, Params, named_values, rate_problems
from flaxtransfer.groups import FROZEN, Frozen, Group, trainable_mask
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import parse
from flaxtransfer.models.registry import named, resnet
from flaxtransfer.optimizers import layerwise_decay
from flaxtransfer.overview import parameter_table


def params(options: Params, console: Console) -> None:
    """Runs ``flaxtransfer params``."""
    config = replace(named(options.model, "--model"), classes=options.classes)
    if options.width is not None:
        config = replace(config, width=options.width)
    variables = resnet(config).abstract()
    labels, groups = _labels_and_groups(options, variables["params"])
    norm = policy(variables["params"], trainable_mask(labels, groups))
    console.print(parameter_table(variables, labels, groups, norm))


def _labels_and_groups(
    options: Params, parameters: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Group | Frozen]]:
    rates = {name: float(text) for name, text in named_values(options.rates).items()}
    if options.layerwise_decay is not None:
        group = Group(optax.adamw, rates.get("all", 1e-3), options.weight_decay)
        return layerwise_decay(parameters, group, options.layerwise_decay)
    rules = named_values(options.rules)
    masks = {name: rest() if text == "rest()" else parse(text) for name, text in rules.items()}
    groups = {
        name: Group(optax.adamw, rates[name], options.weight_decay) if name in rates else FROZEN
        for name in rules
    }
    problems = [] if options.rates == RATES else list(rate_problems(rates, rules))
    try:
        labels = label(parameters, masks)
    except ValueError as error:
        given = ", ".join(f"{name}={text}" for name, text in rules.items())
        problems.insert(0, f"{error}\nthe rules are {given}")
    if problems:
        raise ValueError("; ".join(problems))
    return labels, groups
