"""Arrays on disk: whole and of the very same origin, or not at all."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.training import cached_loader

FINGERPRINT = {"weights": "a", "images": "b", "augmentation": "seed 0"}
VALUES = np.arange(24, dtype=np.float32).reshape(6, 2, 2)


def write(folder, fingerprint=FINGERPRINT, values=VALUES, dtype="float32"):
    return cached_loader.write_array(
        folder, fingerprint, values.shape, dtype, [values[:4], values[4:]]
    )


def find(folder, fingerprint=FINGERPRINT, shape=VALUES.shape, dtype="float32"):
    return cached_loader.get(folder, fingerprint, shape, dtype)


def slot(folder):
    (found,) = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return found


def test_what_was_written_is_found(tmp_path):
    written = write(tmp_path)
    found, why = find(tmp_path)
    assert why == ""
    np.testing.assert_array_equal(found, VALUES)
    np.testing.assert_array_equal(written, VALUES)
    assert isinstance(found, np.memmap)


@given(st.dictionaries(st.sampled_from(list(FINGERPRINT)), st.text(max_size=3), min_size=1))
def test_any_other_origin_is_not_found(tmp_path_factory, change):
    folder = tmp_path_factory.mktemp("store")
    write(folder)
    other = FINGERPRINT | change
    found, why = find(folder, other)
    if other == FINGERPRINT:
        np.testing.assert_array_equal(found, VALUES)
    else:
        assert found is None
        differing = sorted(name for name in other if other[name] != FINGERPRINT[name])
        assert why.endswith("differs in " + ", ".join(differing))


@pytest.mark.parametrize("bytes_kept", [0, 5, 90, -1])
def test_truncated(tmp_path, bytes_kept):
    write(tmp_path)
    file = slot(tmp_path) / "features.npy"
    file.write_bytes(file.read_bytes()[:bytes_kept])
    found, why = find(tmp_path)
    assert found is None
    assert "is damaged" in why
    assert "made anew" in why
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit(tmp_path):
    write(tmp_path)
    file = slot(tmp_path) / "features.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    found, why = find(tmp_path)
    assert found is None
    assert "checksum" in why


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": {"weights": "foreign"}}, {"shape": [1]}, {"dtype": "float64"}],
)
def test_foreign(tmp_path, change):
    write(tmp_path)
    file = slot(tmp_path) / "features.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found, why = find(tmp_path)
    assert found is None
    assert next(iter(change)) in why


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_meta_that_is_none(tmp_path, text):
    write(tmp_path)
    (slot(tmp_path) / "features.json").write_text(text)
    assert find(tmp_path)[0] is None


def test_half_written_is_not_there(tmp_path):
    def parts():
        yield VALUES[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_loader.write_array(tmp_path, FINGERPRINT, VALUES.shape, "float32", parts())
    assert not list(tmp_path.iterdir())


def test_a_range_that_is_too_small():
    large = np.full((2, 3), 70_000.0, np.float32)
    with pytest.raises(cached_loader.OutOfRange, match=r"7e\+04 is beyond the 65504 of float16"):
        cached_loader.put((2, 3), "float16", [large])
    np.testing.assert_array_equal(cached_loader.put((2, 3), "float32", [large]), large)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad):
    with pytest.raises(ValueError, match="not finite"):
        cached_loader.put((1, 1), "float32", [np.array([[bad]], np.float32)])


@pytest.mark.parametrize("rows", [5, 7])
def test_parts_that_do_not_make_up_the_shape(rows):
    with pytest.raises(ValueError, match="do not make up"):
        cached_loader.put((rows, 2, 2), "float32", [VALUES])


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    for number in range(3):
        write(tmp_path, {"number": str(number)})
        os.utime(slot_of(tmp_path, number), (number, number))
    assert find(tmp_path, {"number": "0"})[0] is not None  # Used now, so the youngest.
    size = sum(file.stat().st_size for file in slot_of(tmp_path, 0).iterdir())
    removed = cached_loader.evict(tmp_path, size, 3 * size + 10)
    assert len(removed) == 1
    assert find(tmp_path, {"number": "1"})[0] is None
    assert find(tmp_path, {"number": "2"})[0] is not None
    assert find(tmp_path, {"number": "0"})[0] is not None


def slot_of(folder, number):
    (found,) = [
        path.parent
        for path in folder.glob("*/features.json")
        if json.loads(path.read_text())["fingerprint"] == {"number": str(number)}
    ]
    return found


def test_what_a_killed_process_left_goes(tmp_path):
    import platform
    import subprocess
    import sys

    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = tmp_path / f".abc@{platform.node()}:{process.pid}"
    mine = tmp_path / f".abc@{platform.node()}:{os.getpid()}"
    elsewhere = tmp_path / ".abc@another-machine:1"
    for folder in (dead, mine, elsewhere):
        folder.mkdir()
    cached_loader.evict(tmp_path, 0, 10**9)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere])


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    found, _ = find(tmp_path)
    np.testing.assert_array_equal(found, VALUES)
