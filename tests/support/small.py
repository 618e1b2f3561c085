"""A network and data small enough to train in a test, and to be killed in the middle of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax

import flaxtransfer as ft

CONFIG = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3)
SIZE = 16
PREPROCESSING = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)


def network(seed: int = 0) -> tuple[ft.Model, ft.models.Variables]:
    model = ft.resnet(CONFIG)
    return model, model.init(jax.random.key(seed), (SIZE, SIZE, 3))


def batch(number: int, size: int = 8) -> ft.data.Batch:
    """Brightness names the class, so that it can be learned."""
    random = np.random.default_rng([1, number])
    label = random.integers(0, 3, size)
    noise = random.integers(0, 40, (size, SIZE, SIZE, 3))
    return {
        "image": (noise + 90 * label[:, None, None, None]).astype(np.uint8),
        "label": label.astype(np.int32),
    }


def feed(
    *, validation: bool = True, make: Callable[[int], ft.data.Batch] = batch
) -> ft.data.DataLoaders:
    def train(start: int) -> Iterator[ft.data.Batch]:
        return map(make, itertools.count(start))

    return ft.data.DataLoaders(
        train=train,
        steps_per_epoch=4,
        validation=(lambda: map(make, range(10_000, 10_002))) if validation else None,
        preprocessing=PREPROCESSING,
        class_names=("dark", "gray", "bright"),
    )


def two_phases(params: ft.models.Params, *, steps: int = 8, **changes: object) -> ft.Plan:
    """Head and last stage, then everything but the stem, with every kind of decay and average."""
    first = ft.label(params, {"new": ft.head(), "frozen": ft.rest()})
    second = ft.label(params, {"new": ft.head(), "old": ft.stages(1, 2, 3, 4), "frozen": ft.stem()})
    adam = ft.Group(optax.adamw, 3e-3, weight_decay=0.1)
    settings = {"steps": steps, "clip": 1.0, **changes}
    return ft.Plan(
        [
            ft.Phase(first, {"new": adam, "frozen": ft.FROZEN}, name="head", **settings),
            ft.Phase(
                second,
                {
                    "new": adam,
                    "old": ft.Group(optax.adamw, 1e-3, weight_decay=0.1),
                    "frozen": ft.FROZEN,
                },
                name="all but the stem",
                **settings,
            ),
        ]
    )


def progressive(params: ft.models.Params, **changes: object) -> ft.Plan:
    """Part by part to the stem, under every rule there is: patience inside and between phases."""
    settings = {
        "steps": 9,
        "patience": 2,
        "stop_after": None,
        "min_gain": 0.01,
        "min_z": 1.0,
        "learning_rate": 3e-3,
        "head_learning_rate": 3e-3,
        **changes,
    }
    return ft.recipes.progressive_unfreezing(params, **settings)
