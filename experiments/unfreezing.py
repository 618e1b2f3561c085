"""Does progressive unfreezing stop where it should? Three targets whose right answer is known.

    python experiments/unfreezing.py                     # 3 targets x 2 rules x 8 seeds
    python experiments/unfreezing.py --validation 200    # the same judged by few images
    python experiments/unfreezing.py --print-only

A small network with random weights is the student. Its targets are what a teacher, made from it,
says about random images; images that the teacher finds hard are left out.

- layer4: the teacher is the student with another layer4 and a head. Everything below is right as
  it is, so that the head and layer4 are to be kept and layer3 is to be undone.
- everything: every part of the teacher differs from the student's, down to the stem.
- nothing: the teacher is the student with a head, and 30 % of the few training labels are drawn at
  random. What a head can learn is all there is; what moves beside it learns the wrong labels. The
  labels of the validation images are right.

The recipe has the same settings in all three. Results are appended to a file, and what is there
already is not computed again.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import flaxtransfer as ft
from flaxtransfer.models import flatten, selected, unflatten
from flaxtransfer.training import read_metrics
from flaxtransfer.weights import normalize

SIZE, CLASSES = 16, 4
PREPROCESSING = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
BATCH = 128
PHASES = ("head", "+ layer4", "+ layer3", "+ layer2", "+ layer1", "+ stem")


@dataclass(frozen=True)
class Target:
    """What a teacher differs in from the student, and what follows from it.

    Args:
      keeps: phases that the right answer keeps, of ``PHASES``.
      turns: for each part of the network, how far the teacher's kernels are turned toward others
        of the same distribution: 0 is the student's own, 1 others altogether.
      images: for training.
      noise: share of the training labels that are drawn at random.
    """

    keeps: int
    turns: Mapping[str, float]
    images: int
    noise: float = 0.0


TARGETS = {
    "layer4": Target(keeps=2, turns={"layer4": 0.6}, images=512),
    "everything": Target(
        keeps=6,
        turns={"conv1": 0.12, "layer1": 0.2, "layer2": 0.12, "layer3": 0.18, "layer4": 0.8},
        images=16_000,
    ),
    "nothing": Target(keeps=1, turns={}, images=512, noise=0.3),
}


@dataclass(frozen=True)
class Unfreezing:
    """Which cases, rules and seeds to run.

    Args:
      targets: of "layer4", "everything" and "nothing".
      min_z: rules: standard errors that a gain has to exceed.
      stop_after: phases in a row without gain after which it ends.
      validation: validation images.
      seeds: of student, teacher, images and order.
      steps: optimizer steps a phase.
      results: JSON lines.
      print_only: print the tables of what is there.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    min_z: tuple[float, ...] = (0.0, 2.0)
    stop_after: int = 1
    validation: int = 4000
    seeds: tuple[int, ...] = tuple(range(8))
    steps: int = 150
    results: Path = Path("runs/unfreezing.jsonl")
    print_only: bool = False


@dataclass(frozen=True)
class Case:
    """A student, and what it is to learn."""

    model: ft.Model
    variables: ft.models.Variables
    feed: ft.data.DataLoaders


def case(name: str, seed: int, validation: int) -> Case:
    """Draws a student, its teacher, and images with the teacher's labels."""
    target = TARGETS[name]
    random = np.random.default_rng([seed, 0])
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=CLASSES))
    start, other = (
        model.init(jax.random.key(2 * seed + k), (SIZE, SIZE, 3))["params"] for k in (0, 1)
    )
    wanted = target.images + validation
    images = draw(random, 2 * wanted + 200)  # The harder half goes, and ties with it.
    student = settled(model, start, images[:2048])
    teacher = settled(model, turned(start, other, target.turns), images[:2048])
    logits = answers(model, teacher, images, random)
    best = np.sort(logits, axis=1)
    easy = best[:, -1] - best[:, -2] > np.median(best[:, -1] - best[:, -2])
    images, labels = images[easy][:wanted], logits.argmax(1)[easy][:wanted].astype(np.int32)
    train, held = slice(target.images), slice(target.images, None)
    wrong = random.random(target.images) < target.noise
    given = np.where(wrong, random.integers(0, CLASSES, target.images), labels[train])
    feed = array_feed(images[train], given.astype(np.int32), images[held], labels[held], seed)
    return Case(model, student, feed)


def draw(random: np.random.Generator, count: int) -> np.ndarray:
    """Random images uint8 [count, 16, 16, 3]: colored squares under fine noise."""
    squares = random.normal(size=(count, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    noise = random.normal(size=(count, SIZE, SIZE, 3))
    return np.clip(128 + 45 * squares + 25 * noise, 0, 255).astype(np.uint8)


def turned(
    start: ft.models.Params, other: ft.models.Params, turns: Mapping[str, float]
) -> ft.models.Params:
    """Kernels turned from ``start`` toward ``other``; their variance stays what it was."""
    theirs = flatten(other)
    kernels = selected(ft.kernels(), start)

    def turn(path: str, leaf: Any) -> Any:
        angle = turns.get(path.split("/")[0], 0.0) * np.pi / 2
        return np.cos(angle) * leaf + np.sin(angle) * theirs[path] if path in kernels else leaf

    return unflatten({path: turn(path, leaf) for path, leaf in flatten(start).items()})


def settled(model: ft.Model, params: ft.models.Params, images: np.ndarray) -> ft.models.Variables:
    """A network whose BatchNorms know the images, with a head that says nothing yet."""
    variables = {
        "params": {**params, "fc": jax.tree.map(jnp.zeros_like, params["fc"])},
        "batch_stats": model.init(jax.random.key(0), (SIZE, SIZE, 3))["batch_stats"],
    }
    batches = [{"image": images, "label": np.zeros(len(images), np.int32)}]
    return {
        **variables,
        "batch_stats": ft.training.recalibrate(
            ft.Classifier(model, variables, PREPROCESSING), batches
        ),
    }


def answers(
    model: ft.Model, teacher: ft.models.Variables, images: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Logits [images, classes] of a random head on the teacher's standardized features."""

    @jax.jit
    def pooled(part: np.ndarray) -> jax.Array:
        return model.apply(
            teacher, normalize(part, PREPROCESSING.mean, PREPROCESSING.std), stop="head"
        )[0]

    parts = np.array_split(images, -(-len(images) // 1000))
    features = np.concatenate([np.asarray(pooled(part)) for part in parts])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    logits = features @ random.normal(size=(features.shape[1], CLASSES))
    return logits - np.median(logits, axis=0)


def array_feed(
    images: np.ndarray, labels: np.ndarray, held: np.ndarray, answers: np.ndarray, seed: int
) -> ft.data.DataLoaders:
    """Batches of arrays in memory, without augmentation, which would change the answers."""
    an_epoch = len(images) // BATCH

    def batch(number: int) -> ft.data.Batch:
        epoch, place = divmod(number, an_epoch)
        order = np.random.default_rng([seed, 1, epoch]).permutation(len(images))
        chosen = order[place * BATCH : (place + 1) * BATCH]
        return {"image": images[chosen], "label": labels[chosen]}

    def train(start: int) -> Iterator[ft.data.Batch]:
        return map(batch, itertools.count(start))

    def validation() -> list[ft.data.Batch]:
        parts = np.array_split(np.arange(len(held)), -(-len(held) // 500))
        return [{"image": held[part], "label": answers[part]} for part in parts]

    names = tuple(f"class {k}" for k in range(CLASSES))
    return ft.data.DataLoaders(train, an_epoch, validation, PREPROCESSING, names)


def unfreeze(
    made: Case, folder: Path, *, steps: int, min_z: float, stop_after: int = 1
) -> list[dict[str, Any]]:
    """The decisions of a run of the recipe, from the top down."""
    plan = ft.recipes.progressive_unfreezing(
        made.variables["params"],
        steps=steps,
        learning_rate=3e-3,
        head_learning_rate=1e-2,
        decay=1.0,
        min_z=min_z,
        stop_after=stop_after,
    )
    options = ft.FitOptions(evaluate_every=max(1, steps // 10))
    ft.fit(
        ft.Classifier(made.model, made.variables, made.feed.preprocessing),
        plan,
        made.feed,
        folder,
        options=options,
    )
    return [row for row in read_metrics(folder) if row["kind"] == "decision"]


def reached(decisions: list[dict[str, Any]]) -> int:
    """How far down the network was kept: the number of phases up to the last that was."""
    return max(number for number, row in enumerate(decisions, 1) if row["kept"])


def main(config: Unfreezing) -> None:
    """Computes what is missing and prints the tables."""
    config.results.parent.mkdir(parents=True, exist_ok=True)
    for name, seed in itertools.product(config.targets, () if config.print_only else config.seeds):
        made = None
        for min_z in config.min_z:
            key = key_of(config, name, min_z) | {"seed": seed}
            if find(config.results, key):
                continue
            made = made or case(name, seed, config.validation)
            with tempfile.TemporaryDirectory() as folder:
                decisions = unfreeze(
                    made,
                    Path(folder) / "run",
                    steps=config.steps,
                    min_z=min_z,
                    stop_after=config.stop_after,
                )
            with config.results.open("a") as file:
                file.write(json.dumps({**key, "decisions": decisions}) + "\n")
    print_log(config)
    print_table(config)


def key_of(config: Unfreezing, target: str, min_z: float) -> dict[str, Any]:
    """What a result was computed with, apart from its seed."""
    return {
        "target": target,
        "min_z": min_z,
        "stop_after": config.stop_after,
        "validation": config.validation,
        "steps": config.steps,
    }


def find(path: Path, key: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results that agree with all of ``key``."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def print_log(config: Unfreezing) -> None:
    """Each decision of the first seed under the last rule, with its evidence, in Markdown."""
    print("| target | phase | accuracy before | after | won | lost | z | verdict |")
    print("|---" * 8 + "|")
    for name in config.targets:
        key = key_of(config, name, config.min_z[-1]) | {"seed": config.seeds[0]}
        for row in itertools.chain.from_iterable(r["decisions"] for r in find(config.results, key)):
            verdict = "kept" if row["kept"] else "undone"
            if "z" in row:
                cells = [
                    f"{100 * row['accuracy_before']:.1f}",
                    f"{100 * row['accuracy']:.1f}",
                    row["won"],
                    row["lost"],
                    f"{row['z']:.1f}",
                    verdict,
                ]
            else:
                cells = ["", f"{100 * row['accuracy']:.1f}", "", "", "", verdict]
            print("| " + " | ".join(map(str, [name, row["phase"], *cells])) + " |")
    print()


def print_table(config: Unfreezing) -> None:
    """How often each rule was right, and where it stopped otherwise, in Markdown."""
    columns = [f"z > {min_z:g}" for min_z in config.min_z]
    print("| target | right answer | " + " | ".join(columns) + " |")
    print("|---" * (2 + len(columns)) + "|")
    for name in config.targets:
        right, cells = TARGETS[name].keeps, []
        for min_z in config.min_z:
            found = find(config.results, key_of(config, name, min_z))
            rows = [row for row in found if row["seed"] in config.seeds]
            counts = [reached(row["decisions"]) for row in rows]
            wrong = sorted({c for c in counts if c != right})
            text = [f"{counts.count(right)} of {len(counts)}"]
            text += [f"{counts.count(c)}: {PHASES[c - 1]}" for c in wrong]
            cells.append("; ".join(text))
        print("| " + " | ".join([name, PHASES[right - 1], *cells]) + " |")


if __name__ == "__main__":
    main(tyro.cli(Unfreezing))
