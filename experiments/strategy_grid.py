"""What each strategy gains over the head that costs nothing, on generated targets.

    python experiments/strategy_grid.py --per-class 20 --seeds 0    # 25 minutes on 2 busy cores
    python experiments/strategy_grid.py --print-only
    python experiments/strategy_grid.py --print-only --gains flaxtransfer/advice/gains.json

Every target of targets.py is advised on, and each strategy is trained on the same labels and tested
on the same 600 images and more. Results are appended to a file, one line each, and what is there
already is not computed again. `--gains` writes the mean gain of each strategy by what the advice
said, which is what the race of `--strategy auto` begins with. With `--without` a family is left
out, so that its own results do not judge it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import flaxtransfer as ft
import targets

TEST_IMAGES = 600

TRAINED: dict[str, dict[str, Any]] = {
    "feature_extraction": {},
    "linear_probe_then_fine_tune": {},
    "discriminative": {},
    "full_fine_tuning": {},
    "high_rate_fine_tuning": {},
    "early_layers": {},
    "batch_norm_only": {},
    "surgical": {"part": "stage(4)"},
    "from_scratch": {"learning_rate": 3e-3},
}
"""Strategies that take steps, and their settings."""


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moves an image by up to two whole pixels, repeating its border.

    The usual augmentation is not for these targets: a mirrored grating is of another class, and
    what is as fine as the pixels does not survive a rotation.
    """
    top, left = rng.integers(0, 5, 2)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    return padded[top : top + targets.SIZE, left : left + targets.SIZE]


shifted.random = True  # declared: a cache of activations then has several versions of each image


@dataclass(frozen=True)
class Grid:
    """Which targets, label counts, seeds and strategies.

    Args:
        families: targets; by default all but random labels.
        per_class: label counts per class.
        seeds: draws of images and labels.
        steps: of every strategy that is trained.
        batch_size: images per step.
        results: JSON lines.
        print_only: print the table of what is there.
        gains: write the table of gains to this file.
        without: a family that the gains leave out.
    """

    families: tuple[str, ...] = tuple(name for name in targets.FAMILIES if name != "random labels")
    per_class: tuple[int, ...] = (20,)
    seeds: tuple[int, ...] = (0,)
    steps: int = 300
    batch_size: int = 32
    results: Path = Path("strategy_grid.jsonl")
    print_only: bool = False
    gains: Path | None = None
    without: str | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """A target with its labels: what strategies are compared on."""

    family: str
    per_class: int
    seed: int
    network: ft.Classifier
    source: ft.ArraySource
    splits: ft.data.Splits = field(repr=False)

    @classmethod
    def of(cls, family: str, per_class: int, seed: int) -> Cell:
        train = targets.draw(family, per_class, seed)
        tests = -(-TEST_IMAGES // train.classes)
        test = targets.draw(family, tests, seed, test=True)
        images = np.concatenate([train.images, test.images])
        names = [f"class {n}" for n in range(train.classes)]
        source = ft.ArraySource(images, np.concatenate([train.labels, test.labels]), names)
        count = len(train.images)
        splits = ft.data.Splits.of(np.arange(count), (), np.arange(count, len(images)))
        found = ft.load("builtin")
        preprocessing = dataclasses.replace(
            found.preprocessing, size=targets.SIZE, resize=targets.SIZE
        )
        network = ft.transfer(
            dataclasses.replace(found, preprocessing=preprocessing),
            classes=train.classes,
            class_names=names,
            seed=seed,
        )
        return cls(family, per_class, seed, network, source, splits)

    def accuracy(self, plan: ft.Plan, network: ft.Classifier, batch_size: int) -> float:
        """Trains and tests."""
        data = ft.loaders(
            self.source,
            self.splits,
            network.preprocessing,
            batch_size=batch_size,
            transform=shifted,
            seed=self.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            fitted = ft.fit(network, plan, data, folder, seed=self.seed, cache=ft.Cache())
        tests = ft.eval_batches(self.source, self.splits.test, network.preprocessing)
        return ft.evaluate(fitted.network, tests).accuracy


def rows(config: Grid, done: set[tuple[str, int, int, str]]) -> Iterator[dict[str, Any]]:
    """Results that are not there yet."""
    for seed in config.seeds:
        for count in config.per_class:
            for family in config.families:
                wanted = ["advice", "depth_head", "solved_head", *TRAINED]
                missing = [w for w in wanted if (family, count, seed, w) not in done]
                if not missing:
                    continue
                cell = Cell.of(family, count, seed)
                advice = ft.advise(cell.network, cell.source, cell.splits.train, seed=seed)
                for name in missing:
                    yield result(config, cell, advice, name)


def result(config: Grid, cell: Cell, advice: ft.advice.Advice, name: str) -> dict[str, Any]:
    """One line of the file."""
    began = time.perf_counter()
    row = {"family": cell.family, "per_class": cell.per_class, "seed": cell.seed, "what": name}
    params, network = cell.network.params, cell.network
    if name == "advice":  # What it recommends has a row of its own.
        content = advice.to_json()
        recommended = None if advice.best is None else advice.best.strategy
        row |= {"recommended": recommended, "verdict": content["verdict"]}
        return row | {"evidence": content["evidence"]}
    if name in ("depth_head", "solved_head"):
        settings = {"segment": advice.evidence.best.name} if name == "depth_head" else {}
        plan = ft.recipes.RECIPES[name](params, **settings)
    else:
        plan = ft.recipes.RECIPES[name](params, steps=config.steps, **TRAINED[name])
    if name == "from_scratch":
        network = network.with_variables(network.model.init(jax.random.key(cell.seed)))
    accuracy = cell.accuracy(plan, network, config.batch_size)
    return row | {"accuracy": accuracy, "seconds": round(time.perf_counter() - began, 1)}


def table(found: list[dict[str, Any]]) -> None:
    """Accuracies by cell and strategy, and the regret of always taking one."""
    cells: dict[tuple[str, int, int], dict[str, float]] = {}
    verdicts, recommended = {}, {}
    for row in found:
        key = (row["family"], row["per_class"], row["seed"])
        if row["what"] == "advice":
            verdicts[key], recommended[key] = row["verdict"], row["recommended"]
        else:
            cells.setdefault(key, {})[row["what"]] = row["accuracy"]
    for key, strategy in recommended.items():
        if strategy in cells.get(key, {}):
            cells[key]["advice"] = cells[key][strategy]
    names = ["advice", "depth_head", "solved_head", *TRAINED]
    print(f"{'target':<22} {'n':>3} {'seed':>4} {'verdict':<8}", *(f"{n[:9]:>9}" for n in names))
    regrets: dict[str, list[float]] = {name: [] for name in names}
    for key, accuracies in sorted(cells.items()):
        numbers = [accuracies.get(name) for name in names]
        shown = [f"{100 * n:>9.1f}" if n is not None else f"{'':>9}" for n in numbers]
        print(f"{key[0]:<22} {key[1]:>3} {key[2]:>4} {verdicts.get(key, ''):<8}", *shown)
        if None not in numbers:
            best = max(accuracies[name] for name in names[1:])
            for name in names:
                regrets[name].append(best - accuracies[name])
    for title, number in (("mean regret", np.mean), ("95th percentile", _percentile)):
        shown = [f"{100 * number(r):>9.1f}" if r else f"{'':>9}" for r in regrets.values()]
        print(f"{title:<40}", *shown)


def _percentile(values: list[float]) -> float:
    return float(np.percentile(values, 95))


def gains(found: list[dict[str, Any]], without: str | None) -> dict[str, Any]:
    """Mean and deviation of each strategy's gain over the depth head, by verdict and in all."""
    cells: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in found:
        if row["family"] != without:
            key = (row["family"], row["per_class"], row["seed"])
            cells.setdefault(key, {})[row["what"]] = row
    by_verdict: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for cell in cells.values():
        if not {"advice", "depth_head"} <= set(cell):
            continue
        for verdict in (cell["advice"]["verdict"], "all"):
            rows = by_verdict.setdefault(verdict, {})
            for name in TRAINED:
                if name in cell:
                    gain = cell[name]["accuracy"] - cell["depth_head"]["accuracy"]
                    rows.setdefault(name, []).append((cell[name]["family"], gain))
    return {
        verdict: {
            name: {
                "mean": round(float(np.mean([gain for _, gain in pairs])), 4),
                "deviation": round(float(np.std([gain for _, gain in pairs])), 4),
                "targets": len({family for family, _ in pairs}),
                "cells": len(pairs),
            }
            for name, pairs in sorted(rows.items())
        }
        for verdict, rows in sorted(by_verdict.items())
    }


def main(config: Grid) -> None:
    """Computes what is missing, and prints what there is."""
    found = []
    if config.results.exists():
        found = [json.loads(line) for line in config.results.read_text().splitlines()]
    if not config.print_only:
        done = {(row["family"], row["per_class"], row["seed"], row["what"]) for row in found}
        for row in rows(config, done):
            with config.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            found.append(row)
            print(row["family"], row["per_class"], row["seed"], row["what"], row.get("accuracy"))
    table(found)
    if config.gains is not None:
        content = {
            "made_by": "experiments/strategy_grid.py",
            "network": ft.load("builtin").config.name,
            "gains": gains(found, config.without),
        }
        config.gains.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Grid))
