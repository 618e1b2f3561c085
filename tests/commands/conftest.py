"""Images, weights and a finished run, as small as they can be."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.cli import run
from tests.support.terminal import SIZE, train


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Two classes of small images that brightness tells apart."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, level in (("dark", 30), ("bright", 200)):
        (root / name).mkdir()
        for number in range(8):
            pixels = random.integers(level - 30, level + 30, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny checkpoint in the format of torchvision."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=5)
    model = ft.resnet(config)
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), (SIZE, SIZE, 3)))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
    ft.save(path, ft.Pretrained(variables, config, preprocessing))
    return path


@pytest.fixture(scope="session")
def finished(folder, weights, tmp_path_factory) -> Path:
    """A finished run on the folder."""
    target = tmp_path_factory.mktemp("runs") / "run"
    size = ("--labels-per-class", 4, "--batch-size", 8)
    assert (
        run(train(folder, weights, target, *size, "--head-steps", 20, "--fine-tune-steps", 4)) == 0
    )
    return target
