"""Times a second start with compiled programs at hand, and two processes against two devices.

    python experiments/benchmarks/starts.py --rounds 3

A start is a fresh process that trains a ResNet-18 (64 px or --image-size, batch 32, all parameters
move) for one step: first with an empty folder of compiled programs, then with the one that this
start has filled. Wanted: the first step of the second start at most 0.4 times that of the first.
Then the same training over two devices of the CPU, in one process and in two that are connected
over loopback, which takes turns too; time per step is the difference of a long and a short run.
Wanted: two processes no slower than one. Three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

STARTED = time.perf_counter()
LOCAL = Path(__file__).parents[1] / "launch/local.py"
SHORT, LONG = 3, 15


def train(steps: int, size: int) -> None:
    """One run, in this process or in those that it is connected to; prints what it took."""
    import jax
    import numpy as np
    import optax

    import flaxtransfer as ft
    import flaxtransfer.distributed as distributed

    distributed.start()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, size, size, 3), dtype=np.uint8)
    source = ft.ArraySource(images, np.arange(64) % 8)
    model = ft.resnet("resnet18", classes=8)
    network = ft.Classifier(
        model,
        model.init(jax.random.key(0)),
        ft.Preprocessing((0.5,) * 3, (0.25,) * 3, size, size, "bilinear"),
    )
    data = ft.loaders(
        source, ft.stratified_split(source.labels()), network.preprocessing, batch_size=32
    )
    moves = {"all": ft.everything()}
    plan = ft.Plan([ft.Phase(moves, {"all": ft.Group(optax.sgd, 1e-3)}, steps=steps, name="all")])
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        ft.fit(network, plan, data, Path(folder) / "run")
        ended = time.perf_counter()
    if distributed.is_first():
        print(json.dumps({"fit": ended - begun, "start": ended - STARTED}))
    distributed.finish()


def run(
    steps: int, size: int, *, processes: int = 1, devices: int = 1, compiled: str | None
) -> dict:
    """What `train` printed in fresh processes that keep compiled programs in a folder."""
    words = [sys.executable, str(LOCAL), str(processes), "--devices", str(devices), "--"]
    words += [sys.executable, __file__, "--steps", str(steps), "--image-size", str(size)]
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if compiled:
        environment["JAX_COMPILATION_CACHE_DIR"] = compiled
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    lines = [line[line.index("{") :] for line in done.stdout.splitlines() if '"fit"' in line]
    if done.returncode or len(lines) != 1:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(lines[0])


def main() -> None:
    """Takes turns and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, help="what a started process trains for")
    options = parser.parse_args()
    if options.steps:
        train(options.steps, options.image_size)
        return
    starts: dict[str, list[dict]] = {"first": [], "second": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as compiled:
            for name in starts:
                starts[name].append(run(1, options.image_size, compiled=compiled))
    print("| start | first step in `fit`, s | whole process, s |\n|---|---|---|")
    for name, found in starts.items():
        print(f"| {name} | {_middle(found, 'fit'):.1f} | {_middle(found, 'start'):.1f} |")
    shares = [_middle(starts["second"], key) / _middle(starts["first"], key) for key in found[0]]
    print("| second / first | " + " | ".join(f"{share:.2f}" for share in shares) + " |\n")

    layouts = {"1 process x 2 devices": (1, 2), "2 processes x 1 device": (2, 1)}
    steps: dict[str, list[float]] = {name: [] for name in layouts}
    with tempfile.TemporaryDirectory() as compiled:
        for turn in range(options.rounds + 1):
            for name, (processes, devices) in layouts.items():
                how = {"processes": processes, "devices": devices, "compiled": compiled}
                long, short = (run(count, options.image_size, **how) for count in (LONG, SHORT))
                seconds = long["fit"] - short["fit"]
                if turn:  # the first fills the folder
                    steps[name].append(seconds / (LONG - SHORT))
    print("| layout | ms a step, median | each |\n|---|---|---|")
    for name, found in steps.items():
        each = ", ".join(f"{1e3 * value:.0f}" for value in found)
        print(f"| {name} | {1e3 * median(found):.0f} | {each} |")
    one, two = map(median, steps.values())
    print(f"| two processes / one | {two / one:.2f} | |")


def _middle(found: list[dict], key: str) -> float:
    return median(one[key] for one in found)


if __name__ == "__main__":
    main()
