"""Caches that two processes fill at once, and entries that vanish while they are read."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from flaxtransfer.files import discard_folder, publish_folder
from flaxtransfer.training import cached_loader
from tests.faults.cache_race import BEFORE, SHAPE, Round, race


def test_two_processes_that_fill_one_cache_do_not_disturb_each_other(tmp_path):
    """A sample; ``python -m tests.faults.cache_race --rounds 1000`` is the whole."""
    failures, damaged, counts = race(tmp_path, 60)
    assert (failures, damaged) == ([], [])
    assert set(counts.values()) == {60 // len(BEFORE)}


def test_whoever_finishes_second_keeps_the_first_ones_entry(tmp_path):
    one, first = Round(0), []

    def parts():
        yield one.values[:32]
        one.write(tmp_path)  # Another process, in the middle of this one's work.
        first.extend(path.stat().st_ino for path in tmp_path.iterdir() if path.name[0] != ".")
        yield one.values[32:]

    found = cached_loader.write_array(tmp_path, one.fingerprint, SHAPE, "float32", parts())
    np.testing.assert_array_equal(found, one.values)
    assert one.damage(tmp_path) == ""
    assert [path.stat().st_ino for path in tmp_path.iterdir()] == first


def test_an_array_is_whole_for_who_reads_it_when_it_is_removed(tmp_path):
    one = Round(0)
    written, found = one.write(tmp_path), one.find(tmp_path)
    assert len(cached_loader.evict(tmp_path, 1, 0)) == 1
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_array_equal(written, one.values)
    np.testing.assert_array_equal(found, one.values)


def test_a_reader_of_a_damaged_entry_does_not_remove_the_one_that_replaced_it(
    tmp_path, monkeypatch
):
    one, read = Round(BEFORE.index("half")), cached_loader._read_array
    one.prepare(tmp_path)
    calls = []

    def replaced_meanwhile(*arguments):
        calls.append(arguments)
        try:
            return read(*arguments)
        finally:
            if len(calls) == 1:
                shutil.rmtree(next(tmp_path.iterdir()))
                one.write(tmp_path)

    monkeypatch.setattr(cached_loader, "_read_array", replaced_meanwhile)
    np.testing.assert_array_equal(one.find(tmp_path), one.values)
    assert len(calls) == 2
    monkeypatch.undo()
    assert one.damage(tmp_path) == ""


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), OSError(24, "Too many")]
)
def test_what_cannot_be_read_is_not_removed(tmp_path, monkeypatch, error):
    one = Round(0)
    one.write(tmp_path)

    def refuse(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(cached_loader, "_read_array", refuse)
        found, why = cached_loader.get(tmp_path, one.fingerprint, SHAPE, "float32")
        assert found is None
        assert "cannot be read" in why
        np.testing.assert_array_equal(one.write(tmp_path), one.values)
    assert one.damage(tmp_path) == ""


def test_a_folder_is_discarded_only_if_it_is_the_one_that_was_looked_at(tmp_path):
    place, other = tmp_path / "place", tmp_path / "other"
    for folder in (place, other):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    assert not publish_folder(other, place)
    opened = os.open(place, os.O_RDONLY)
    place.rename(tmp_path / "away")
    assert publish_folder(other, place)
    discard_folder(place, opened, tmp_path / "aside")
    assert (place / "name").read_text() == "other"
    os.close(opened)
    opened = os.open(place, os.O_RDONLY)
    discard_folder(place, opened, tmp_path / "aside")
    os.close(opened)
    assert [path.name for path in tmp_path.iterdir()] == ["away"]


def test_what_is_being_written_makes_no_room(tmp_path):
    one = Round(0)

    def parts():
        yield one.values[:32]
        cached_loader.evict(tmp_path, 1, 0)
        yield one.values[32:]

    cached_loader.write_array(tmp_path, one.fingerprint, SHAPE, "float32", parts())
    assert one.damage(tmp_path) == ""
