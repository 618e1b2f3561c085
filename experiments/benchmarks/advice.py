"""Times the advice against one forward pass over the same images.

    python experiments/benchmarks/advice.py --images 1000

The built-in network on 600 images of 32 px (wanted: at most 10 s once its programs are compiled),
and a ResNet-18 with random weights on images of 224 px (wanted: at most 1.2 times one forward pass
over them). Both compile beforehand, on a batch; then they take turns. Four minutes
for 1,000 images.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import jax
import numpy as np

import flaxtransfer as ft

BATCH = 64


def source_of(count: int, size: int) -> ft.ArraySource:
    """Blobs of ten hues in noise, of a place of their own each."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 10
    images = random.integers(0, 160, (count, size, size, 3), dtype=np.uint8)
    tints = random.integers(0, 256, (10, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = random.integers(0, size // 2, 2)
        image[row : row + size // 2, column : column + size // 2] //= 2
        image[row : row + size // 2, column : column + size // 2] += tints[label] // 2
    return ft.ArraySource(images, labels, [f"hue {number}" for number in range(10)])


def seconds(function: Callable[[], object]) -> float:
    """What one call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> None:
    """Takes turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000, help="of 224 px")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    model = ft.resnet("resnet18", classes=10)
    large = ft.Classifier(model, model.init(jax.random.key(0)), ft.weights.IMAGENET)
    small = ft.transfer(ft.load("builtin"), classes=10)
    print("| images | forward pass, s | advice, s | advice / pass |\n|---|---|---|---|")
    for network, count in ((small, 600), (large, options.images)):
        size = network.preprocessing.size
        first, source = source_of(10 * BATCH // 8, size), source_of(count, size)

        def passed(source: ft.ArraySource, network: ft.Classifier = network) -> object:
            everything = np.arange(len(source))
            batches = ft.eval_batches(source, everything, network.preprocessing, batch_size=BATCH)
            return ft.predict(network, batches)

        def advised(source: ft.ArraySource, network: ft.Classifier = network) -> object:
            return ft.advise(network, source, batch_size=BATCH)

        passed(first), advised(first)
        both: dict[Callable[..., object], list[float]] = {passed: [], advised: []}
        for _ in range(options.rounds):
            for function, found in both.items():
                found.append(seconds(lambda function=function, source=source: function(source)))
        plain, advice = (median(found) for found in both.values())
        print(f"| {count} of {size} px | {plain:.1f} | {advice:.1f} | {advice / plain:.2f} |")


if __name__ == "__main__":
    main()
