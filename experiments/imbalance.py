"""Rare classes: plain training against balanced weights and logit adjustment, on 95:5 digits.

    python experiments/imbalance.py

prints the table of ``results/imbalance.md``. The classes are the digits 3 and 8: 95 training images
of one and 5 of the other, which is the rare one in every second seed. All others of both are the
test set. The losses train the same head on the built-in network, from the same weights, on the same
batches, for the same steps; the last state counts.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

import flaxtransfer as ft

PAIR = (3, 8)
FREQUENT, RARE = 95, 5
LOSSES = {
    "plain": ft.training.CrossEntropy(),
    "balanced weights": ft.training.CrossEntropy(class_weights="balanced"),
    "logit adjustment": ft.training.CrossEntropy(logit_adjustment=1.0),
    "focal, exponent 2": ft.training.CrossEntropy(focal=2.0),
}
SHOWN = ("balanced_accuracy", "accuracy", "roc_auc", "calibration_error")


def unequal(seed: int) -> tuple[ft.ArraySource, ft.data.Splits]:
    """The two digits, 95 and 5 of them for training, and all others to test on."""
    digits = ft.open_source("digits")
    labels = digits.labels()
    places = np.flatnonzero(np.isin(labels, PAIR))
    images = np.stack([digits[int(n)]["image"] for n in places])
    source = ft.ArraySource(images, (labels[places] == PAIR[1]).astype(int), ("3", "8"))
    random = np.random.default_rng(seed)
    counts = (FREQUENT, RARE) if seed % 2 else (RARE, FREQUENT)
    train = np.concatenate(
        [
            random.permutation(np.flatnonzero(source.labels() == label))[:count]
            for label, count in enumerate(counts)
        ]
    )
    test = np.setdiff1d(np.arange(len(source)), train)
    return source, ft.data.Splits.of(train, test=test)


def trained(seed: int, loss: ft.training.CrossEntropy, steps: int) -> dict[str, float]:
    """The metrics on the test set of a head that was trained with this loss."""
    source, splits = unequal(seed)
    network = ft.transfer(ft.load("builtin"), classes=2, class_names=source.class_names)
    data = ft.loaders(
        source,
        splits,
        network.preprocessing,
        batch_size=20,
        transform=ft.data.evaluation_transform(network.preprocessing),
        seed=seed,
    )
    plan = ft.recipes.feature_extraction(network.params, steps=steps)
    plan = replace(plan, phases=[replace(phase, loss=loss) for phase in plan.phases])
    with tempfile.TemporaryDirectory() as folder:
        fitted = ft.fit(
            network, plan, data, Path(folder) / "run", seed=seed, cache=ft.Cache(where="memory")
        )
    batches = ft.eval_batches(source, splits.test, network.preprocessing, batch_size=64)
    found = ft.predict(fitted.network, batches)
    probabilities = network.task.probabilities(found.logits)
    return {
        name: ft.training.METRICS["single_label"][name].of(probabilities, found.labels)
        for name in SHOWN
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    print(f"| loss | {' | '.join(SHOWN)} | better than plain |")
    print("|---|" + "---|" * (len(SHOWN) + 1))
    plain: np.ndarray | None = None
    for name, loss in LOSSES.items():
        rows = [trained(seed, loss, options.steps) for seed in range(options.seeds)]
        values = {key: 100 * np.array([row[key] for row in rows]) for key in SHOWN}
        balanced = values["balanced_accuracy"]
        plain = balanced if plain is None else plain
        cells = [f"{each.mean():.1f} ± {each.std(ddof=1):.1f}" for each in values.values()]
        won = "" if name == "plain" else f"{(balanced > plain).sum()} of {options.seeds} seeds"
        print(f"| {name} | {' | '.join(cells)} | {won} |", flush=True)


if __name__ == "__main__":
    main()
