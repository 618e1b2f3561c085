"""Several labels per image, and numbers: which digits a picture shows, how thick strokes are.

    python experiments/tasks.py

prints the table of ``results/tasks.md``. A picture shows two digits of scikit-learn side by side,
enlarged, with strokes that are thickened by a random width. Its labels are the ten digits, of which
a fifth is unknown; or the thickness, in px. Pictures of training and test share no digit. A head is
solved on the built-in network, and all of it fine-tuned from there. Each result is exported for
timm; what was written is read again and compared.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import flaxtransfer as ft

SIDE = 24
"""Of a digit in px; a picture has twice as many."""
WIDTHS = (1, 3, 5, 7)
"""Of the filter that thickens strokes, in px."""
SHOWN = {
    "multi_label": ("average_precision", "roc_auc", "label_accuracy"),
    "regression": ("r2", "mae", "rmse"),
}


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels of ten digits, and widths in px; the last fifth is of digits of their own."""
    digits, random = ft.open_source("digits"), np.random.default_rng(seed)
    labels, order = digits.labels(), random.permutation(len(digits))
    cut, test = len(order) * 4 // 5, count // 5
    images = np.zeros((count, 2 * SIDE, 2 * SIDE, 1), np.uint8)
    shown, widths = np.zeros((count, 10), np.float32), random.choice(WIDTHS, count)
    for number in range(count):
        pair = random.choice(order[:cut] if number < count - test else order[cut:], 2)
        shown[number, labels[pair]] = 1
        parts = [Image.fromarray(digits[int(n)]["image"][..., 0]).resize((SIDE,) * 2) for n in pair]
        thick = [part.filter(ImageFilter.MaxFilter(int(widths[number]))) for part in parts]
        images[number, SIDE // 2 : SIDE * 3 // 2, :, 0] = np.concatenate(
            [*map(np.asarray, thick)], axis=1
        )
    return images, shown, widths.astype(np.float32)[:, None]


def results(task: ft.Task, count: int, steps: int, seed: int) -> list[str]:
    """The rows of a task: a solved head, and fine-tuning."""
    images, shown, widths = pictures(count, seed)
    labels, names = (
        (shown, tuple("0123456789")) if task.name == "multi_label" else (widths, ("px",))
    )
    train = count - count // 5
    if task.name == "multi_label":
        unknown = np.random.default_rng(seed + 1).random(labels[:train].shape) < 0.2
        labels[:train][unknown] = np.nan
    source = ft.ArraySource(images, labels, names, task=task.name)
    splits = ft.data.Splits.of(np.arange(train), test=np.arange(train, count))
    network = ft.transfer(ft.load("builtin"), classes=len(names), class_names=names, task=task)
    plain = ft.data.evaluation_transform(network.preprocessing)
    data = ft.loaders(
        source, splits, network.preprocessing, batch_size=32, transform=plain, seed=seed
    )
    plans = {
        "solved head": ft.recipes.solved_head(network.params),
        "fine-tuned": ft.recipes.linear_probe_then_fine_tune(network.params, steps=steps),
    }
    rows = []
    for name, plan in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            fitted = ft.fit(network, plan, data, Path(folder) / "run", seed=seed).network
            batches = ft.eval_batches(source, splits.test, network.preprocessing, batch_size=64)
            found = ft.predict(fitted, batches)
            values = fitted.task.probabilities(found.logits)
            ft.export(ft.load(Path(folder) / "run"), Path(folder) / "timm", to="timm")
        metrics = ft.training.METRICS[task.name]
        cells = (f"{metrics[each].of(values, found.labels):.3f}" for each in SHOWN[task.name])
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    for task in (ft.task.MULTI_LABEL, ft.task.REGRESSION):
        print(f"\n| {task.name} | {' | '.join(SHOWN[task.name])} |\n|---|---|---|---|")
        for row in results(task, options.count, options.steps, seed=0):
            print(row, flush=True)


if __name__ == "__main__":
    main()
