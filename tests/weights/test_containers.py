"""A file is what its content is: under a wrong name, under none, and where nothing is known."""

import hashlib
import io
import json
import re
import shutil

import h5py
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save

from flaxtransfer.weights import load
from flaxtransfer.weights.readers import detect
from flaxtransfer.weights.readers.array_files import read_safetensors
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
    odd = data.replace(b"a.txt", b"a\x0b\nbt")
    with pytest.raises(ValueError, match=r"unknown zip archive.*, got a\\x0b\\x0abt$"):
        recognize(odd, "w.npz")
    two = bytes_of(lambda file: np.savez(file, b=np.ones(1), **ONES)).replace(b"b.npy", b"b.txt")
    with pytest.raises(ValueError, match=r"unknown zip archive.*, got b\.txt, a\.npy"):
        recognize(two, "w.npz")


def test_names_that_weights_have():
    likely = ["a/model.safetensors", "x.pth", "x.pth.tar", "x.ckpt", "x.keras", "x.msgpack"]
    assert (
        list(filter(has_weights_name, [*likely, "x.tar", "x.zip", "pth", "config.json"])) == likely
    )


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_the_checksum_is_that_of_the_bytes_that_are_used(tmp_path, monkeypatch, size):
    monkeypatch.setattr(detect, "_PIECE", 64)
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "w").write_bytes(data)
    with detect._opened(tmp_path / "w") as (read, sha256):
        assert bytes(read) == data
    assert sha256.result() == hashlib.sha256(data).hexdigest()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "w").write_bytes(bytes(100))
    real = np.empty
    for size in (99, 101):
        monkeypatch.setattr(np, "empty", lambda shape, kind, size=size: real(size, kind))
        monkeypatch.setattr(detect.Path, "stat", lambda self, size=size: Sized(size))
        monkeypatch.setattr(detect, "check_regular", lambda path: None)
        changed = pytest.raises(ValueError, match="must not change while it is read")
        with changed, detect._opened(tmp_path / "w"):
            pass


class Sized:
    """What a file's status says of its size."""

    def __init__(self, size):
        self.st_size = size


def of_header(entries, body=bytes(24), pad=0):
    text = json.dumps(entries).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + body


def entry(first, last, shape, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}


def test_safetensors_in_place_are_those_of_the_library():
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.empty((0, 3), np.float16),
        "one": np.array(7.0),
        "flags": np.array([True, False]),
    }
    for pad in range(8):  # a header of any length
        data = save(arrays, {"who": "me"})
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip() + b" " * pad
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        found, metadata, _ = read_safetensors(data)
        assert metadata == {"who": "me"}
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].flags.aligned
            np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, "byte 8 must begin at byte 16"),
        ({"a": entry(0, 8, [2]), "b": entry(16, 24, [2])}, "byte 16 must begin at byte 8"),
        ({"a": entry(8, 24, [4])}, "byte 8 must begin at byte 0"),
        ({"a": entry(0, 20, [5])}, "its header states"),
        ({"a": entry(0, 28, [7])}, "its header states"),
        ({"a": entry(0, 24, [7])}, "must have the size of its shape"),
        ({"a": entry(24, 0, [-6])}, "must have the size of its shape"),
        ({"a": entry(0, 24, [6.0])}, "must have the size of its shape"),
        ({"a": entry(0, 24, [1] * 70 + [6])}, "must have the size of its shape"),
        ({"a": entry(0, 24, [True, 6])}, "must have the size of its shape"),
        ({"a": entry(0, 24, [6], "F8_E4M3")}, "unsupported dtypes"),
        ({"a": entry(0, 24, [6], [])}, "does not state type"),
        ({"a": {"dtype": "F32"}}, "does not state type"),
        ({"a": 7}, "does not state type"),
        ({"a": entry(0, 24, [6]), "__metadata__": {"b": 7}}, "its metadata must be text"),
        ([], "does not state type"),
    ],
)
def test_headers_of_safetensors_that_lie(entries, text):
    with pytest.raises(ValueError, match=text):
        read_safetensors(of_header(entries))
