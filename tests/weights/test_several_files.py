"""Checkpoints in several files, and folders with several checkpoints."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from flaxtransfer.paths import flatten
from flaxtransfer.weights import load
from tests.support.torch_files import save_torch


def same(ours, theirs):
    ours, theirs = flatten(ours.variables), flatten(theirs.variables)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[path], theirs[path]) for path in ours
    )


@pytest.fixture
def split(basic, tmp_path):
    """Writes a network as save_pretrained does, in three parts with their index."""

    def split(suffix="safetensors", name="model", change=lambda index: index):
        folder = tmp_path / "parts"
        folder.mkdir(exist_ok=True)
        places = {}
        for number, keys in enumerate(np.array_split(list(basic), 3), 1):
            part = f"{name}-{number:05}-of-00003.{suffix}"
            held = {str(key): np.ascontiguousarray(basic[str(key)]) for key in keys}
            places |= dict.fromkeys(held, part)
            (save_file if suffix == "safetensors" else save_torch)(held, folder / part)
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(change(index)))
        return folder

    return split


@pytest.fixture
def plain(basic, write):
    return load(write(basic, "plain.safetensors"))


@pytest.mark.parametrize(
    ("suffix", "name"), [("safetensors", "model"), ("bin", "pytorch_model"), ("safetensors", "a.b")]
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_parts_are_one_checkpoint(split, plain, suffix, name, as_folder):
    folder = split(suffix, name)
    found = load(folder if as_folder else folder / f"{name}.{suffix}.index.json")
    assert same(found, plain)
    assert "read from 3 files" in found.notes
    assert len(found.sha256) == 64


def test_safetensors_before_bin(split, plain):
    split("bin", "pytorch_model")
    assert same(load(split()), plain)


def test_a_checksum_of_all_parts(split, basic):
    before = load(split()).sha256
    basic["fc.bias"] = basic["fc.bias"] + 1
    assert load(split()).sha256 != before


def changed(place):
    def change(index):
        return index | {"weight_map": index["weight_map"] | {"conv1.weight": place}}

    return change


LAST = "model-00003-of-00003.safetensors"


def missing(index):
    return {"weight_map": {k: p for k, p in index["weight_map"].items() if k != "fc.bias"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("../plain.safetensors"), "must name files in its own folder, got '../plain"),
        (changed("/etc/passwd"), "must name files in its own folder"),
        (changed(".hidden"), "must name files in its own folder"),
        (changed("w" * 256), "must name files in its own folder, got 'www"),
        (
            lambda index: {"weight_map": index["weight_map"] | {"a\nb\u2028": LAST}},
            r"but 1 keys differ: a\\x0ab\\u2028$",
        ),
        (changed("nowhere.safetensors"), "needs 4 files, and 1 of them are not in the folder: now"),
        (changed("model-00003-of-00003.safetensors"), "must hold what the index says, but 1 keys"),
        (missing, "must hold what the index says, but 1 keys differ: fc.bias"),
        (lambda index: {}, "an index must have a weight_map"),
        (lambda index: [], "an index must have a weight_map"),
        (lambda index: {"weight_map": {"a": 1}}, "an index must have a weight_map"),
    ],
)
def test_an_index_that_does_not_fit(split, change, said):
    folder = split(change=change)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_one_part_alone(split):
    part = split() / "model-00001-of-00003.safetensors"
    with pytest.raises(ValueError, match=r"got one of 3 parts; did you mean 'model\.safetensors\."):
        load(part)
    part.with_name("model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"got one of 3 parts$"):
        load(part)


@pytest.mark.parametrize(
    ("names", "taken", "why"),
    [
        (["last.pth.tar", "model_best.pth.tar", "checkpoint-3.pth.tar"], 1, "best of 3"),
        (["best.pt", "last.pt"], 0, "best of 2"),
        (["epoch=9-step=90.ckpt", "epoch=10-step=100.ckpt"], 1, "newest of 2"),
        (["model_9.pth", "model_10.pth", "model_8.pth"], 1, "newest of 3"),
        (["best-epoch=2.ckpt", "best-epoch=11.ckpt", "last.ckpt"], 1, "newest of 3"),
        (["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors"], 1, "newest"),
        (["checkpoint-5/model.safetensors"], 0, "newest of 1 steps"),
        (["epoch=9-step=90.ckpt", "last.ckpt"], 1, "newest of 2"),
        (["model.pth", "other.pth", "optimizer.pth"], 0, "the model of 2"),
        (["model.pth", "best.pth"], 1, "best of 2"),
        (["checkpoints/epoch=3-step=40.ckpt", "checkpoints/epoch=1-step=20.ckpt"], 0, "newest"),
        (["global_step5/mp_rank_00_model_states.pt", "x/y"], 0, "newest of 1 steps"),
    ],
)
def test_the_best_or_newest_of_a_folder(plain, tmp_path, names, taken, why):
    folder = tmp_path / "runs"
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if number == taken:
            shutil.copy(tmp_path / "plain.safetensors", folder / name)
        else:
            (folder / name).write_bytes(b"no weights")
    found = load(folder)
    assert same(found, plain)
    assert any(why in note and "by name" in note for note in found.notes)


@pytest.mark.parametrize(
    "names",
    [
        ["resnet18.pth", "resnet50.pth"],
        ["resnet18.ckpt", "last.ckpt"],
        ["a_last.ckpt", "b_last.ckpt"],
        ["a.pth", "b.safetensors"],
        ["best_a.pth", "best_b.pth"],
    ],
)
def test_a_folder_where_no_name_says_it(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        FileNotFoundError, match=f"2 checkpoints, name one: {', '.join(sorted(names))}"
    ):
        load(tmp_path)


def test_what_training_saves_beside_a_network_is_no_checkpoint(plain, tmp_path):
    """Names as Hugging Face's trainer, accelerate and DeepSpeed write them."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "scaler.pt"),
        *("training_args.bin", "random_states_0.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ):
        (folder / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds 0 checkpoints"):
        load(folder)
    shutil.copy(tmp_path / "plain.safetensors", folder / "net.safetensors")
    assert same(load(folder), plain)


def test_the_best_step_is_the_one_that_the_trainer_states(plain, tmp_path):
    for step in (500, 1000):
        folder = tmp_path / f"out/checkpoint-{step}"
        folder.mkdir(parents=True)
        shutil.copy(tmp_path / "plain.safetensors", folder / "model.safetensors")
    assert (
        "checkpoint-1000 is the newest of 2 steps in the folder, by name"
        in load(tmp_path / "out").notes
    )
    state = {"best_model_checkpoint": "/elsewhere/out/checkpoint-500"}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    said = "checkpoint-500 is the best of 2 steps in the folder, as trainer_state.json says"
    assert said in load(tmp_path / "out").notes


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("saved_model.pb", "is TensorFlow's SavedModel"),
        (".metadata", "is a distributed checkpoint of torch; convert it with dcp_to_torch_save"),
        ("a/version_0/x.ckpt", "folders below with some: a/version_0"),
    ],
)
def test_a_folder_of_something_else_says_what_it_is(tmp_path, name, said):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=said):
        load(tmp_path)
