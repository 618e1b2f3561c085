"""A run of three phases and a race to be killed and damaged, and what they must end with.

Two phases train on cached activations, the third everything on images, with an average.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax

import flaxtransfer as ft
from flaxtransfer.advice.auto import beginning, choose
from flaxtransfer.training.console import read_metrics
from flaxtransfer.training.run_folder import RACE
from tests.support import targets
from tests.support.small import PREPROCESSING, SIZE, network

STEPS = 4
TRAIN, HELD = 24, 12
OPTIONS = ft.FitOptions(evaluate_every=2, log_every=2)


def data(seed: int = 0) -> ft.data.DataLoaders:
    """Brightness names the class."""
    random = np.random.default_rng(seed)
    labels = np.arange(TRAIN + HELD) % 3
    noise = random.integers(0, 40, (len(labels), SIZE, SIZE, 3))
    images = (noise + 90 * labels[:, None, None, None]).astype(np.uint8)
    source = ft.ArraySource(images, labels, ("dark", "gray", "bright"))
    splits = ft.data.Splits.of(range(TRAIN), range(TRAIN, TRAIN + HELD))
    transform = ft.data.evaluation_transform(PREPROCESSING, channels=3)
    return ft.loaders(source, splits, PREPROCESSING, batch_size=8, transform=transform, seed=seed)


def cut_off(loaders: ft.data.DataLoaders, at: int) -> ft.data.DataLoaders:
    """The same batches, until the power fails at one of them."""

    def train(start: int) -> Iterator[ft.data.Batch]:
        for number in itertools.count(start):
            if number == at:
                raise OSError("power cut")
            yield next(iter(loaders.train(number)))

    return replace(loaders, train=train)


def plan(params: ft.models.Params) -> ft.Plan:
    adam = ft.Group(optax.adamw, 3e-3, weight_decay=0.1)

    def phase(name: str, rules: dict[str, ft.Mask], **settings: object) -> ft.Phase:
        labels = ft.label(params, {**rules, "frozen": ft.rest()})
        groups = dict.fromkeys(rules, adam) | {"frozen": ft.FROZEN}
        return ft.Phase(labels, groups, name=name, steps=STEPS, clip=1.0, **settings)

    head, late = {"head": ft.head()}, {"late": ft.stage(4)}
    return ft.Plan(
        [
            phase("head", head),
            phase("late", head | late),
            phase("all", head | late | {"early": ft.stem() | ft.stages(1, 2, 3)}, ema=0.9),
        ]
    )


def fit(folder: Path, *, at: int | None = None, seed: int = 0) -> ft.training.FitResult:
    """Runs or resumes it; ``at`` is the batch at which the power fails."""
    model, variables = network(seed)
    loaders = data(seed)
    return ft.fit(
        ft.Classifier(model, variables, PREPROCESSING),
        plan(variables["params"]),
        loaders if at is None else cut_off(loaders, at),
        folder,
        seed=seed,
        resume=True,
        options=OPTIONS,
        cache=ft.Cache("disk"),
    )


def outcome(folder: Path) -> dict[str, str]:
    """What must be the same after any number of kills."""
    rows = [row for row in read_metrics(folder) if row["kind"] not in ("cache", "damage")]
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "audit.json", "result.json", "validation.npz")
    }
    return found | {"metrics": json.dumps(rows)}


def race(folder: Path) -> None:
    """Chooses a strategy by a race of two challengers, and trains it; resumes both."""
    source, short = targets.source("colors", 9, 1), {"steps": STEPS}
    splits = ft.stratified_split(source.labels(), test_fraction=0.2)
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=8))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    start = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    choice = choose(
        start,
        source,
        splits,
        folder / RACE,
        budget="3x",
        batch_size=16,
        lengths=lambda name: {} if name.endswith("_head") else short,
    )
    one = choice.candidate
    ft.fit(
        beginning(one.strategy, start, 0),
        one.plan(start.params, {} if one.cost == 0 else short),
        ft.loaders(source, splits, preprocessing, batch_size=16),
        folder,
        resume=True,
    )


def race_outcome(folder: Path) -> dict[str, str]:
    """The same of a race: the decision, and the weights of every run."""
    choice = json.loads((folder / RACE / "choice.json").read_text())
    runs = sorted(path.parent for path in folder.rglob("model.safetensors"))
    found = {
        str(run.relative_to(folder)): hashlib.sha256(
            (run / "model.safetensors").read_bytes()
        ).hexdigest()
        for run in runs
    }
    return found | {name: json.dumps(choice[name]) for name in ("candidate", "race", "runs")}


JOBS = {"fit": (fit, outcome), "race": (race, race_outcome)}
"""What can be killed, and what must be the same afterwards."""


def litter(folder: Path) -> list[str]:
    """What a finished run must not leave behind."""
    names = [path.name for path in folder.iterdir()]
    steps = [path.name for path in (folder / "checkpoints").iterdir()]
    left = [name for name in names if name.startswith(".") and name != ".lock"]
    return left + [n for n in steps if not n.isdecimal() and n != ".lock"]
