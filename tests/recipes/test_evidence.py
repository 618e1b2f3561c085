"""What strategies measure first: on a part of the images, in which no class may be missing."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

import flaxtransfer as ft
from flaxtransfer.cli import run
from tests.support.terminal import train

SIZE = 16


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    """Twelve dark images and three bright ones."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, level, count in (("dark", 30, 12), ("bright", 200, 3)):
        (root / name).mkdir()
        for number in range(count):
            pixels = random.integers(level - 30, level + 30, (SIZE, SIZE, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    config = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=5)
    variables = jax.tree.map(np.asarray, ft.resnet(config).init(jax.random.key(0), (SIZE, SIZE, 3)))
    preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)
    ft.save(path, ft.Pretrained(variables, config, preprocessing))
    return path


def test_a_rare_class_is_measured_too(rare, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flaxtransfer.recipes.parts.MOST_IMAGES", 2)
    monkeypatch.setattr("flaxtransfer.commands.job.MOST_IMAGES_FOR_HEADS", 3)
    few = ("--strategy", "gradient_scaled", "--steps", 1, "--batch-size", 8, "--test-fraction", 0.4)
    code = run(train(rare, weights, tmp_path / "run", *few))
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "measured with logistic regression on 2 examples" in shown.out
    assert "no baseline" not in shown.out
