"""A file is what its content is: under a wrong name, under none, and where nothing is known."""

import io
import re
import shutil

import h5py
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save

from flaxtransfer.weights import load
from flaxtransfer.weights.readers.detect import CONTAINERS, has_weights_name, recognize

ONES = {"a": np.ones(3, np.float32)}


def bytes_of(write):
    data = io.BytesIO()
    write(data)
    return data.getvalue()


def keras_archive(data):
    import zipfile

    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model.weights.h5", FILES["hdf5"])


FILES = {
    "safetensors": save(ONES),
    "npz": bytes_of(lambda data: np.savez(data, **ONES)),
    "hdf5": bytes_of(lambda data: h5py.File(data, "w").close()),
    "msgpack": serialization.msgpack_serialize(ONES),
    "large msgpack": serialization.msgpack_serialize({f"{n}": np.ones(1) for n in range(16)}),
    "very large msgpack": serialization.msgpack_serialize({f"{n}": n for n in range(1 << 16)}),
}
FILES["keras"] = bytes_of(keras_archive)


@pytest.fixture(params=["zip", "legacy"])
def of_torch(golden, request):
    return (golden / "torch_files" / f"{request.param}.pth").read_bytes()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["blob", "w.pth", "w.safetensors", "w.h5", "w.npz", "w.msgpack"])
def test_every_container_under_every_name(kind, name):
    expected = CONTAINERS[kind.split()[-1]]
    container, notes = recognize(FILES[kind], name)
    assert container is expected
    if name.endswith(expected.suffixes):
        assert notes == []
    elif name == "blob":
        assert notes == [f"{expected.text} by its content; its name has no such suffix"]
    else:
        assert notes == [f"{expected.text} by its content, although its name ends in {name[1:]}"]


@pytest.mark.parametrize("name", ["blob", "w.safetensors", "w.ckpt", "w.pth.tar"])
def test_both_layouts_of_torch(of_torch, name):
    container, notes = recognize(of_torch, name)
    assert container is CONTAINERS["torch"]
    assert len(notes) == (name in ("blob", "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("pytorch_model.bin", "a safetensors file by its content, although its name ends in .bin"),
        ("w.ckpt", "a safetensors file by its content, although its name ends in .ckpt"),
        ("4c1f0e", "a safetensors file by its content; its name has no such suffix"),
        ("resnet50.a1_in1k", "a safetensors file by its content; its name has no such suffix"),
    ],
)
def test_a_network_under_another_name(golden, tmp_path, name, note):
    shutil.copy(golden / "torchvision_basic" / "model.safetensors", tmp_path / name)
    checkpoint = load(tmp_path / name)
    assert checkpoint.config.width == 4
    assert checkpoint.notes[0] == note


def test_a_blob_of_the_hubs_cache(golden, tmp_path):
    # The cache names what it holds by the checksum, and links to it.
    blob, link = tmp_path / "blobs" / "c0ffee", tmp_path / "snapshots" / "model.safetensors"
    blob.parent.mkdir()
    link.parent.mkdir()
    shutil.copy(golden / "torchvision_basic" / "model.safetensors", blob)
    link.symlink_to(blob)
    assert load(blob).sha256 == load(link).sha256


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (b"", "w.pth", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "w.pth", "Git LFS pointer"),
        (b"\n <!DOCTYPE html>", "w.h5", "a web page"),
        (b"hello, this is text", "w.pth", "unknown format: the first bytes are b'hello, t'"),
        (b"PK\x03\x04 and more", "w.safetensors", "incomplete or damaged zip archive"),
        (b"PK\x05\x06" + bytes(18), "w.pth", "unknown format"),
        (b"\x80\x00" + bytes(20), "w.pth", "unknown format"),
        (b"\x81\x01\x02\x03\x04\x05\x06\x07\x08", "w.pth", "unknown format"),
        (FILES["hdf5"][1:], "w.h5", "unknown format"),
    ],
)
def test_what_is_none_of_them(data, name, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        recognize(data, name)


def test_archives_of_other_things():
    data = bytes_of(lambda file: np.savez(file, **ONES)).replace(b"a.npy", b"a.txt")
    with pytest.raises(ValueError, match=r"unknown zip archive.*, got a\.txt"):
        recognize(data, "w.npz")
    two = bytes_of(lambda file: np.savez(file, b=np.ones(1), **ONES)).replace(b"b.npy", b"b.txt")
    with pytest.raises(ValueError, match=r"unknown zip archive.*, got b\.txt, a\.npy"):
        recognize(two, "w.npz")


def test_names_that_weights_have():
    likely = ["a/model.safetensors", "x.pth", "x.pth.tar", "x.ckpt", "x.keras", "x.msgpack"]
    assert (
        list(filter(has_weights_name, [*likely, "x.tar", "x.zip", "pth", "config.json"])) == likely
    )
