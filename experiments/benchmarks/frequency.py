"""Times the frequency report, and prints it for the built-in network.

    python experiments/benchmarks/frequency.py                      # about two minutes on 2 cores
    python experiments/benchmarks/frequency.py --networks builtin   # seconds

A ResNet-18 at 48 px with 64 images, a ResNet-50 at 224 px with 16, both with random weights, for
the time does not depend on them; and the built-in network on photographs, whose table is printed.
The first call compiles; the second one has other images of the same shape. Figures:
experiments/results/frequency.md.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from sklearn.datasets import load_sample_images

import flaxtransfer as ft
from flaxtransfer.analysis import FrequencyResponse, frequency_response


@dataclass(frozen=True)
class Case:
    """A network and images for it.

    Args:
        images: number.
        size: side in pixels.
        wanted: seconds that a report may take; None without a limit.
    """

    images: int
    size: int
    wanted: float | None = None


CASES = {
    "resnet18": Case(64, 48, 5),
    "resnet50": Case(16, 224, 60),
    "builtin": Case(64, 32),
}


@dataclass(frozen=True)
class Frequency:
    """Time the frequency report.

    Args:
      networks: which to time.
      cotangents: per image and segment.
      rounds: reports after the first one.
      json: file for the figures.
    """

    networks: tuple[str, ...] = tuple(CASES)
    cotangents: int = 4
    rounds: int = 3
    json: Path | None = None


def network_of(name: str) -> tuple[ft.Model, Any, ft.Preprocessing]:
    """Model, variables and preprocessing."""
    if name == "builtin":
        network = ft.Classifier.of(ft.load("builtin"))
        return network.model, network.variables, network.preprocessing
    model = ft.resnet(ft.models.ARCHITECTURES[name])
    return model, model.init(jax.random.key(0)), ft.weights.IMAGENET


def photographs(case: Case, seed: int) -> np.ndarray:
    """Crops of scikit-learn's two photographs: uint8 [images, size, size, 3]."""
    random = np.random.default_rng(seed)
    pictures = load_sample_images().images
    crops = []
    for number in range(case.images):
        picture = pictures[number % len(pictures)]
        y, x = (random.integers(side - case.size) for side in picture.shape[:2])
        crops.append(picture[y : y + case.size, x : x + case.size])
    return np.stack(crops)


def measured(name: str, options: Frequency) -> tuple[dict[str, Any], FrequencyResponse]:
    """Seconds of the first report and of later ones, and the last report."""
    case = CASES[name]
    model, variables, preprocessing = network_of(name)
    jax.block_until_ready(variables)
    seconds, processor = [], []
    for turn in range(1 + options.rounds):
        images = photographs(case, turn)
        start, work = time.perf_counter(), time.process_time()
        found = frequency_response(
            model, variables, images, preprocessing, cotangents=options.cotangents
        )
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - work)
    figures = {
        "network": name,
        "images": case.images,
        "size": case.size,
        "first": seconds[0],
        "first_cpu": processor[0],
        "later": min(seconds[1:], default=None),
        "later_cpu": min(processor[1:], default=None),
        "wanted": case.wanted,
    }
    return figures, found


def main(options: Frequency) -> None:
    """Measures, prints, and writes the figures if asked to."""
    if unknown := [name for name in options.networks if name not in CASES]:
        print(f"no networks {unknown}; there are {sorted(CASES)}", file=sys.stderr)
        raise SystemExit(2)
    rows = []
    print(f"{'network':<10} {'images':>6} {'px':>4} {'first s':>8} {'cpu s':>6} ", end="")
    print(f"{'later s':>8} {'cpu s':>6} {'wanted s':>8}")
    reports = {}
    for name in options.networks:
        row, reports[name] = measured(name, options)
        rows.append(row)
        cells = [row["first"], row["first_cpu"], row["later"], row["later_cpu"]]
        shown = ["–" if value is None else f"{value:.1f}" for value in cells]
        wanted = "–" if row["wanted"] is None else f"{row['wanted']:.0f}"
        line = f"{name:<10} {row['images']:>6} {row['size']:>4} {shown[0]:>8} {shown[1]:>6} "
        print(f"{line}{shown[2]:>8} {shown[3]:>6} {wanted:>8}", flush=True)
    if "builtin" in reports:
        print(reports["builtin"])
    versions = {
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    if options.json is not None:
        asked = dataclasses.asdict(options) | {"json": str(options.json)}
        text = json.dumps({"options": asked, "versions": versions, "figures": rows}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Frequency))
