"""``train --resume`` at the terminal: the same run, another one, and what is damaged."""

from __future__ import annotations

import json
import shutil

import pytest

import flaxtransfer as ft
from flaxtransfer.cli import run
from tests.support.terminal import only_line, train

SAME = ("--labels-per-class", 4, "--batch-size", 8, "--head-steps", 20, "--fine-tune-steps", 4)


@pytest.fixture
def copies(folder, finished, weights, tmp_path):
    """Images, weights and the finished run, to be changed."""
    shutil.copytree(folder, tmp_path / "images")
    shutil.copytree(finished, tmp_path / "run")
    shutil.copy(weights, tmp_path / "weights.safetensors")
    return tmp_path / "images", tmp_path / "weights.safetensors", tmp_path / "run"


def test_another_place_is_the_same_run(copies, capsys, monkeypatch):
    """Copies under other names, by a relative path from elsewhere."""
    images, weights, target = copies
    before = (target / "summary.json").read_text()
    monkeypatch.chdir(images.parent)
    assert run(train(images.name, weights.name, target, *SAME, "--resume")) == 0
    assert (target / "summary.json").read_text() == before
    assert "made again" not in capsys.readouterr().out


def test_a_new_image_is_left_out_and_said(copies, capsys):
    images, weights, target = copies
    shutil.copy(images / "dark/0.png", images / "dark/new.png")
    assert run(train(images, weights, target, *SAME, "--resume")) == 0
    assert "1 new example belongs to no part of the run" in capsys.readouterr().out


def rename_class(images, weights):
    (images / "dark").rename(images / "night")


def delete_image(images, weights):
    (images / "dark/3.png").unlink()


def replace_image(images, weights):
    shutil.copy(images / "dark/4.png", images / "dark/3.png")


def move_image(images, weights):
    (images / "dark/3.png").rename(images / "bright/moved.png")


def replace_weights(images, weights):
    checkpoint = ft.load(weights)
    stem = checkpoint.variables["params"]["conv1"]
    stem["kernel"] = stem["kernel"] * 1.01
    ft.save(weights, checkpoint)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename_class, "dark/0.png (now night/0.png)"),
        (delete_image, "1 images of the run are missing from"),
        (replace_image, "1 example is changed: dark/3.png"),
        (move_image, "dark/3.png (now bright/moved.png)"),
        (replace_weights, "the weights that training starts from are others"),
    ],
)
def test_other_images_or_weights_are_another_run(copies, change, text, capsys):
    images, weights, target = copies
    change(images, weights)
    assert run(train(images, weights, target, *SAME, "--resume")) == 2
    assert text in only_line(capsys)


@pytest.mark.parametrize("name", ["summary.json", "model.safetensors", "config.json"])
def test_what_is_damaged_is_named_and_made_again(copies, name, capsys):
    images, weights, target = copies
    before = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    (target / name).write_bytes(before[name][:-9] + b"x" * 9)
    if name == "model.safetensors":
        for words in (["evaluate", str(target)], ["convert", str(target / name), "x.safetensors"]):
            assert run(words) == 2
            said = "model.safetensors: it was changed since the run wrote it; flaxtransfer train"
            assert said in only_line(capsys)
    assert run(train(images, weights, target, *SAME, "--resume")) == 0
    assert f"{name} " in capsys.readouterr().out
    for kept in ("model.safetensors", "result.json"):
        assert (target / kept).read_bytes() == before[kept]
    assert json.loads((target / "config.json").read_text())["seed"] == 0
    summary = json.loads((target / "summary.json").read_text())
    trained = json.loads(before["summary.json"])
    assert [row["accuracy"] for row in summary["results"]] == [
        row["accuracy"] for row in trained["results"]
    ]
    assert run(["evaluate", str(target)]) == 0
