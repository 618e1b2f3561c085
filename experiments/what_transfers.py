"""What the built-in checkpoint is worth, from 1 to 100 digits a class, against its controls.

    python experiments/what_transfers.py            # about an hour on 2 CPU cores; resumes
    python experiments/what_transfers.py --print-only

Every method sees the same labels of a seed and is tested on the same 40 % of the digits, which no
label ever comes from. Results are appended to a file, one line each, and what is there already is
not computed again.
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

import flaxtransfer as ft
from flaxtransfer.data import normalise

TEST_FRACTION = 0.4


@dataclass(frozen=True)
class WhatTransfers:
    """Which label counts, methods and seeds to run.

    Args:
      labels_per_class: label counts.
      methods: of "raw pixels", "random features", "features", "fine-tuned" and "scratch".
      seeds: draws of labels, starting at 0.
      steps: optimizer steps of fine-tuning (a third for the head alone) and from scratch.
      scratch_learning_rate: of AdamW from scratch; see BUILD_NOTES.md for how it was chosen.
      results: JSON lines.
      print_only: print the table of what is there.
    """

    labels_per_class: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    methods: tuple[str, ...] = (
        "raw pixels", "random features", "features", "fine-tuned", "scratch"
    )  # fmt: skip
    seeds: int = 5
    steps: int = 300
    scratch_learning_rate: float = 3e-3
    results: Path = Path("runs/what_transfers.jsonl")
    print_only: bool = False


@dataclass(frozen=True)
class Setting:
    """The data of one seed and label count, and the networks that are compared."""

    source: ft.Source
    splits: ft.Splits
    checkpoint: ft.Checkpoint
    seed: int
    config: WhatTransfers
    model: ft.Model = field(init=False)
    pretrained: ft.Variables = field(init=False)
    random: ft.Variables = field(init=False)

    def __post_init__(self) -> None:
        model, variables, _ = ft.transfer(self.checkpoint, classes=10, seed=self.seed)
        random = ft.resnet(model.config).init(jax.random.key(self.seed))
        for name, value in (("model", model), ("pretrained", variables), ("random", random)):
            object.__setattr__(self, name, value)

    def fit(self, start: ft.Variables, plan: ft.Plan) -> float:
        """Test accuracy after training on the labels of this setting."""
        preprocessing = self.checkpoint.preprocessing
        feed = ft.source_feed(
            self.source, self.splits.train, self.splits.val, preprocessing,
            batch_size=64, seed=self.seed,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            options = ft.Options(evaluate_every=self.config.steps)
            fitted = ft.fit(self.model, start, plan, feed, folder, seed=self.seed, options=options)
        test = ft.held_out(self.source, self.splits.test, preprocessing)
        return ft.evaluate(self.model, fitted.variables, test, preprocessing).accuracy

    def probe(self, features: Callable[[np.ndarray], np.ndarray]) -> float:
        """Test accuracy of logistic regression on standardised features."""
        train, test = (
            [features(self.images(part)), self.source.labels()[part]]
            for part in (self.splits.train, self.splits.test)
        )
        scaler = StandardScaler().fit(train[0])
        model = LogisticRegression(C=0.1, max_iter=2000)
        model.fit(scaler.transform(train[0]), train[1])
        return float(model.score(scaler.transform(test[0]), test[1]))

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Prepared uint8 images [examples, size, size, 3]."""
        batches = ft.held_out(self.source, positions, self.checkpoint.preprocessing)
        kept = [batch["image"][batch["weight"] > 0] for batch in batches]
        return np.concatenate(kept)

    def network_features(self, variables: ft.Variables) -> Callable[[np.ndarray], np.ndarray]:
        """Pooled features of a network with running statistics."""
        preprocessing = self.checkpoint.preprocessing

        @jax.jit
        def pooled(images: jax.Array) -> jax.Array:
            normal = normalise(images, preprocessing.mean, preprocessing.std)
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
    plan = ft.head_then_fine_tune(
        setting.pretrained["params"], head_steps=head, fine_tune_steps=setting.config.steps - head
    )
    return setting.fit(setting.pretrained, plan)


def scratch(setting: Setting) -> float:
    plan = ft.from_scratch(
        setting.random["params"],
        steps=setting.config.steps,
        learning_rate=setting.config.scratch_learning_rate,
    )
    return setting.fit(setting.random, plan)


METHODS: dict[str, Callable[[Setting], float]] = {
    "raw pixels": raw_pixels,
    "random features": random_features,
    "features": features,
    "fine-tuned": fine_tuned,
    "scratch": scratch,
}


def main(config: WhatTransfers) -> None:
    """Computes what is missing and prints the table."""
    config.results.parent.mkdir(parents=True, exist_ok=True)
    source, checkpoint = ft.open_source("digits"), ft.load("builtin")
    for seed in range(0 if config.print_only else config.seeds):
        for count in config.labels_per_class:
            splits = ft.stratified_split(
                source.labels(), labels_per_class=count, test_fraction=TEST_FRACTION, seed=seed
            )
            setting = Setting(source, splits, checkpoint, seed, config)
            for name in config.methods:
                if (name, count, seed) not in read(config.results):
                    row = {"method": name, "labels": count, "seed": seed}
                    row["accuracy"] = METHODS[name](setting)
                    with config.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print_table(config, read(config.results))


def read(path: Path) -> dict[tuple[str, int, int], float]:
    """Accuracy by method, label count and seed."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["method"], row["labels"], row["seed"]): row["accuracy"] for row in rows}


def print_table(config: WhatTransfers, found: dict[tuple[str, int, int], float]) -> None:
    """Mean ± sd in percent over the seeds there are, as a table in Markdown."""
    print("| digits a class | " + " | ".join(config.methods) + " |")
    print("|---" * (1 + len(config.methods)) + "|")
    for count in config.labels_per_class:
        cells = []
        for name in config.methods:
            values = [100 * v for (m, c, _), v in found.items() if (m, c) == (name, count)]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.1f} ± {spread:.1f}" if values else "")
        print(f"| {count} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(tyro.cli(WhatTransfers))
