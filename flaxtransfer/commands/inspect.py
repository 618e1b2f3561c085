"""``flaxtransfer stem``, ``models``, ``params``: files, networks and groups, without training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optax
from rich.console import Console
from rich.table import Table

from flaxtransfer.analysis.stem import stem_report
from flaxtransfer.batchnorm import policy
from flaxtransfer.commands.subcommands import (
    RATES,
    Models,
    Params,
    Stem,
    named_values,
    rate_problems,
)
from flaxtransfer.groups import FROZEN, Frozen, Group, trainable_mask
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import parse
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES, costs, named, resnet
from flaxtransfer.optimizers import layerwise_decay
from flaxtransfer.overview import parameter_table
from flaxtransfer.paths import flatten, match, suggest
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.weights.loading import load


def stem(options: Stem, console: Console) -> None:
    """Runs ``flaxtransfer stem``."""
    run = Path(options.source)
    checkpoint = load(weights_of(run) if run.is_dir() else options.source, model=options.model)
    params = checkpoint.variables["params"]
    kernel = flatten(params)[checkpoint.config.first_kernel]
    before, after = stem_report(kernel), None
    console.print(before)
    if "adapter" in params:
        after = stem_report(kernel, params["adapter"]["kernel"])
        console.print(after)
        if "curves" in params["adapter"]:
            console.print("only the linear part of the adapter is shown, without its tone curves")
    if options.out is not None:
        from flaxtransfer.report.figures import plot_stem

        plot_stem(options.out, kernel, before, after)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)


def models(options: Models, console: Console) -> None:
    """Runs ``flaxtransfer models``."""
    rows, unfit = [], []
    for name, config in _chosen(options.names).items():
        parameters = costs(config, 32).parameters
        try:
            macs: int | None = costs(config, options.size).multiply_adds
        except ValueError as error:
            macs = None
            unfit.append(str(error))
        rows.append((name, parameters, macs, config.features))
    if options.sort == "name":
        rows.sort(key=lambda row: _natural(row[0]))
    elif options.sort != "family":
        by = 1 if options.sort == "parameters" else 2
        rows.sort(key=lambda row: row[by] or 0)

    table = Table("name", "parameters (M)", "GMAC", "features")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, parameters, macs, features in rows:
        cost = "–" if macs is None else f"{macs / 1e9:,.3f}"
        table.add_row(name, f"{parameters / 1e6:,.2f}", cost, str(features))
    console.print(table)
    console.print(
        f"{len(rows)} of {len(ARCHITECTURES)} names, with heads of 1000 classes. GMAC: 10^9 "
        f"multiply-adds for one image of {options.size} px; FLOPs are twice that. features: inputs "
        "of the head.",
        highlight=False,
    )
    if unfit:
        console.print(f"–  {unfit[0]}", highlight=False)


def _chosen(names: str) -> dict[str, ResNetConfig]:
    pattern = names if set(names) & set("*?[{") else f"*{names}*"
    if found := {name: c for name, c in ARCHITECTURES.items() if match(pattern, name)}:
        return found
    raise ValueError(
        f"no architecture is called {names!r}{suggest(names.strip('*?'), ARCHITECTURES)}; "
        '"flaxtransfer models" lists them all'
    )


def _natural(name: str) -> list[tuple[str, int]]:
    """Numbers by their size: resnet18 before resnet101."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


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
