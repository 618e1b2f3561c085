"""Handwritten digits from another domain: which correction helps, harms, or refuses, and when.

    python experiments/domain_shift.py                  # at most 20 minutes on 2 CPU cores
    python experiments/domain_shift.py --print-only

For every seed the built-in network gets statistics and the optimal head on 400 noisy digits, and is
calibrated on 400 others. A target is 250 more of them, with other class shares, changed images, or
both. Every method sees the target without labels. It is run without its guard and with it: in the
second table a refusal leaves the network as it was, and is counted. Relabeling (3s are called 5s
and the reverse) stands for what no method can see. Results are appended to a file, one line each,
and what is there already is not computed again.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from scipy.ndimage import gaussian_filter

import flaxtransfer as ft
from flaxtransfer.adapt import (
    adapt_batch_norm,
    adapt_batch_norm_balanced,
    image_reader,
    predict_logits,
    tent,
)
from flaxtransfer.data import evaluation_transform
from flaxtransfer.shift import Calibration, calibrate, correct_prior
from flaxtransfer.training import init_head_from_probe
from workers import append_row, compile_once, read_rows, share


@dataclass(frozen=True)
class DomainShift:
    """Which targets and seeds to run.

    Args:
      seeds: each its own split, shares and noise.
      targets: names, see TARGETS; by default all.
      size: side of the images that the network sees, in px.
      train: labeled images of the source.
      validation: held-out images of the source, for calibration.
      images: of a target.
      concentration: of the Dirichlet distribution that shares are drawn from.
      source_noise: standard deviation of the noise in all images, in gray levels.
      source_weight: N of the mixture N / (N + n).
      learning_rate: of entropy minimization.
      processes: that share the work, each on its part of the CPU cores.
      results: JSON lines.
      print_only: print the tables of what is there.
      worker: number of this process; for the script's own use.
    """

    seeds: tuple[int, ...] = tuple(range(20))
    targets: tuple[str, ...] = ()
    size: int = 32
    train: int = 400
    validation: int = 400
    images: int = 250
    concentration: float = 0.3
    source_noise: float = 110.0
    source_weight: float = 100.0
    learning_rate: float = 1e-3
    processes: int = 2
    results: Path = Path("runs/domain_shift.jsonl")
    print_only: bool = False
    worker: int | None = None


Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def contrast(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A quarter of it, and darker."""
    return 0.25 * (images - 128) + 90


def brightness(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Brighter, with what that takes off the contrast."""
    return 0.5 * images + 120


def blur(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Of 1.5 px, as wide as a third of a stroke."""
    return gaussian_filter(images, (0, 1.5, 1.5, 0))


def noise(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """As much again as the source has, and half of it."""
    return images + random.normal(0, 120, images.shape[:3])[..., None]


def as_it_is(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """No change."""
    return images


@dataclass(frozen=True)
class Target:
    """Class shares ("even", "Dirichlet", "one class"), a change of images, labels exchanged."""

    shares: str = "even"
    change: Change = as_it_is
    relabeled: bool = False


TARGETS = {
    "none": Target(),
    "label shift": Target("Dirichlet"),
    "one class": Target("one class"),
    "contrast": Target(change=contrast),
    "brightness": Target(change=brightness),
    "blur": Target(change=blur),
    "noise": Target(change=noise),
    "label shift, contrast": Target("Dirichlet", contrast),
    "label shift, noise": Target("Dirichlet", noise),
    "one class, contrast": Target("one class", contrast),
    "relabeled": Target(relabeled=True),
}

METHODS = {
    "prior, EM": "prior corrected, maximum likelihood",
    "prior, BBSE": "prior corrected, soft black box estimate",
    "BN target": "BatchNorm statistics of the target",
    "BN mixture": "the same mixed with the source's, N / (N + n)",
    "BN balanced": "class-balanced statistics",
    "entropy": "entropy minimized over BatchNorm's scales and biases",
    "balanced + EM": "class-balanced statistics, then the prior",
}
UNGUARDED = ("prior, BBSE", "BN mixture")
"""The same guards as the line before would speak."""


@dataclass(frozen=True)
class Setting:
    """One seed: a network that knows the source, and the digits that are left for targets."""

    config: DomainShift
    seed: int
    checkpoint: ft.Pretrained
    model: ft.Model
    variables: ft.models.Variables
    source: Calibration
    features: np.ndarray
    """What the head sees of the source's validation examples."""
    images: np.ndarray
    labels: np.ndarray

    def draw(self, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 and the labels that they would have."""
        random = np.random.default_rng([self.seed, 1])
        shares = {
            "even": np.full(10, 0.1),
            "Dirichlet": random.dirichlet(np.full(10, self.config.concentration)),
            "one class": np.eye(10)[self.seed % 10],
        }[target.shares]
        classes = random.choice(10, self.config.images, p=shares)
        chosen = np.array([random.choice(np.flatnonzero(self.labels == k)) for k in classes])
        images = noisy(self.images[chosen], self.config.source_noise, random)
        images = np.clip(target.change(images, random), 0, 255).round().astype(np.uint8)
        if target.relabeled:
            exchange = np.arange(10)
            exchange[[3, 5]] = 5, 3
            classes = exchange[classes]
        return images, classes


def noisy(images: np.ndarray, deviation: float, random: np.random.Generator) -> np.ndarray:
    """Gray noise of this deviation; gray levels stay between 0 and 255."""
    drawn = random.normal(0, deviation, images.shape[:3])[..., None]
    return np.clip(images.astype(np.float32) + drawn, 0, 255)


def prepare(config: DomainShift, seed: int) -> Setting:
    """The network with statistics and head of the source, calibrated."""
    checkpoint, digits = ft.load("builtin"), ft.open_source("digits")
    preprocessing = dataclasses.replace(
        checkpoint.preprocessing, size=config.size, resize=config.size
    )
    checkpoint = dataclasses.replace(checkpoint, preprocessing=preprocessing)
    transform, random = evaluation_transform(preprocessing), np.random.default_rng([seed, 0])
    images = np.stack([transform(digits[n]["image"], random) for n in range(len(digits))])
    labels, order = digits.labels(), random.permutation(len(digits))
    cuts = np.cumsum([config.train, config.validation])
    train, validation, rest = np.split(order, cuts)

    def source(rows: np.ndarray) -> np.ndarray:
        return noisy(images[rows], config.source_noise, random).round().astype(np.uint8)

    network = ft.transfer(checkpoint, classes=10, seed=seed)
    model, variables = network.model, network.variables
    batch = [{"image": source(train), "label": labels[train]}]
    statistics = ft.training.recalibrate(ft.Classifier(model, variables, preprocessing), batch)
    variables = {**variables, "batch_stats": statistics}
    params, _ = init_head_from_probe(ft.Classifier(model, variables, preprocessing), batch)
    variables = jax.device_get({**variables, "params": params})
    held = image_reader(source(validation), config.validation)
    seen = ft.adapt.model_outputs(ft.Classifier(model, variables, preprocessing), held())
    known = calibrate(seen.logits, labels[validation])
    return Setting(
        config, seed, checkpoint, model, variables, known, seen.features, images[rest], labels[rest]
    )


def run(setting: Setting, target: Target) -> dict[str, Any]:
    """Accuracy of each method without its guard, and whether the guard would have refused it."""
    began = time.perf_counter()
    config, source = setting.config, setting.source
    images, labels = setting.draw(target)
    network = ft.Classifier(setting.model, setting.variables, setting.checkpoint.preprocessing)
    read = image_reader(images, config.images)

    def logits(variables: ft.models.Variables) -> np.ndarray:
        return predict_logits(network.with_variables(variables), read)

    def accuracy(scores: np.ndarray) -> float:
        return float((scores.argmax(1) == labels).mean())

    found: dict[str, float] = {}
    refused: dict[str, bool] = {}
    options = {"batch_size": config.images, "guard": "warn"}
    seen = ft.adapt.model_outputs(network, read())
    plain, features = seen.logits, (setting.features, seen.features)
    as_is = accuracy(source.apply(plain))

    by_likelihood = correct_prior(plain, source, features=features, guard="warn")
    found["prior, EM"] = accuracy(by_likelihood.probabilities)
    refused["prior, EM"] = bool(by_likelihood.refusals)
    by_box = correct_prior(plain, source, guard="warn", method="bbse_soft", level=0)
    found["prior, BBSE"] = accuracy(by_box.probabilities)

    adapted, report = adapt_batch_norm(network, images, source=source, **options)
    found["BN target"] = accuracy(source.apply(logits(adapted)))
    refused["BN target"] = bool(report.refusals)
    mixed, _ = adapt_batch_norm(network, images, source_weight=config.source_weight, **options)
    found["BN mixture"] = accuracy(source.apply(logits(mixed)))

    balanced, report = adapt_batch_norm_balanced(network, images, source, rounds=3, **options)
    scores = logits(balanced)
    found["BN balanced"] = accuracy(source.apply(scores))
    refused["BN balanced"] = bool(report.refusals)
    # Without features: statistics of other images give others, even where classes look the same.
    both = correct_prior(scores, source, guard="warn")
    found["balanced + EM"] = accuracy(both.probabilities)

    _, entropy = tent(
        network,
        images,
        source=source,
        learning_rate=config.learning_rate,
        batch_size=64,
        guard="warn",
        seed=setting.seed,
    )
    found["entropy"] = accuracy(source.apply(entropy.logits))
    refused["entropy"] = bool(entropy.refusals)

    guarded = {name: as_is if refused[name] else found[name] for name in refused}
    # Each of the two with its own guard: the second looks at the network that the first leaves.
    last = by_likelihood if refused["BN balanced"] else both
    guarded["balanced + EM"] = accuracy(last.calibrated if last.refusals else last.probabilities)
    refused["balanced + EM"] = refused["BN balanced"] and bool(last.refusals)
    return {
        "as is": as_is,
        "without": found,
        "with": guarded,
        "refused": refused,
        "seconds": round(time.perf_counter() - began, 1),
    }


def compute(config: DomainShift) -> None:
    """Appends what is missing, in this process."""
    compile_once(config.results.parent / "compiled")
    for number, seed in enumerate(config.seeds):
        there = read_results(config.results)
        missing = [name for name in names(config) if (name, seed) not in there]
        if not missing or config.worker not in (None, number % config.processes):
            continue
        setting = prepare(config, seed)
        for name in missing:
            row = {"target": name, "seed": seed, **run(setting, TARGETS[name])}
            append_row(config.results, row)


def names(config: DomainShift) -> tuple[str, ...]:
    """The targets that were asked for."""
    return config.targets or tuple(TARGETS)


def read_results(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Results by target and seed."""
    return {(row["target"], row["seed"]): row for row in read_rows(path)}


def print_tables(config: DomainShift, found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Mean ± sd of the accuracy in percent, without guards and with them, in Markdown."""
    for name, meaning in METHODS.items():
        print(f"- {name}: {meaning}")
    for guard, shown in (
        ("without", tuple(METHODS)),
        ("with", tuple(n for n in METHODS if n not in UNGUARDED)),
    ):
        many = len({seed for _, seed in found})
        print(f"\n{guard} guards, {many} seeds\n")
        print("| target | as is | " + " | ".join(shown) + " |")
        print("|---" * (2 + len(shown)) + "|")
        for target in names(config):
            rows = [row for (name, _), row in found.items() if name == target]
            if rows:
                cells = [spread([row["as is"] for row in rows])]
                for name in shown:
                    cell = spread([row[guard][name] for row in rows])
                    times = sum(row["refused"].get(name, False) for row in rows)
                    cells.append(f"{cell} ({times} refused)" if guard == "with" and times else cell)
                print(f"| {target} | " + " | ".join(cells) + " |")


def spread(values: list[float]) -> str:
    """Mean ± sd in percent."""
    percent = 100 * np.array(values)
    return f"{percent.mean():.1f} ± {percent.std(ddof=1) if len(percent) > 1 else 0.0:.1f}"


def main(config: DomainShift) -> None:
    """Computes what is missing and prints the tables."""
    if unknown := [name for name in config.targets if name not in TARGETS]:
        print(f"no targets {unknown}; there are {list(TARGETS)}", file=sys.stderr)
        raise SystemExit(2)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    if config.worker is not None or (config.processes == 1 and not config.print_only):
        compute(config)
    elif not config.print_only:
        share(config.processes)
    if config.worker is None:
        print_tables(config, read_results(config.results))


if __name__ == "__main__":
    main(tyro.cli(DomainShift))
