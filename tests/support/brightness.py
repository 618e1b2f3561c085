"""A finished run that tells dark images from bright ones, not always, and images to use it on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.files import write_json
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.training import run_folder
from flaxtransfer.training.step import forward_with_features

SIZE = 16
PREPROCESSING = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
MIDDLE, APART, SPREAD = 128, 15, 20
"""Gray levels of dark and bright images overlap: the right answer depends on the prior."""

OFFSET = 4
"""Keeps brightness, in deviations of the preprocessing, above 0 on its way through the network."""


def draw(bright: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random(count) < bright).astype(int)
    level = MIDDLE + APART * (2 * labels - 1) + random.normal(0, SPREAD, count)
    images = level[:, None, None, None] + random.normal(0, 4, (count, SIZE, SIZE, 1))
    return np.repeat(np.clip(images, 0, 255).astype(np.uint8), 3, axis=-1), labels


def write(images: np.ndarray, folder: Path) -> list[str]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    return [str(path) for path in paths]


def brightness_network(model: ft.Model) -> ft.models.Variables:
    """Its first channel is the brightness of the image, all others are 0; by the logits' odds.

    Blocks are identities, and the log-odds of the two classes are those of Bayes' rule, but for
    what max-pooling makes of the noise.
    """

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        found = np.full(shape, path.endswith(("/var", "/scale")), np.float32)
        if path.endswith("bn2/scale"):
            found[:] = 0
        if path.endswith("downsample/0/kernel"):
            found[0, 0, 0, 0] = 1
        if path == "params/conv1/kernel":
            found[3, 3, :, 0] = 1 / 3
        if path == "params/bn1/bias":
            found[0] = OFFSET
        slope = APART / SPREAD**2 * 255 * PREPROCESSING.std[0]
        if path == "params/fc/kernel":
            found[0] = -slope, slope
        if path == "params/fc/bias":
            found[:] = slope * OFFSET, -slope * OFFSET
        return found

    flat = flatten(model.abstract())
    return unflatten({path: leaf(path, abstract.shape) for path, abstract in flat.items()})


def finish_run(folder: Path) -> None:
    """A folder with the network and its word on 208 validation examples; no image stays."""
    folder.mkdir()
    model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=2))
    variables = brightness_network(model)
    held, known = draw(0.5, 208, 1)
    network = forward_with_features(model, PREPROCESSING)
    parts = [network(variables, held[n : n + 16]) for n in range(0, 208, 16)]
    logits, features = map(np.concatenate, zip(*parts, strict=True))
    trained = ft.Classifier(model, variables, PREPROCESSING, ("dark", "bright"))
    predicted = ft.training.Predictions(logits, known, features)
    write_json(folder / run_folder.CONFIG_FILE, {"compute": "float32"})
    run_folder.finish(folder, trained, 1, predicted, predicted.evaluation())
