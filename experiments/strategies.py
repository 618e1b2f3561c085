"""Every strategy on handwritten digits, from 5 to 100 labels a class, over several draws of labels.

    python experiments/strategies.py                  # at most 45 minutes on 2 CPU cores
    python experiments/strategies.py --print-only

40 % of the digits are set apart once and for all; every strategy is tested on them and on nothing
else. Labels are drawn from the rest, differently for every seed. All strategies get the same labels
and, except for progressive unfreezing, the same number of steps; none was tuned on these digits but
the learning rate from scratch. Progressive unfreezing takes a fifth of its labels for validation.
What is frozen throughout a phase is run once and cached (8 versions of each image). Results are
appended to a file, one line each, and what is there already is not computed again.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import flaxtransfer as ft
from flaxtransfer.data import subsample
from flaxtransfer.models import flatten
from flaxtransfer.recipes import measure, most_images
from workers import append_row, compile_once, read_rows, share

TEST_FRACTION = 0.4


@dataclass(frozen=True)
class Strategies:
    """Which strategies, label counts and seeds to run.

    Args:
      labels_per_class: label counts.
      seeds: draws of labels.
      strategies: names, see STRATEGIES; by default all.
      steps: optimizer steps of every strategy of fixed length.
      phase_steps: optimizer steps of each phase of progressive unfreezing.
      batch_size: images a step.
      processes: that share the work, each on its part of the CPU cores.
      results: JSON lines.
      print_only: print the tables of what is there.
      worker: number of this process; for the script's own use.
    """

    labels_per_class: tuple[int, ...] = (5, 10, 20, 100)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    strategies: tuple[str, ...] = ()
    steps: int = 200
    phase_steps: int = 60
    batch_size: int = 32
    processes: int = 2
    results: Path = Path("runs/strategies.jsonl")
    print_only: bool = False
    worker: int | None = None


@dataclass(frozen=True)
class Setting:
    """One draw of labels, the network, and what is measured on it."""

    config: Strategies
    source: ft.data.Source
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    checkpoint: ft.Pretrained
    model: ft.Model
    variables: ft.models.Variables
    seed: int

    @property
    def feed(self) -> ft.data.DataLoaders:
        return ft.loaders(
            self.source,
            ft.data.Splits.of(self.train, self.validation),
            self.checkpoint.preprocessing,
            batch_size=self.config.batch_size,
            seed=self.seed,
        )

    def accuracy(self, network: ft.Classifier) -> float:
        held_out = ft.eval_batches(self.source, self.test, network.preprocessing)
        return ft.evaluate(network, held_out).accuracy

    def evidence(self, recipe: str) -> Mapping[str, Any]:
        """What the recipe measures on the labeled images."""
        preprocessing = self.checkpoint.preprocessing
        positions = subsample(self.train, most_images(recipe))
        batches = ft.eval_batches(self.source, positions, preprocessing)
        network = ft.Classifier(self.model, self.variables, preprocessing)
        return measure(recipe, network, batches, len(self.train)).settings

    def with_validation(self) -> Setting:
        """A fifth of the labels of each class, and one at least, validates."""
        labels = self.source.labels()[self.train]
        parts = ft.stratified_split(
            labels, val_per_class=max(1, len(labels) // 50), test_fraction=0.0, seed=self.seed
        )
        train, validation = self.train[parts.train], self.train[parts.val]
        return dataclasses.replace(self, train=train, validation=validation)


@dataclass(frozen=True)
class Strategy:
    """A recipe and what it is asked for besides the number of steps."""

    recipe: Callable[..., ft.Plan]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    validates: bool = False
    random_start: bool = False
    measures: bool = False

    def plan(self, setting: Setting) -> ft.Plan:
        config, params = setting.config, setting.variables["params"]
        lengths: dict[str, Any] = {"steps": config.steps}
        if self.recipe is ft.recipes.progressive_unfreezing:
            lengths = {"steps": config.phase_steps}
        heads = (ft.recipes.solved_head, ft.recipes.depth_head, ft.recipes.depths_head)
        if self.recipe in heads:
            lengths = {}
        if self.recipe is ft.recipes.head_then_fine_tune:
            head = config.steps // 3
            lengths = {"head_steps": head, "fine_tune_steps": config.steps - head}
        measured = setting.evidence(self.recipe.__name__) if self.measures else {}
        return self.recipe(params, **lengths, **self.settings, **measured)


def scratch(params: ft.models.Params, *, steps: int) -> ft.Plan:
    """At the rate that was best from scratch on labels of other draws (what_transfers.py)."""
    return ft.recipes.from_scratch(params, steps=steps, learning_rate=3e-3)


STRATEGIES = {
    "solved_head": Strategy(ft.recipes.solved_head),
    "depth_head": Strategy(ft.recipes.depth_head, measures=True),
    "depths_head": Strategy(ft.recipes.depths_head, measures=True),
    "feature_extraction": Strategy(ft.recipes.feature_extraction),
    "batch_norm_only": Strategy(ft.recipes.batch_norm_only),
    "batch_norm_only, running statistics": Strategy(
        ft.recipes.batch_norm_only, {"statistics": False}
    ),
    "surgical, stem and stage 1": Strategy(ft.recipes.surgical),
    "surgical, stage 4": Strategy(ft.recipes.surgical, {"part": ft.stage(4)}),
    "early_layers": Strategy(ft.recipes.early_layers),
    "progressive_unfreezing": Strategy(ft.recipes.progressive_unfreezing, validates=True),
    "head_then_fine_tune": Strategy(ft.recipes.head_then_fine_tune),
    "linear_probe_then_fine_tune": Strategy(ft.recipes.linear_probe_then_fine_tune),
    "discriminative": Strategy(ft.recipes.discriminative),
    "curvature_scaled": Strategy(ft.recipes.curvature_scaled, measures=True),
    "gradient_scaled": Strategy(ft.recipes.gradient_scaled, measures=True),
    "surgical, by gradient": Strategy(ft.recipes.surgical, measures=True),
    "l2_sp": Strategy(ft.recipes.l2_sp),
    "full_fine_tuning": Strategy(ft.recipes.full_fine_tuning),
    "high_rate_fine_tuning": Strategy(ft.recipes.high_rate_fine_tuning),
    "from_scratch": Strategy(scratch, random_start=True),
}


def run(strategy: Strategy, setting: Setting) -> dict[str, Any]:
    """One result: accuracy on the test digits, seconds, steps and trainable parameters."""
    began = time.perf_counter()
    if strategy.validates:
        setting = setting.with_validation()
    if strategy.random_start:
        random = setting.model.init(jax.random.key(setting.seed))
        setting = dataclasses.replace(setting, variables=random)
    plan = strategy.plan(setting)
    with tempfile.TemporaryDirectory() as folder:
        # Nothing but the end is evaluated where no decision hangs on it.
        every = None if strategy.validates else setting.config.steps
        fitted = ft.fit(
            ft.Classifier(setting.model, setting.variables, setting.feed.preprocessing),
            plan,
            setting.feed,
            folder,
            seed=setting.seed,
            cache=ft.Cache(),
            options=ft.FitOptions(evaluate_every=every),
        )
    return {
        "accuracy": setting.accuracy(fitted.network),
        "seconds": round(time.perf_counter() - began, 1),
        "steps": fitted.steps,
        "trainable": max(_trainable(plan, setting.variables["params"])),
        "notes": list(fitted.notes),
    }


def _trainable(plan: ft.Plan, params: ft.models.Params) -> Iterator[int]:
    sizes = {path: leaf.size for path, leaf in flatten(params).items()}
    for phase in plan.resolve(params).phases:
        moves = flatten(phase.param_groups.mask)
        yield sum(size for path, size in sizes.items() if moves[path])


def settings(config: Strategies) -> Iterator[tuple[int, int, Setting]]:
    """Label count, seed and what belongs to them; few labels first, for they are quick."""
    source, checkpoint = ft.open_source("digits"), ft.load("builtin")
    labels = source.labels()
    apart = ft.stratified_split(labels, val_fraction=0.0, test_fraction=TEST_FRACTION)
    for count, seed in itertools.product(config.labels_per_class, config.seeds):
        draw = ft.stratified_split(labels[apart.train], labels_per_class=count, seed=seed)
        network = ft.transfer(checkpoint, classes=10, seed=seed)
        model, variables = network.model, network.variables
        train, none = apart.train[draw.train], np.empty(0, np.int64)
        yield (
            count,
            seed,
            Setting(config, source, train, none, apart.test, checkpoint, model, variables, seed),
        )


def compute(config: Strategies) -> None:
    """Appends what is missing of this process' share.

    Strategies take turns between the processes, and an odd number of them swaps the turns with
    every draw: the processes then compile each program once between them, and end together.
    """
    compile_once(config.results.parent / "compiled")
    turns = itertools.cycle((None,) if config.worker is None else range(config.processes))
    for count, seed, setting in settings(config):
        for name in config.strategies or STRATEGIES:
            if next(turns) == config.worker and (name, count, seed) not in read(config.results):
                row = {"strategy": name, "labels": count, "seed": seed}
                row |= run(STRATEGIES[name], setting)
                append_row(config.results, row)


def read(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Results by strategy, label count and seed."""
    return {(row["strategy"], row["labels"], row["seed"]): row for row in read_rows(path)}


def print_tables(config: Strategies, found: dict[tuple[str, int, int], dict[str, Any]]) -> None:
    """Mean ± sd of the accuracy in percent, and the median of the seconds, in Markdown."""
    counts = config.labels_per_class
    print("| strategy | trainable | " + " | ".join(f"{n} a class" for n in counts) + " | seconds |")
    print("|---" * (3 + len(counts)) + "|")
    for name in STRATEGIES:
        rows = {n: [r for (s, m, _), r in found.items() if (s, m) == (name, n)] for n in counts}
        every = [row for seeds in rows.values() for row in seeds]
        if not every:
            continue
        cells = [f"{max(row['trainable'] for row in every):,}"]
        for seeds in rows.values():
            values = [100 * row["accuracy"] for row in seeds]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.1f} ± {spread:.1f}" if values else "")
        cells.append(f"{np.median([row['seconds'] for row in every]):.0f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def main(config: Strategies) -> None:
    """Computes what is missing and prints the table."""
    if unknown := [name for name in config.strategies if name not in STRATEGIES]:
        print(f"no strategies {unknown}; there are {list(STRATEGIES)}", file=sys.stderr)
        raise SystemExit(2)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    if config.worker is not None or (config.processes == 1 and not config.print_only):
        compute(config)
    elif not config.print_only:
        share(config.processes)
    if config.worker is None:
        print_tables(config, read(config.results))


if __name__ == "__main__":
    main(tyro.cli(Strategies))
