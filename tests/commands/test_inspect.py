"""``flaxtransfer models FILE``: what a file holds, what would be taken, and why not."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from flaxtransfer.cli import run
from tests.support.terminal import only_line
from tests.support.torch_files import save_torch


@pytest.fixture(scope="module")
def arrays():
    """A small network of torchvision's, with 7 classes."""
    return load_file("tests/golden/torchvision_basic/model.safetensors")


@pytest.fixture
def shown(capsys, monkeypatch):
    """Runs ``models`` on a file; its output as one text, after a look at its width."""
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*words):
        assert run(["models", *map(str, words)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        return " ".join(" ".join(lines).split())

    return shown


def halved(arrays):
    return {
        key: array * np.float32(0.5) if array.dtype == np.float32 else array
        for key, array in arrays.items()
    }


def test_how_a_file_is_built_and_what_is_taken(arrays, shown, tmp_path):
    """The counts are those of the golden network, by its own file."""
    content = {
        "model": arrays,
        "model_ema": {f"module.{key}": array for key, array in halved(arrays).items()},
        "optimizer": {"state": {0: {"exp_avg": np.ones((2, 3), np.float32)}}},
        "classes": tuple("abcdefg"),
    }
    path = save_torch(content, tmp_path / "w.pth")
    text = shown(path)
    assert f"a file of torch.save, {path.stat().st_size:,} bytes" in text
    numbers = sum(array.size for array in arrays.values())
    assert f"│ model │ {len(arrays)} │ {numbers:,} │ " in text
    assert "│ optimizer │ 1 │ 6 │ state/0/exp_avg [2, 3] │" in text
    network = r"│ resnet\S+, 7 classes │"
    assert re.search(rf"│ model │ {len(arrays)} {network} │", text)
    assert re.search(rf"│ model_ema/module │ {len(arrays)} {network} taken │", text)
    for fact in (
        "networks 2 found; choose with --weights-key",
        "32 features to 7 classes: a, b, c, d, e, f, g",
        "beside the network, left out: model, optimizer",
        "preprocessing: not recorded, ImageNet's is assumed",
        "say otherwise with model=",
    ):
        assert fact in text
    chosen = shown(path, "--weights-key", "model")
    assert re.search(rf"│ model │ {len(arrays)} {network} taken │", chosen)


def test_of_several_networks_without_a_rule_each_is_shown(arrays, shown, tmp_path):
    path = save_torch({"left": arrays, "right": halved(arrays)}, tmp_path / "w.pth")
    text = shown(path)
    assert "cannot be loaded `key` (--weights-key) must name one of 2 networks" in text
    assert text.count("7 classes") == 2
    assert "taken" not in text


def test_what_cannot_be_loaded_is_named(shown, tmp_path):
    keys = ["cls_token", "blocks.0.attn.qkv.weight"]
    path = save_torch(dict.fromkeys(keys, np.ones((1, 2), np.float32)), tmp_path / "vit.pth")
    text = shown(path)
    assert "networks none found by their keys" in text
    assert "cannot be loaded holds a ViT, a vision transformer" in text
    assert "│ blocks │ 1 │ 2 │ 0.attn.qkv.weight [1, 2] │" in text


def test_a_head_that_is_left_out_and_another_model(arrays, shown, tmp_path):
    two = {key: array for key, array in arrays.items() if not key.startswith("fc.")}
    two |= {"fc.0.weight": np.ones((8, 32), np.float32), "fc.2.weight": np.ones((3, 8), np.float32)}
    path = save_torch(
        {"state_dict": {f"net.{key}": a for key, a in two.items()}}, tmp_path / "w.pt"
    )
    text = shown(path)
    assert "networks 1 found, under 'state_dict/net'" in text
    assert "head none: the head fc is not one linear map" in text
    assert re.search(
        r"cannot be loaded .*holds resnet\S+ .*, not resnet50", shown(path, "--model", "resnet50")
    )


def test_names_in_a_file_are_shown_as_text(arrays, shown, tmp_path):
    content = {f"\x1b[31m[bold]{n}": arrays if n else 3 for n in (0, 1)}
    text = shown(save_torch(content | {"labels": tuple("[red]")}, tmp_path / "w.pth"))
    assert "\x1b" not in text
    assert r"\x1b[31m[bold]1" in text


def test_a_folder_of_several(arrays, shown, tmp_path):
    for name in ("one.pth", "two.pth"):
        save_torch(arrays, tmp_path / name)
    text = shown(tmp_path)
    assert "checkpoints in the folder" in text
    assert "no name says which is meant; one is flaxtransfer models" in text
    (tmp_path / "one.pth").rename(tmp_path / "best.pth")
    text = shown(tmp_path)
    assert "best.pth is the best of 2 checkpoints in the folder, by name" in text
    assert "networks 1 found" in text


@pytest.mark.parametrize("data", [b"hello", b"PK\x03\x04", b""])
def test_what_cannot_be_read_is_one_line(tmp_path, capsys, data):
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    assert run(["models", str(path)]) == 2
    assert "w.pth: " in only_line(capsys)


def test_a_word_that_is_no_file_is_a_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["models", "resnet18"]) == 0
    assert "of" in capsys.readouterr().out
    assert run(["models", "resnet18.pth"]) == 2
    assert "no file 'resnet18.pth'" in only_line(capsys)
    assert run(["models", "resnet1888"]) == 2
    assert "no architecture is called 'resnet1888'" in only_line(capsys)


def test_the_index_of_parts_and_nothing_in_a_folder(arrays, shown, tmp_path, capsys):
    from safetensors.numpy import save_file

    save_file(dict(arrays), tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(arrays, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 files and their index" in shown(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run(["models", str(tmp_path / "empty")]) == 2
    assert "holds 0 checkpoints" in only_line(capsys)
