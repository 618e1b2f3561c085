"""Times an epoch on images against an epoch on cached activations, taking turns in one process.

    python experiments/benchmarks/cached_prefix.py --models resnet18 resnet50 --sizes 64 128

An epoch is what training does in one: batches are read, placed and stepped, without validation and
checkpoints. Both train the same leaves, from the same weights; images lie in memory at their final
size, so that no decoding flatters the cache. The caching pass is timed with its program compiled.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import flaxtransfer as ft
from flaxtransfer.data import evaluation_transform
from flaxtransfer.recipes import adamw
from flaxtransfer.training import (
    cached_feed,
    choose,
    make_mesh,
    place_batch,
    place_replicated,
    split_phase,
    split_state,
    start,
    train_step,
)


@dataclass(frozen=True)
class CachedPrefix:
    """Time epochs on images against epochs on cached activations.

    Args:
      models: architectures.
      sizes: of the images, in px.
      parts: what trains: "head", and "layer4" for the last stage and the head.
      images: training examples.
      batch_size: of a step.
      rounds: turns of each; the best is reported.
      dtype: of the cache.
      json: file for the figures.
    """

    models: tuple[str, ...] = ("resnet18", "resnet50")
    sizes: tuple[int, ...] = (64, 128)
    parts: tuple[str, ...] = ("head", "layer4")
    images: int = 512
    batch_size: int = 32
    rounds: int = 3
    dtype: str = "float32"
    json: Path | None = None


PARTS = {"head": "head()", "layer4": "head() | stage(4)"}


def epoch(
    model: ft.Model, phase: ft.Phase, feed: ft.data.DataLoaders, variables: ft.models.Variables
) -> Callable[[], float]:
    """Seconds of one epoch; the first call compiles."""
    mesh = make_mesh()
    step = train_step(model, split_phase(phase, model.segments, feed.start), feed)
    state, _ = split_state(start(variables, phase, 0), model.segments, feed.start)
    state = place_replicated(state, mesh)

    def run() -> float:
        nonlocal state
        batches = feed.train(0)
        began = time.perf_counter()
        for _ in range(feed.steps_per_epoch):
            batch = next(batches)
            placed = place_batch({k: batch[k] for k in ("image", "label")}, mesh)
            state, metrics = step(state, placed)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    return run


def compare(options: CachedPrefix, name: str, size: int, part: str) -> dict[str, Any]:
    """One row: seconds of an epoch of both kinds and of the caching pass."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (options.images, size, size, 3), dtype=np.uint8)
    source = ft.ArraySource(pixels, np.arange(options.images) % 10)
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, size, size)
    feed = ft.loaders(
        source,
        ft.data.Splits.of(np.arange(options.images), np.arange(0)),
        preprocessing,
        batch_size=options.batch_size,
        transform=evaluation_transform(preprocessing),
    )
    model = ft.resnet(dataclasses.replace(ft.models.RESNETS[name], classes=10))
    variables = model.init(jax.random.key(0))
    rules = {"moving": ft.masks.parse(PARTS[part]), "still": ft.rest()}
    phase = ft.Phase(rules, {"moving": adamw(1e-3, 0.0), "still": ft.FROZEN}, epochs=10)
    phase = phase.resolve(variables["params"], feed.steps_per_epoch)
    cache = ft.Cache("memory", options.dtype, memory=2**36)  # type: ignore[arg-type]
    choice = choose(cache, model, variables["params"], phase, feed)

    def build() -> Any:
        return cached_feed(choice, model, variables, feed, make_mesh(), Path(tempfile.gettempdir()))

    cached = build()  # Compiles.
    assert cached is not None
    plain, quick = epoch(model, phase, feed, variables), epoch(model, phase, cached.feed, variables)
    plain(), quick()
    seconds: dict[str, list[float]] = {"image": [], "caching": [], "cached": []}
    for _ in range(options.rounds):
        seconds["image"].append(plain())
        began = time.perf_counter()
        build()
        seconds["caching"].append(time.perf_counter() - began)
        seconds["cached"].append(quick())
    best = {kind: min(values) for kind, values in seconds.items()}
    return {
        "model": name,
        "size": size,
        "trains": part,
        **{f"{kind}_seconds": value for kind, value in best.items()},
        "bytes": choice.nbytes,
        "speed_up": best["image"] / best["cached"],
        "break_even_epochs": best["caching"] / (best["image"] - best["cached"]),
    }


def main(options: CachedPrefix) -> None:
    """Measures, prints, and writes the figures if asked to."""
    unknown = [p for p in options.parts if p not in PARTS]
    unknown += [m for m in options.models if m not in ft.models.RESNETS]
    if unknown:
        print(f"unknown: {unknown}; parts are {sorted(PARTS)}", file=sys.stderr)
        raise SystemExit(2)
    rows = [
        compare(options, name, size, part)
        for name in options.models
        for size in options.sizes
        for part in options.parts
    ]
    table = Table(
        title=f"{options.images} images, batches of {options.batch_size}, {options.dtype}; "
        f"best of {options.rounds} turns"
    )
    for heading in ("model", "px", "trains"):
        table.add_column(heading)
    for heading in ("epoch ms", "caching ms", "cached ms", "speed-up", "break-even", "MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["size"]),
            row["trains"],
            *(f"{1e3 * row[f'{kind}_seconds']:.0f}" for kind in ("image", "caching")),
            f"{1e3 * row['cached_seconds']:.1f}",
            f"{row['speed_up']:.1f}",
            f"{row['break_even_epochs']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    versions = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
    }
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))
    if options.json is not None:
        asked = dataclasses.asdict(options) | {"json": str(options.json)}
        text = json.dumps({"options": asked, "versions": versions, "figures": rows}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(CachedPrefix))
