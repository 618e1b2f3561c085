"""Times one training step against torch and against plain `lax.conv`.

    python experiments/benchmarks/train_step.py --model resnet50 --image-size 64 --batch-size 32

A step is forward, backward and an SGD update with momentum, BatchNorm by the batch, state donated;
with `--inference` it is the logits, by running statistics.
Expected on 2 CPU cores at 64 px and batch 32: ResNet-50 at least 3.5 times and ResNet-18 at least 6
times as fast as on plain `lax.conv`, and at most 1.35 and 1.8 times as long as torch. Two minutes.
On a GPU the same command computes in bfloat16 with float32 parameters and statistics, and torch
runs with autocast, channels_last and `torch.compile`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from turns import Contestant, alternate

Name = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
]

PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA L4": 121.0,
    "TPU v4": 275.0,
    "TPU v5": 459.0,
    "TPU v5 lite": 197.0,
    "TPU v6 lite": 918.0,
}
"""Dense bfloat16 TFLOP/s by device kind, as their makers state them."""


@dataclass(frozen=True)
class TrainStep:
    """Time one training step, taking turns with others.

    Args:
      model: name of a ResNet, the same in torchvision.
      image_size: side of the images in px.
      batch_size: images a step.
      inference: logits of a batch by running statistics, instead of a training step.
      compare: whom to take turns with.
      rounds: turns of each.
      steps: steps a turn; unset, 1 on CPU and 20 on accelerators.
      peak_tflops: of the device, for the model FLOP utilization; unset, looked up by its name.
      json: file for the figures.
    """

    model: Name = "resnet50"
    image_size: int = 64
    batch_size: int = 32
    inference: bool = False
    compare: Literal["torch", "lax", "both", "none"] = "both"
    rounds: int = 10
    steps: int | None = None
    peak_tflops: float | None = None
    json: Path | None = None


def missing(options: TrainStep) -> list[str]:
    """What has to be installed before the comparison can start."""
    if options.compare not in ("torch", "both"):
        return []
    return [name for name in ("torch", "torchvision") if importlib.util.find_spec(name) is None]


def measure(options: TrainStep) -> list[Contestant]:
    """Runs all contestants, ours first."""
    others = {"torch": ("torch",), "lax": ("lax",), "both": ("lax", "torch"), "none": ()}
    job = {
        field: getattr(options, field)
        for field in ("model", "image_size", "batch_size", "inference", "steps")
    }
    with ExitStack() as processes:
        contestants = []
        for name in ("ours", *others[options.compare]):
            script = "torch_peer.py" if name == "torch" else "jax_peer.py"
            contestant = Contestant(name, script, {**job, "contestant": name})
            contestants.append(processes.enter_context(contestant))
        alternate(contestants, options.rounds)
    return contestants


def figures(contestants: list[Contestant], options: TrainStep) -> list[dict[str, Any]]:
    """One dict for each contestant; utilization is None where the device's peak is not known."""
    ours = contestants[0]
    peak = options.peak_tflops or PEAKS.get(ours.facts["device"])
    return [
        {
            "name": each.name,
            **{key: each.facts[key] for key in ("device", "dtype", "versions", "compile_seconds")},
            "images_per_second": options.batch_size / each.best,
            "best_ms": 1e3 * each.best,
            "median_ms": 1e3 * each.median,
            "utilization": peak and ours.facts["flops"] / each.best / (peak * 1e12),
            "peak_bytes": each.facts["peak_bytes"],
            "ours_over_this": ours.best / each.best,
            "ours_over_this_median": ours.median / each.median,
        }
        for each in contestants
    ]


def report(rows: list[dict[str, Any]], options: TrainStep) -> Table:
    """The figures as a table; a ratio is our time over the contestant's."""
    table = Table(
        title=f"{options.model}, {'inference, ' if options.inference else ''}"
        f"{options.image_size} px, batch {options.batch_size}, "
        f"{rows[0]['device']} ({platform.machine()}), best and median of {options.rounds} turns"
    )
    table.add_column("")
    for heading in ("images/s", "ms best", "ms median", "MFU", "peak MB", "ours/this", "(median)"):
        table.add_column(heading, justify="right")
    table.add_column("versions")
    for row in rows:
        table.add_row(
            str(row["name"]),
            *(
                "-" if row[key] is None else format(row[key], layout)
                for key, layout in (
                    ("images_per_second", ".1f"),
                    ("best_ms", ".1f"),
                    ("median_ms", ".1f"),
                    ("utilization", ".1%"),
                )
            ),
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['ours_over_this']:.2f}",
            f"{row['ours_over_this_median']:.2f}",
            f"{row['versions']}, {row['dtype']}",
        )
    return table


def main(options: TrainStep) -> None:
    """Measures, prints, and writes the figures if asked to."""
    if names := missing(options):
        print(
            f"--compare {options.compare} needs {' and '.join(names)}, which this Python lacks: "
            "install flaxtransfer[parity], or use --compare lax",
            file=sys.stderr,
        )
        raise SystemExit(2)
    rows = figures(measure(options), options)
    Console(width=None if sys.stdout.isatty() else 140).print(report(rows, options))
    if options.json is not None:
        asked = dataclasses.asdict(options) | {"json": str(options.json)}
        options.json.write_text(json.dumps({"options": asked, "figures": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(TrainStep))
