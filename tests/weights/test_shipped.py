"""Checkpoints that come with the package: named, described and checked."""

import json

import numpy as np
import pytest

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import unflatten
from flaxtransfer.weights import IMAGENET, Pretrained, card, load, locations, save

TINY = ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the package has it, with one small checkpoint."""
    monkeypatch.setattr(locations, "BUILTIN_FOLDER", tmp_path)
    leaves = {path: np.ones(shape, np.float32) for path, shape in leaf_shapes(TINY).items()}
    digest = save(
        tmp_path / f"{locations.BUILTIN_DEFAULT}.safetensors",
        Pretrained(unflatten(leaves), TINY, IMAGENET, class_names=("no", "yes")),
    )
    fields = {"data": "ones", "command": "none", "accuracy": 0.5, "seed": 0, "sha256": digest}
    (tmp_path / f"{locations.BUILTIN_DEFAULT}.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.mark.parametrize("source", ["builtin", f"builtin:{locations.BUILTIN_DEFAULT}"])
def test_by_name(folder, source):
    checkpoint = load(source)
    assert checkpoint.source == f"builtin:{locations.BUILTIN_DEFAULT}"
    assert checkpoint.config == TINY
    assert checkpoint.class_names == ("no", "yes")
    assert checkpoint.sha256 == card()["sha256"] == card(locations.BUILTIN_DEFAULT)["sha256"]


def test_an_unknown_name_says_what_there_is(folder):
    with pytest.raises(
        ValueError,
        match="unknown built-in checkpoint 'resnet18w32_drwan'; did you mean 'resnet18w32_drawn'",
    ):
        load("builtin:resnet18w32_drwan")


def test_an_empty_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "BUILTIN_FOLDER", tmp_path / "none")
    with pytest.raises(ValueError, match="known: none"):
        load("builtin")


def test_a_file_that_is_not_the_card_s_is_refused(folder):
    path = folder / f"{locations.BUILTIN_DEFAULT}.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"as its card states, got .* install the p"):
        load("builtin")


def test_a_card_without_its_fields_is_refused(folder):
    (folder / f"{locations.BUILTIN_DEFAULT}.json").write_text('{"data": "ones"}')
    with pytest.raises(ValueError, match=r"lacks \['command', 'accuracy', 'seed', 'sha256'\]"):
        load("builtin")
