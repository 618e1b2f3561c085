"""A finished run that tells dark images from bright ones, not always, and images to use it on."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

import flaxtransfer as ft
from flaxtransfer.domain.images import reader, target_logits
from flaxtransfer.models import lax_conv
from flaxtransfer.training import run_folder

SIZE = 16
PREPROCESSING = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
MIDDLE, APART, SPREAD = 128, 15, 20
"""Gray levels of dark and bright images overlap: the right answer depends on the prior."""


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


def finish_run(folder: Path) -> None:
    """Random features, their best head, 200 validation examples; no image stays."""
    folder.mkdir()
    config = ft.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=2)
    model = ft.Model(config, convolution=lax_conv)
    variables = jax.device_get(model.init(jax.random.key(0)))
    images, labels = draw(0.5, 200, 0)
    features, _ = ft.pooled_features(
        model, variables, [{"image": images, "label": labels}], PREPROCESSING
    )
    head = LogisticRegression(C=10.0, max_iter=5000).fit(features, labels)
    one = np.float32(head.coef_.T)
    variables["params"]["fc"] = {
        "kernel": np.concatenate([-one, one], 1) / 2,
        "bias": np.float32([-1, 1]) * np.float32(head.intercept_) / 2,
    }
    held, known = draw(0.5, 200, 1)
    logits = target_logits(model, variables, reader(held, 200), PREPROCESSING)
    feed = ft.Feed(iter, 1, None, PREPROCESSING, ("dark", "bright"))
    run_folder.finish(folder, model, variables, feed, 1, ft.Predictions(logits, known))
