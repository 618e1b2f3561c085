"""What is written is read back equal, appears whole or not at all, and is torchvision's."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from flaxtransfer.classifier import transfer
from flaxtransfer.models.config import Adapter, ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.task import REGRESSION, Units
from flaxtransfer.weights import IMAGENET, Preprocessing, Pretrained, load, save
from flaxtransfer.weights.naming import onnx
from flaxtransfer.weights.pretrained import HEADER_KEY, read_header, write_header
from flaxtransfer.weights.readers import archives, array_files, torch_file

CONFIG = ResNetConfig("bottleneck", (1, 2, 1, 1), 4, 32, 4, classes=3, in_channels=5)
BANDS = Preprocessing((0.1, 0.2, 0.3, 0.4, 1 / 3), (0.5,) * 5, 64, 72, "bicubic")


@pytest.fixture
def checkpoint():
    rng = np.random.default_rng(0)
    leaves = {
        path: abs(rng.normal(size=shape)).astype(np.float32)
        for path, shape in leaf_shapes(CONFIG).items()
    }
    return Pretrained(unflatten(leaves), CONFIG, BANDS, class_names=("a", "ß", "c, d"))


def leaves_of(checkpoint):
    return flatten(checkpoint.variables)


def test_there_and_back(checkpoint, tmp_path):
    digest = save(tmp_path / "w.safetensors", checkpoint)
    back = load(tmp_path / "w.safetensors")
    for field in ("config", "preprocessing", "class_names", "format"):
        assert getattr(back, field) == getattr(checkpoint, field)
    assert back.sha256 == digest
    assert back.notes == ("preprocessing: from the file's header",)
    before, after = leaves_of(checkpoint), leaves_of(back)
    assert list(before) == list(after)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_that_there_was_no_head_is_kept(tmp_path):
    config = dataclasses.replace(CONFIG, classes=1)
    zeros = {path: np.zeros(shape, np.float32) for path, shape in leaf_shapes(config).items()}
    before = Pretrained(unflatten(zeros), config, BANDS, no_head="the file has no head")
    save(tmp_path / "w.safetensors", before)
    back = load(tmp_path / "w.safetensors")
    assert back.no_head == before.no_head
    assert back.notes[1] == "the file has no head: one output that is always 0 replaces it"
    with pytest.raises(ValueError, match=r"head must be .new. .*: the file has no head"):
        transfer(back, classes=1, head="keep")
    # Of a checkpoint with a head nothing is said.
    save(tmp_path / "w.safetensors", dataclasses.replace(before, no_head=""))
    assert load(tmp_path / "w.safetensors").no_head == ""


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path):
    digests = {save(tmp_path / f"{n}.safetensors", checkpoint) for n in range(5)}
    assert len(digests) == 1
    back = load(tmp_path / "0.safetensors")
    assert save(tmp_path / "again.safetensors", back) in digests


def test_half_precision_is_half_the_size_and_rounds(checkpoint, tmp_path):
    save(tmp_path / "full.safetensors", checkpoint)
    save(tmp_path / "half.safetensors", checkpoint, np.float16)
    full, half = (os.path.getsize(tmp_path / f"{n}.safetensors") for n in ("full", "half"))
    assert half < 0.6 * full
    for path, leaf in leaves_of(load(tmp_path / "half.safetensors")).items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(
            leaf, leaves_of(checkpoint)[path].astype(np.float16).astype(np.float32)
        )


def test_arrays_of_jax_are_written_as_well(checkpoint, tmp_path):
    expected = save(tmp_path / "numpy.safetensors", checkpoint)
    arrays = unflatten({path: jnp.asarray(leaf) for path, leaf in leaves_of(checkpoint).items()})
    other = dataclasses.replace(checkpoint, variables=arrays)
    assert save(tmp_path / "jax.safetensors", other, "float32") == expected


@pytest.mark.parametrize(
    "name", ["torchvision_basic", "torchvision_bottleneck", "torchvision_grouped"]
)
def test_keys_and_numbers_are_those_torchvision_wrote(golden, tmp_path, name):
    # The peer's own file is the reference; its counters of batches are the only difference.
    path = golden / name / "model.safetensors"
    save(tmp_path / "w.safetensors", load(path))
    theirs, ours = load_file(path), load_file(tmp_path / "w.safetensors")
    assert {key for key in theirs if not key.endswith("num_batches_tracked")} == set(ours)
    assert all(np.array_equal(theirs[key], ours[key]) for key in ours)


def test_other_readers_find_their_mark(checkpoint, tmp_path):
    save(tmp_path / "w.safetensors", checkpoint)
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize(
    ("name", "dtype", "error", "text"),
    [
        ("w.pth", "float32", ValueError, r"must end in \.safetensors, got 'w\.pth'"),
        ("w.safetensors", "bfloat16", ValueError, "float32 or float16, got bfloat16"),
        ("w.safetensors", "flaot16", ValueError, "float32 or float16, got flaot16"),
        ("no/w.safetensors", "float32", FileNotFoundError, "the folder .*no for w"),
    ],
)
def test_refusals(checkpoint, tmp_path, name, dtype, error, text):
    with pytest.raises(error, match=text):
        save(tmp_path / name, checkpoint, dtype)
    assert list(tmp_path.iterdir()) == []


def test_leaves_that_are_another_network_are_listed(checkpoint, tmp_path):
    leaves = leaves_of(checkpoint)
    leaves["params/fc/bais"] = leaves.pop("params/fc/bias")
    leaves["params/conv1/kernel"] = leaves["params/conv1/kernel"][..., :3]
    with pytest.raises(ValueError, match="do not fit resnext") as caught:
        save(
            tmp_path / "w.safetensors", dataclasses.replace(checkpoint, variables=unflatten(leaves))
        )
    assert str(caught.value).splitlines()[1:] == [
        "  missing: params/fc/bias [3]",
        "  unexpected: params/fc/bais; did you mean 'params/fc/bias'?",
        "  shape: params/conv1/kernel must be [7, 7, 5, 4], got [7, 7, 5, 3]",
    ]


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (7e4, "float16")])
def test_numbers_that_the_file_could_not_hold(checkpoint, tmp_path, value, dtype):
    leaves = leaves_of(checkpoint)
    leaves["params/fc/bias"][1] = value
    with pytest.raises(ValueError, match=rf"finite as {dtype}, got .*: \['params/fc/bias'\]"):
        save(tmp_path / "w.safetensors", checkpoint, dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    old = save(path, checkpoint)

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        save(path, checkpoint, "float16")
    assert load(path).sha256 == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_as_readable_as_others(checkpoint, tmp_path):
    (tmp_path / "other").write_text("")
    save(tmp_path / "w.safetensors", checkpoint)
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# --- the header ----------------------------------------------------------------------------------


def rewritten(path, change):
    """The file again, with another flaxtransfer header."""
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        content = json.loads(file.metadata()["flaxtransfer"])
    change(content)
    path.write_bytes(array_files.write_safetensors(arrays, {"flaxtransfer": json.dumps(content)}))
    return path


def places(value, path=()):
    """The place of every value in JSON, as keys."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


ODD = (
    *(0, -1, 2**24 + 1, 2**63, 10**39, 10**40, -(10**400), 1.5, float("inf"), float("nan"), None),
    *(True, "", "x", [], {}, [None], [[1]], {"a": 1}, [10**9] * 4),
)


def header_or_error(text):
    try:
        return read_header({HEADER_KEY: text})
    except ValueError as error:
        return str(error)


def test_whatever_stands_in_a_header_it_is_read_or_refused_in_one_line():
    config = ResNetConfig(
        *("bottleneck", (1, 2, 1, 1)),
        classes=3,
        adapter=Adapter(5, "curves"),
        norm="group",
        standardized=1e-5,
    )
    named = {"bands": tuple("abcde"), "wavelengths": (500.0,) * 5}
    bands = dataclasses.replace(BANDS, **named, black=(0,) * 5, white=(1,) * 5)
    task = REGRESSION.with_units(Units((0.0,) * 3, (1.0,) * 3))
    said = Pretrained({"params": {}}, config, bands, class_names=("a", "b", "c"), task=task)
    header = json.loads(write_header(said)[HEADER_KEY])
    assert read_header({HEADER_KEY: json.dumps(header)}).config == config
    tried = list(places(header))
    assert len(tried) > 40
    for *outer, last in tried:
        for value in ODD:
            changed = json.loads(json.dumps(header))
            inner = changed
            for key in outer:
                inner = inner[key]
            inner[last] = value
            found = header_or_error(json.dumps(changed))
            if isinstance(found, str):
                assert "\n" not in found
                assert len(found) <= 600
            else:
                assert all(isinstance(name, str) for name in found.class_names or ())
                assert max(found.config.depths, default=0) <= 512


def test_what_readers_find_themselves_no_file_can_state():
    arrays = {"fc.bias": np.zeros(2, np.float32)}
    found = (
        torch_file.NAMES,
        onnx.GRAPH,
        array_files.MODEL,
        array_files.CONFIG,
        array_files.LAYERS,
    )
    assert all(key.startswith(archives.FOUND) for key in found)
    data = array_files.write_safetensors(arrays, {"format": "pt"} | dict.fromkeys(found, "5"))
    assert array_files.read_safetensors(data)[1] == {"format": "pt"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(version=2), "version must be 1 for this flaxtransfer, got 2"),
        (lambda c: c.pop("config"), "is invalid: missing 'config'"),
        (
            lambda c: c["config"].update(depths=[1, 0]),
            "is invalid: invalid ResNetConfig: depths must be at most 4",
        ),
        (lambda c: c["config"].update(depths=[1]), "does not fit resne.t-bottleneck-1.*unexpected"),
        (lambda c: c["config"].update(stride=2), "is invalid: .*stride"),
        (lambda c: c["config"].update(classes=4), r"classes=3.*header states .*classes=4"),
        (lambda c: c["preprocessing"].update(size=-1), "is invalid: invalid Preproc"),
        (lambda c: c.update(class_names=["a"]), "must have 3 names, one per output, got 1"),
    ],
)
def test_a_header_that_contradicts_the_weights_is_refused(checkpoint, tmp_path, change, text):
    path = tmp_path / "w.safetensors"
    save(path, checkpoint)
    with pytest.raises(ValueError, match=text):
        load(rewritten(path, change))


def test_a_checkpoint_checks_itself(checkpoint):
    with pytest.raises(ValueError, match="must have 3 names, one per output, got 2"):
        dataclasses.replace(checkpoint, class_names=("a", "b"))
    with pytest.raises(ValueError, match="must have 5 channels, as the network has, got 3"):
        dataclasses.replace(checkpoint, preprocessing=IMAGENET)
    assert re.search(r"3 classes, 5 channels, [\d,]+ parameters", repr(checkpoint))
