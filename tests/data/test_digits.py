"""The digits: their pixels, their preparation by several processes, and damaged copies."""

import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from flaxtransfer.data import open_source
from flaxtransfer.data import tfds as module

pytestmark = pytest.mark.once

DATA_SET = "sklearn_digits/1.0.0"
RECORDS = f"{DATA_SET}/sklearn_digits-train.array_record-00000-of-00001"
OPEN = "import sys; from flaxtransfer.data import open_source as o; "


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", OPEN + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def copy(digits_cache, tmp_path):
    """A cache of its own with prepared digits."""
    shutil.copytree(digits_cache / "sklearn_digits", tmp_path / "sklearn_digits")
    return tmp_path


def test_pixels_and_labels_are_scikit_learns(digits):
    table = load_digits()
    assert len(digits) == 1797
    assert digits.class_names == tuple("0123456789")
    np.testing.assert_array_equal(digits.labels(), table.target)
    found = np.stack([digits[i]["image"][..., 0] for i in range(1797)])
    # Round half up of 255 x / 16; no pixel but 8 lies half-way (127.5).
    np.testing.assert_array_equal(found, np.floor(table.images * 255 / 16 + 0.5))
    assert digits[0]["image"].shape == (8, 8, 1)
    assert found.max() == 255


def test_the_checksum_is_that_of_scikit_learns_table():
    table = load_digits()
    images = np.floor(table.images * 255 / 16 + 0.5).astype(np.uint8)
    labels = table.target.astype(np.int64)
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() == module.SHA256


def test_it_is_a_tfds_data_set_of_array_records(digits_cache):
    assert (digits_cache / RECORDS).is_file()
    source = open_source("tfds:sklearn_digits:train[:5]", cache_dir=digits_cache)
    assert source.labels().tolist() == [0, 1, 2, 3, 4]
    assert source[1]["image"].shape == (8, 8, 1)


def test_a_prepared_copy_is_read_and_not_prepared_again(copy, monkeypatch):
    monkeypatch.setattr(module, "_prepare", None)
    assert len(open_source("digits", cache_dir=copy)) == 1797


def test_the_cache_folder_comes_from_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FLAXTRANSFER_CACHE", str(tmp_path / "env"))
    assert module.cache_root() == tmp_path / "env"
    assert module.cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("FLAXTRANSFER_CACHE")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(module.cache_root()) == "/home/somebody/.cache/flaxtransfer"


def truncate(path):
    os.truncate(path, path.stat().st_size // 3)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[70_000] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (DATA_SET, lambda path: [child.unlink() for child in path.iterdir()]),
        (f"{DATA_SET}/dataset_info.json", os.remove),
        (f"{DATA_SET}/features.json", os.remove),
        (f"{DATA_SET}/dataset_info.json", lambda path: path.write_text("{")),
        (RECORDS, os.remove),
        (RECORDS, truncate),
        (RECORDS, lambda path: path.write_bytes(b"")),
        (RECORDS, flip_a_bit),
    ],
)
def test_a_damaged_copy_is_prepared_anew(copy, file, damage):
    damage(copy / file)
    source = open_source("digits", cache_dir=copy)
    assert source.labels()[:3].tolist() == [0, 1, 2]
    assert [path.name for path in copy.iterdir()] == ["sklearn_digits"]  # nothing lies about
    assert (copy / RECORDS).stat().st_size > 1000


def test_a_well_formed_copy_with_another_label_is_prepared_anew(tmp_path, monkeypatch):
    table = load_digits()
    table.target[17] = 3
    with monkeypatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", lambda: table)
        module._prepare(tmp_path, tmp_path / DATA_SET)
    assert open_source("tfds:sklearn_digits", cache_dir=tmp_path).labels()[17] == 3
    assert open_source("digits", cache_dir=tmp_path).labels()[17] == load_digits().target[17]


def test_processes_that_prepare_at_once_all_succeed(tmp_path):
    code = "s = o('digits', cache_dir=sys.argv[1]); print(len(s), s.labels().sum())"
    both = [run(code, tmp_path) for _ in range(2)]
    wanted = f"1797 {load_digits().target.sum()}\n"
    assert [process.communicate()[0] for process in both] == [wanted, wanted]
    assert [path.name for path in tmp_path.iterdir()] == ["sklearn_digits"]


def test_a_process_killed_while_preparing_leaves_no_data_set(tmp_path):
    code = """
import os
from flaxtransfer.data.tfds import SklearnDigits
make = SklearnDigits._generate_examples
def die(self):
    for index, example in make(self):
        if index == 900:
            os._exit(9)
        yield index, example
SklearnDigits._generate_examples = die
o('digits', cache_dir=sys.argv[1])
"""
    process = run(code, tmp_path)
    process.communicate()
    assert process.returncode == 9
    assert not (tmp_path / DATA_SET).exists()
    assert len(open_source("digits", cache_dir=tmp_path)) == 1797
    assert [path.name for path in tmp_path.iterdir()] == ["sklearn_digits"]


def test_preparing_says_nothing(tmp_path, capfd):
    open_source("digits", cache_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_names_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose a writable folder with cache_dir or FLAXTRANSFER"):
        open_source("digits", cache_dir=tmp_path / "file")


def test_a_change_at_the_origin_is_not_accepted(copy, monkeypatch):
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    monkeypatch.setattr(module, "_ATTEMPTS", 2)
    text = r"must be 1797 examples with checksum 0{64}, got 1797 examples with checksum 0b7e"
    with pytest.raises(ValueError, match=text):
        open_source("digits", cache_dir=copy)
