"""What the built-in checkpoint is worth, from 1 to 100 digits a class, against its controls.

    python experiments/what_transfers.py --tune --seeds 10 --labels-per-class 1 5 20 100
    python experiments/what_transfers.py           # then the table, about an hour on 2 CPU cores
    python experiments/what_transfers.py --print-only

40 % of the digits are set apart once and for all; every method is tested on them and on nothing
else. Labels are drawn from the other 60 %, the pool, differently for every seed; the learning rate
from scratch is chosen on what a draw leaves of the pool. Results are appended to a file, one line
each, and what is there already is not computed again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import tyro
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

import flaxtransfer as ft
from flaxtransfer.weights import normalize

TEST_FRACTION = 0.4


@dataclass(frozen=True)
class WhatTransfers:
    """Which label counts, methods and seeds to run.

    Args:
      labels_per_class: label counts.
      methods: of "raw pixels", "random features", "features", "fine-tuned" and "scratch".
      seeds: draws of labels.
      steps: optimizer steps of fine-tuning (a third for the head alone) and from scratch.
      scratch_learning_rates: candidates for AdamW from scratch; the best of them on the pool, at
        the nearest label count that was tried, is the one whose test accuracy counts.
      tune: try those candidates and nothing else; give seeds of their own.
      results: JSON lines.
      print_only: print the table of what is there.
    """

    labels_per_class: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    methods: tuple[str, ...] = (
        "raw pixels",
        "random features",
        "features",
        "fine-tuned",
        "scratch",
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 300
    scratch_learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tune: bool = False
    results: Path = Path("runs/what_transfers.jsonl")
    print_only: bool = False


@dataclass(frozen=True)
class Setting:
    """The labels of one draw, where they are judged, and the networks that are compared."""

    source: ft.data.Source
    labeled: np.ndarray
    judged: np.ndarray
    checkpoint: ft.Pretrained
    seed: int
    config: WhatTransfers
    model: ft.Model = field(init=False)
    pretrained: ft.models.Variables = field(init=False)
    random: ft.models.Variables = field(init=False)

    def __post_init__(self) -> None:
        network = ft.transfer(self.checkpoint, classes=10, seed=self.seed)
        model, variables = network.model, network.variables
        random = ft.resnet(model.config).init(jax.random.key(self.seed))
        for name, value in (("model", model), ("pretrained", variables), ("random", random)):
            object.__setattr__(self, name, value)

    def fit(self, start: ft.models.Variables, plan: ft.Plan) -> float:
        """Accuracy after training on the labels of this setting."""
        preprocessing, none = self.checkpoint.preprocessing, np.empty(0, np.int64)
        feed = ft.loaders(
            self.source,
            ft.data.Splits.of(self.labeled, none),
            preprocessing,
            batch_size=64,
            seed=self.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            options = ft.FitOptions(evaluate_every=self.config.steps)
            fitted = ft.fit(
                ft.Classifier(self.model, start, feed.preprocessing),
                plan,
                feed,
                folder,
                seed=self.seed,
                options=options,
            )
        judged = ft.eval_batches(self.source, self.judged, preprocessing)
        return ft.evaluate(
            ft.Classifier(self.model, fitted.variables, preprocessing), judged
        ).accuracy

    def fit_scratch(self, learning_rate: float) -> float:
        """Accuracy of the same network from random weights."""
        params, steps = self.random["params"], self.config.steps
        return self.fit(
            self.random, ft.recipes.from_scratch(params, steps=steps, learning_rate=learning_rate)
        )

    def probe(self, features: Callable[[np.ndarray], np.ndarray]) -> float:
        """Accuracy of logistic regression on standardized features."""
        train, test = (
            [features(self.images(part)), self.source.labels()[part]]
            for part in (self.labeled, self.judged)
        )
        scaler = StandardScaler().fit(train[0])
        model = LogisticRegression(C=0.1, max_iter=2000)
        with threadpool_limits(1):  # BLAS threads that wait for one another take ten times as long.
            model.fit(scaler.transform(train[0]), train[1])
        return float(model.score(scaler.transform(test[0]), test[1]))

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Prepared uint8 images [examples, size, size, 3]."""
        batches = ft.eval_batches(self.source, positions, self.checkpoint.preprocessing)
        kept = [batch["image"][batch["weight"] > 0] for batch in batches]
        return np.concatenate(kept)

    def network_features(
        self, variables: ft.models.Variables
    ) -> Callable[[np.ndarray], np.ndarray]:
        """Pooled features of a network with running statistics."""
        preprocessing = self.checkpoint.preprocessing

        @jax.jit
        def pooled(images: jax.Array) -> jax.Array:
            normal = normalize(images, preprocessing.mean, preprocessing.std)
            return self.model.apply(variables, normal, stop="head")[0]

        return lambda images: np.concatenate(
            [np.asarray(pooled(part)) for part in np.array_split(images, -(-len(images) // 256))]
        )


def raw_pixels(setting: Setting) -> float:
    return setting.probe(lambda images: images[:, 3::6, 3::6, 0].reshape(len(images), -1) / 255)


def random_features(setting: Setting) -> float:
    return setting.probe(setting.network_features(setting.random))


def features(setting: Setting) -> float:
    return setting.probe(setting.network_features(setting.pretrained))


def fine_tuned(setting: Setting) -> float:
    head = setting.config.steps // 3
    plan = ft.recipes.head_then_fine_tune(
        setting.pretrained["params"], head_steps=head, fine_tune_steps=setting.config.steps - head
    )
    return setting.fit(setting.pretrained, plan)


def scratch(setting: Setting) -> float:
    return setting.fit_scratch(best_rate(setting.config, len(setting.labeled) // 10))


METHODS: dict[str, Callable[[Setting], float]] = {
    "raw pixels": raw_pixels,
    "random features": random_features,
    "features": features,
    "fine-tuned": fine_tuned,
    "scratch": scratch,
}


def tuning_row(rate: float) -> str:
    """What a candidate's accuracy on the pool is called in the results."""
    return f"scratch at {rate:g}, pool"


def best_rate(config: WhatTransfers, count: int) -> float:
    """The rate from scratch that was best on the pool, at the nearest label count tried."""
    found = read(config.results)
    names = {tuning_row(rate): rate for rate in config.scratch_learning_rates}
    tried = {c for m, c, _ in found if m in names}
    if not tried:
        raise SystemExit("no learning rate from scratch was tried yet; run with --tune first")
    nearest = min(sorted(tried), key=lambda other: abs(np.log(other / count)))
    means = {
        rate: np.mean([v for (m, c, _), v in found.items() if (m, c) == (name, nearest)])
        for name, rate in names.items()
        if any((m, c) == (name, nearest) for m, c, _ in found)
    }
    return max(means, key=lambda rate: means[rate])


def main(config: WhatTransfers) -> None:
    """Computes what is missing and prints the table."""
    config.results.parent.mkdir(parents=True, exist_ok=True)
    source, checkpoint = ft.open_source("digits"), ft.load("builtin")
    labels = source.labels()
    apart = ft.stratified_split(labels, val_fraction=0.0, test_fraction=TEST_FRACTION)
    pool = apart.train
    for seed in () if config.print_only else config.seeds:
        for count in config.labels_per_class:
            draw = ft.stratified_split(labels[pool], labels_per_class=count, seed=seed)
            judged = pool[draw.test] if config.tune else apart.test
            setting = Setting(source, pool[draw.train], judged, checkpoint, seed, config)
            for name, run in work(config).items():
                if (name, count, seed) not in read(config.results):
                    row = {"method": name, "labels": count, "seed": seed, "accuracy": run(setting)}
                    with config.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print_table(config, read(config.results))


def work(config: WhatTransfers) -> dict[str, Callable[[Setting], float]]:
    """What is to be computed for every setting, by the name of its row in the results."""
    if not config.tune:
        return {name: METHODS[name] for name in config.methods}
    return {
        tuning_row(rate): lambda setting, rate=rate: setting.fit_scratch(rate)
        for rate in config.scratch_learning_rates
    }


def read(path: Path) -> dict[tuple[str, int, int], float]:
    """Accuracy by method, label count and seed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["method"], row["labels"], row["seed"]): row["accuracy"] for row in rows}


def print_table(config: WhatTransfers, found: dict[tuple[str, int, int], float]) -> None:
    """Mean ± sd in percent over the seeds there are, as a table in Markdown."""
    columns = tuple(work(config))
    print("| digits a class | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for count in config.labels_per_class:
        cells = []
        for name in columns:
            values = [100 * v for (m, c, _), v in found.items() if (m, c) == (name, count)]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.1f} ± {spread:.1f}" if values else "")
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(WhatTransfers))
