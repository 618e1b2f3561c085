"""What are the gray levels worth that 12 bits in 16 lose on the scale to 65535?

    python experiments/gray_levels.py        # 5 seeds x 3 spans x 2 rules

Handwritten digits become scans of 12 bits: they fill all of 0 .. 4095, or a part of it, as organs
do in a CT, and noise is added. Each set is read with the fixed scale 0 .. 65535, and with black and
white that are measured on the training images. A head is solved on the built-in network, whose
BatchNorms keep their statistics.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.data import Levels, measure_levels, with_levels


@dataclass(frozen=True)
class GrayLevels:
    """What to measure.

    Args:
      spans: measurements between the darkest and the brightest pixel of a digit.
      seeds: of noise, split and order.
      labels: training images per class.
      tests: test images.
    """

    spans: tuple[int, ...] = (4095, 1000, 300)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    labels: int = 20
    tests: int = 500


def write_scans(folder: Path, span: int, seed: int) -> None:
    """Writes the digits as 12-bit scans, one sub-folder per class."""
    random, digits = np.random.default_rng(seed), ft.open_source("digits")
    for index, label in enumerate(digits.labels()):
        image = digits[index]["image"][..., 0] / 255
        low = (4095 - span) // 3
        values = low + span * image + random.normal(0, span / 20, image.shape)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.rint(values), 0, 4095).astype(np.uint16)
        Image.fromarray(pixels).save(folder / str(label) / f"{index}.png")


def accuracy(folder: Path, seed: int, rule: str, config: GrayLevels) -> tuple[int, float]:
    """Gray levels of the training images, and test accuracy of a solved head, %."""
    source = ft.open_source(f"folder:{folder}")
    splits = ft.stratified_split(source.labels(), labels_per_class=config.labels, seed=seed)
    whole = Levels((0.0,), (65535.0,))
    levels = whole if rule == "0 .. 65535" else measure_levels(source, splits.train)
    assert levels is not None  # The images have more than 8 bits.
    checkpoint = ft.load("builtin")
    own = levels.into(checkpoint.preprocessing)
    network = ft.transfer(checkpoint, classes=10, preprocessing=own)
    images = [with_levels(source, levels)[int(i)]["image"] for i in splits.train]
    data = ft.loaders(source, splits, own, batch_size=50, seed=seed)
    with tempfile.TemporaryDirectory() as run:
        plan = ft.recipes.solved_head(network.params)
        fitted = ft.fit(network, plan, data, Path(run) / "run", seed=seed)
    tests = ft.data.subsample(splits.test, config.tests, source.labels())
    found = ft.evaluate(fitted.network, ft.eval_batches(source, tests, own))
    return len(np.unique(np.stack(images))), 100 * found.accuracy


def main(config: GrayLevels) -> None:
    """Prints a row for each span and rule: means and deviations over the seeds."""
    print("| span of 4096 | black .. white | gray levels | test accuracy, % |")
    print("|---|---|---|---|")
    for span in config.spans:
        for rule in ("0 .. 65535", "measured"):
            rows = []
            for seed in config.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    write_scans(Path(folder), span, seed)
                    rows.append(accuracy(Path(folder), seed, rule, config))
            levels, scores = np.array(rows).T
            spread = scores.std(ddof=1) if len(rows) > 1 else 0.0
            print(f"| {span} | {rule} | {levels.mean():.0f} | {scores.mean():.1f} ± {spread:.1f} |")


if __name__ == "__main__":
    main(tyro.cli(GrayLevels))
