"""Which BatchNorm statistics does an average of weights need?

    python experiments/average_statistics.py        # 5 seeds x 3 decays x 2 lengths

A small network is trained on digits from random weights, with an exponential average of its
weights. The average is then tested with four sets of statistics: those that training kept, which
are of the weights that were stepped; the same, averaged as the weights are; measured for the
average on all training images; and what ``ft.fit`` returns, measured on a sample of them.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import tyro

import flaxtransfer as ft
from flaxtransfer.training import make_mesh, place_replicated, recalibrate, start, train_step

KINDS = ("as kept", "averaged alike", "measured", "ft.fit")


@dataclass(frozen=True)
class AverageStatistics:
    """What to train.

    Args:
      seeds: of weights, images and order.
      decays: of the average.
      steps: lengths of the phase, in steps of 64 images.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    steps: tuple[int, ...] = (40, 300)


def accuracies(seed: int, decay: float, steps: int) -> list[float]:
    """Validation accuracy of the average with each kind of statistics, %."""
    source = ft.open_source("digits")
    splits = ft.stratified_split(source.labels(), val_fraction=0.3, test_fraction=0.0, seed=seed)
    preprocessing = ft.Preprocessing((0.3,) * 3, (0.35,) * 3, 24, 24)
    data = ft.loaders(source, splits, preprocessing, batch_size=64, seed=seed)
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=10))
    network = ft.Classifier(model, model.init(jax.random.key(seed)), preprocessing)
    groups = {"all": ft.Group(optax.adamw, learning_rate=3e-3)}
    labels = ft.label(network.params, {"all": ft.everything()})
    plan = ft.Plan([ft.Phase(labels, groups, steps=steps, ema=decay)])

    phase = plan.resolve(network.params, data.steps_per_epoch).phases[0]
    # A copy, because a step gives its buffers away.
    state = place_replicated(start(network.variables, phase, seed), make_mesh())
    step = train_step(model, phase, data)
    alike = jax.device_get(state.batch_stats)
    for batch in itertools.islice(data.train(0), steps):
        state, _ = step(state, {name: batch[name] for name in ("image", "label")})
        kept = jax.device_get(state.batch_stats)
        alike = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, alike, kept)
    averaged = state.variables()["params"]
    found = []
    for statistics in (kept, alike, None):
        trial = network.with_variables({"params": averaged, "batch_stats": statistics or kept})
        if statistics is None:
            measured = recalibrate(trial, data.calibration())
            trial = network.with_variables({"params": averaged, "batch_stats": measured})
        found.append(ft.evaluate(trial, data.validation()).accuracy)
    with tempfile.TemporaryDirectory() as folder:
        options = ft.FitOptions(evaluate_every=steps)
        fitted = ft.fit(network, plan, data, Path(folder) / "run", seed=seed, options=options)
    return [100 * value for value in (*found, fitted.validation.accuracy)]


def main(config: AverageStatistics) -> None:
    """Prints a row for each decay and length: means and deviations over the seeds."""
    print("| steps | decay | " + " | ".join(KINDS) + " | ft.fit less measured |")
    print("|" + "---|" * (len(KINDS) + 3))
    for steps, decay in itertools.product(config.steps, config.decays):
        rows = np.array([accuracies(seed, decay, steps) for seed in config.seeds])
        cells = [
            f"{m:.1f} ± {s:.1f}" for m, s in zip(rows.mean(0), rows.std(0, ddof=1), strict=True)
        ]
        gap = rows[:, 3] - rows[:, 2]
        cells.append(f"{gap.mean():+.2f} ± {gap.std(ddof=1):.2f}")
        print(f"| {steps} | {decay} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(AverageStatistics))
