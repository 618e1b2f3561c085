"""The main job as a script: the built-in network learns handwritten digits from a few labels.

    python experiments/digits.py --seeds 5

Expected on 2 CPU cores: see experiments/results/digits.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

import flaxtransfer as ft


@dataclass(frozen=True)
class Digits:
    """Labels, schedule and how often to repeat with other labels."""

    labels_per_class: int = 5
    seeds: int = 1
    head_steps: int = 100
    fine_tune_steps: int = 200
    head_learning_rate: float = 3e-3
    learning_rate: float = 3e-4
    scratch_learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    batch_size: int = 64
    runs: Path = Path("runs/digits")


def group(config: Digits, peak: float, steps: int) -> ft.Group:
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)
    return ft.Group(optax.adamw, schedule, weight_decay=config.weight_decay)


def adapt(config: Digits, seed: int) -> dict[str, float]:
    checkpoint = ft.load("builtin")
    network = ft.transfer(checkpoint, classes=10, seed=seed)
    model, variables = network.model, network.variables
    params = variables["params"]
    source = ft.open_source("digits")
    splits = ft.stratified_split(
        source.labels(), labels_per_class=config.labels_per_class, seed=seed
    )
    feed = ft.loaders(
        source,
        splits,
        checkpoint.preprocessing,
        batch_size=config.batch_size,
        seed=seed,
    )

    labels = ft.label(params, {"new": ft.head(), "old": ft.everything() - ft.head()})
    first, second = config.head_steps, config.fine_tune_steps
    head_first = ft.Phase(
        labels,
        {"new": group(config, config.head_learning_rate, first), "old": ft.FROZEN},
        steps=first,
        name="head",
    )
    rate = group(config, config.learning_rate, second)
    then_all = ft.Phase(labels, {"new": rate, "old": rate}, steps=second, name="all", clip=1.0)
    from_scratch = ft.recipes.from_scratch(
        params,
        steps=first + second,
        learning_rate=config.scratch_learning_rate,
        weight_decay=config.weight_decay,
    )
    random = ft.resnet(model.config).init(jax.random.key(seed), (48, 48, 3))

    accuracy = {}
    for name, start, plan in (
        ("pre-trained", variables, ft.Plan([head_first, then_all])),
        ("from scratch", random, from_scratch),
    ):
        folder = config.runs / f"{name.replace(' ', '_')}-{config.labels_per_class}-{seed}"
        fitted = ft.fit(
            ft.Classifier(model, start, feed.preprocessing),
            plan,
            feed,
            folder,
            seed=seed,
            resume=True,
        )
        test = ft.eval_batches(source, splits.test, checkpoint.preprocessing)
        result = ft.evaluate(ft.Classifier(model, fitted.variables, checkpoint.preprocessing), test)
        accuracy[name] = result.accuracy
    return accuracy


def main(config: Digits) -> None:
    found = [adapt(config, seed) for seed in range(config.seeds)]
    for name in found[0]:
        percent = 100 * np.array([accuracy[name] for accuracy in found])
        print(
            f"{name}: {percent.mean():.2f} ± {percent.std(ddof=min(1, len(percent) - 1)):.2f} % "
            f"over {len(percent)} seeds ({', '.join(f'{p:.1f}' for p in percent)})"
        )


if __name__ == "__main__":
    main(tyro.cli(Digits))
