"""``flaxtransfer stem``, ``models``, ``params``, ``compile``, ``convert``: without images."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from flaxtransfer.analysis.stem import stem_report
from flaxtransfer.batchnorm import policy
from flaxtransfer.commands.job import load_weights, strategy_plan
from flaxtransfer.commands.subcommands import (
    RATES,
    Compile,
    Convert,
    Models,
    Params,
    Stem,
    named_values,
    rate_problems,
)
from flaxtransfer.groups import FROZEN, Frozen, Group, trainable_mask
from flaxtransfer.labels import label, rest
from flaxtransfer.mask_algebra import matches_glob
from flaxtransfer.masks import parse
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES, costs, named, resnet
from flaxtransfer.optimizers import layerwise_decay
from flaxtransfer.overview import parameter_table, plain
from flaxtransfer.paths import flatten, shortened, suggest
from flaxtransfer.sharding import make_mesh, memory_of, topology_mesh
from flaxtransfer.training.prefix_cache import bytes_text
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.training.step import StepCost, step_cost
from flaxtransfer.weights.exports.exporting import export
from flaxtransfer.weights.loading import described, load, locate
from flaxtransfer.weights.locations import BUILTIN_PREFIX, HUB_PREFIX
from flaxtransfer.weights.naming.native import candidates
from flaxtransfer.weights.pretrained import Pretrained, fold_adapter
from flaxtransfer.weights.readers.detect import SUFFIXES, Listing, has_weights_name, list_arrays
from flaxtransfer.weights.readers.folders import find, weights_in


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
    """Runs ``flaxtransfer models``: of a file, what it holds; otherwise the architectures."""
    if _names_file(options.names):
        _inspect(options, console)
    else:
        _list(options, console)


def _names_file(text: str) -> bool:
    """Whether a word is the place of weights, and no part of the name of an architecture."""
    address = text.startswith((BUILTIN_PREFIX, HUB_PREFIX, "https://", "http://"))
    return address or os.sep in text or has_weights_name(text) or Path(text).exists()


_ROWS, _TRIED = 12, 8
"""The most parts of a file that are listed, and the most networks that are tried."""


def _inspect(options: Models, console: Console) -> None:
    """Prints how a file is built, the networks in it, and what ``load`` makes of it."""
    name, path, _ = locate(options.names)
    if path.is_dir() and not _inspect_folder(path, console):
        return
    listing = list_arrays(path)
    kinds = Counter(array.dtype.name for array in listing.arrays.values())
    counted = ", ".join(f"{count:,} of {kind}" for kind, count in kinds.items())
    facts = [
        ("file", str(listing.path) if path.is_dir() else name),
        ("container", f"{listing.container}, {listing.size:,} bytes"),
        ("arrays", f"{len(listing.arrays):,}: {counted}" if counted else "none"),
        *(("", note) for note in listing.notes),
    ]
    _print_facts(facts, console)
    console.print(_parts_of(listing))
    found = candidates(listing.arrays)
    taken = _tried(listing.path, options.weights_key, options.model)
    if len(found) > 1:
        console.print(_networks(listing.path, found, options, taken))
    _print_facts(_outcome(taken, found, options), console)


def _inspect_folder(folder: Path, console: Console) -> bool:
    """Lists the checkpoints of a folder; whether one of them is taken."""
    names = weights_in(folder, SUFFIXES)
    if len(names) > 1:
        table = Table("checkpoints in the folder", "bytes")
        table.columns[1].justify = "right"
        for name in names[:_ROWS]:
            table.add_row(name, f"{(folder / name).stat().st_size:,}")
        console.print(table)
        if len(names) > _ROWS:
            console.print(f"and {len(names) - _ROWS} more", highlight=False)
    try:
        find(folder, SUFFIXES)
    except FileNotFoundError:
        if not names:
            raise
        told = f"no name says which is meant; one is flaxtransfer models {folder / names[-1]}"
        console.print(told, highlight=False, overflow="fold")
        return False
    return True


def _parts_of(listing: Listing) -> Table:
    """The arrays by the first names of their keys: containers, or modules."""
    groups: dict[str, list[str]] = {}
    for key in listing.arrays:
        groups.setdefault(key.split("/" if "/" in key else ".")[0], []).append(key)
    table = Table("part", "arrays", "numbers", "such as")
    for column in table.columns[1:3]:
        column.justify = "right"
    for part, keys in list(groups.items())[:_ROWS]:
        numbers = sum(math.prod(listing.arrays[key].shape) for key in keys)
        inner = keys[0].removeprefix(part).lstrip("/.")
        such = f"{shortened(inner or part, 40)} {list(listing.arrays[keys[0]].shape)}"
        table.add_row(shortened(part, 30), f"{len(keys):,}", f"{numbers:,}", such)
    if len(groups) > _ROWS:
        table.add_row(f"and {len(groups) - _ROWS} more", "", "", "")
    return table


def _tried(path: Path, key: str | None, model: str | None) -> Pretrained | str:
    """What ``load`` makes of a file, or why it refuses."""
    try:
        return load(path, key=key, model=model)
    except (ValueError, FileNotFoundError) as error:
        return " ".join(str(error).split()).removeprefix(str(path)).lstrip(": ")


def _networks(
    path: Path, found: Mapping[str, int], options: Models, taken: Pretrained | str
) -> Table:
    """The networks of a file that holds several, each as it would be loaded."""
    table = Table("--weights-key", "arrays", "network", "")
    table.columns[1].justify = "right"
    for place, count in list(found.items())[:_TRIED]:
        tried = _tried(path, place, options.model)
        if isinstance(tried, str):
            table.add_row(place, f"{count:,}", shortened(tried, 100), "")
            continue
        head = "no head" if tried.no_head else f"{tried.config.classes} classes"
        same = not isinstance(taken, str) and _same(tried, taken)
        table.add_row(place, f"{count:,}", f"{tried.config.name}, {head}", "taken" * same)
    if len(found) > _TRIED:
        table.add_row(f"and {len(found) - _TRIED} more", "", "", "")
    return table


def _same(ours: Pretrained, theirs: Pretrained) -> bool:
    ours_leaves, leaves = flatten(ours.variables), flatten(theirs.variables)
    return ours_leaves.keys() == leaves.keys() and all(
        np.array_equal(ours_leaves[path], leaves[path]) for path in leaves
    )


def _outcome(
    taken: Pretrained | str, found: Mapping[str, int], options: Models
) -> list[tuple[str, str]]:
    """What is taken, with everything that is said of it; or why nothing is."""
    if isinstance(taken, str):
        facts = [("cannot be loaded", taken)]
    else:
        config, pre = taken.config, taken.preprocessing
        leaves = sum(np.size(leaf) for leaf in flatten(taken.variables["params"]).values())
        names = ", ".join(taken.class_names or ())
        head = taken.no_head or f"{config.features} features to {config.classes} classes" + (
            f": {shortened(names, 200)}" if names else ", without names"
        )
        single = taken.task.name == "single_label"  # Most files do not say it.
        task = "" if single else f"; task {taken.task.name}"
        means, deviations = (
            ", ".join(f"{number:.4g}" for number in numbers[:4]) + (", ..." if numbers[4:] else "")
            for numbers in (pre.mean, pre.std)
        )
        facts = [
            ("network", f"{config.name}: {described(config)}"),
            ("parameters", f"{leaves:,}, under the names of {taken.format}"),
            ("head", f"none: {head}" if taken.no_head else head + task),
            (
                "images",
                f"{config.bands} channels, {pre.size} px, from a shorter side of {pre.resize} px "
                f"({pre.interpolation}); mean {means}; deviation {deviations}",
            ),
            *(("note" if number == 0 else "", text) for number, text in enumerate(taken.notes)),
        ]
    place = f", under {next(iter(found))!r}" if len(found) == 1 and "." not in found else ""
    count = f"{len(found)} found{place}" if found else "none found by their keys"
    choice = "; choose with --weights-key" if len(found) > 1 else ""
    return [("networks", count + choice), *facts]


def _print_facts(facts: list[tuple[str, str]], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(name, plain(text))
    console.print(table, highlight=False)


def _list(options: Models, console: Console) -> None:
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
    if found := {name: c for name, c in ARCHITECTURES.items() if matches_glob(pattern, name)}:
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


def compile(options: Compile, console: Console) -> None:
    """Runs ``flaxtransfer compile``."""
    config = replace(named(options.model, "--model"), classes=options.classes)
    config = replace(config, in_channels=options.bands)
    mesh = make_mesh() if options.topology is None else topology_mesh(options.topology)
    model = resnet(config, dtype=options.compute)
    plan = strategy_plan(options.strategy, model.abstract()["params"], {})
    trained = [phase for phase in plan.phases if phase.steps]
    if not trained:
        raise ValueError(f"--strategy {options.strategy} trains no step: its head is solved")
    if options.batch_size % mesh.size:
        raise ValueError(
            f"--batch-size must be a multiple of the {mesh.size} devices, got {options.batch_size}"
        )
    above = None if options.shard_above_mb is None else 1e6 * options.shard_above_mb
    image, memory = (options.size, options.size, options.bands), memory_of(mesh)
    console.print(
        f"{options.model}, {options.compute}; {mesh.size} x {mesh.devices.flat[0].device_kind}"
        f"{'' if memory is None else f' with {bytes_text(memory)}'}, "
        f"{options.batch_size // mesh.size:,} images of {options.size} px each"
    )
    table = Table("phase", "memory", "activations", "GFLOP", "traffic", "exchanges")
    for phase in trained:
        with console.status(f"compiling {phase.name}"):
            cost = step_cost(model, phase, mesh, options.batch_size, image, above)
        table.add_row(phase.name, *_cost_cells(cost))
    for column in table.columns[1:5]:
        column.justify = "right"
    console.print(table)
    console.print("per device and step, without a cache of frozen segments", highlight=False)


def _cost_cells(cost: StepCost) -> tuple[str, ...]:
    exchanges = ", ".join(f"{count} {kind}" for kind, count in cost.collectives.items())
    share = "" if cost.capacity is None else f" {cost.memory / cost.capacity:.0%}"
    billions = cost.flops / 1e9
    return (
        bytes_text(cost.memory) + share,
        bytes_text(cost.temporary),
        f"{billions:,.0f}" if billions >= 100 else f"{billions:.3g}",
        bytes_text(cost.traffic),
        exchanges or "none",
    )


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


def convert(options: Convert, console: Console) -> None:
    """Runs ``flaxtransfer convert``."""
    checkpoint = load_weights(options.source, options)
    plain = options.to in (None, "safetensors") and options.target.suffix == ".safetensors"
    if plain and options.adapter == "fold":
        try:
            checkpoint = fold_adapter(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{options.source}: {error}; --adapter keep writes it as it is"
            ) from error
    written = export(checkpoint, options.target, to=options.to, dtype=np.dtype(options.dtype))
    console.print(f"{checkpoint!r}\n{written}", highlight=False, soft_wrap=True)
