"""Damaged checkpoints, with real faults: flipped bits, cut and missing files.

The expected values are analytic: what was saved is what must come back, or a named reason why not.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from flaxtransfer.checkpoint import CheckpointManager, DamagedCheckpointError, orbax_io
from flaxtransfer.checkpoint.step_files import sign, verify
from tests.support.stored import files, names, restore_newest, same, tree_of


def test_flipped_bits_in_the_arrays_are_always_found_and_named(two_steps, tmp_path):
    generator = random.Random(0)
    raw = {"a/kernel": tree_of(2)["a"]["kernel"].tobytes(), "b": tree_of(2)["b"].tobytes()}
    for number in range(12):
        folder = Path(shutil.copytree(two_steps, tmp_path / str(number)))
        leaf = generator.choice(sorted(raw))
        (file,) = [f for f in files(folder / "2") if raw[leaf] in f.read_bytes()]
        data = bytearray(file.read_bytes())
        place = data.index(raw[leaf]) + generator.randrange(len(raw[leaf]))
        data[place] ^= 1 << generator.randrange(8)
        file.write_bytes(data)
        restored = restore_newest(folder)
        assert restored.step == 1
        assert same(restored.tree, tree_of(1))
        assert restored.skipped == ((2, f"the content differs from the checksum of {leaf}"),)


@pytest.mark.parametrize("fault", ["cut", "emptied", "removed", "flip", "overwritten"])
def test_no_damage_to_any_file_is_ever_returned_as_sound(fault, two_steps, tmp_path, capfd):
    """Whatever happens to one file: the newest step is restored exactly, or passed over."""
    generator = random.Random(fault)
    passed_over = []
    for number, name in enumerate(f.relative_to(two_steps) for f in files(two_steps / "2")):
        folder = Path(shutil.copytree(two_steps, tmp_path / str(number)))
        data = bytearray((folder / name).read_bytes())
        if fault == "flip":
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        elif fault == "overwritten":
            data = generator.randbytes(len(data))
        else:
            data = data[: len(data) // 2 if fault == "cut" else 0]
        (folder / name).write_bytes(data)
        if fault == "removed":
            (folder / name).unlink()
        restored = restore_newest(folder)
        assert same(restored.tree, tree_of(restored.step))
        assert restored.meta == {"epoch": restored.step}
        if restored.step == 1:
            ((step, reason),) = restored.skipped
            assert (step, "\n" in reason) == (2, False)
            passed_over.append(name.name)
    assert "metadata" in passed_over  # the record; and at least one file of the arrays:
    assert len(passed_over) > 1
    assert capfd.readouterr().err == ""


def test_an_unreadable_file_is_named(broken):
    manifest = broken / "2" / "tree" / "manifest.ocdbt"
    manifest.write_bytes(b"?" * 100)
    ((_, reason),) = restore_newest(broken).skipped
    assert "these leaves cannot be read (in tree/manifest.ocdbt): a/kernel, b" in reason


def test_a_renamed_step_is_not_taken_for_another(broken):
    (broken / "2").rename(broken / "30")
    restored = restore_newest(broken)
    assert restored.step == 1
    assert restored.skipped == ((30, "the folder of step 30 holds step 2"),)


def test_a_step_of_another_format_is_not_passed_over(broken):
    path = broken / "2" / "record" / "metadata"
    path.write_text(json.dumps(sign(verify(path.read_text()) | {"format": 2})))
    with pytest.raises(ValueError, match=r"has the format 2; .* reads format 1"):
        restore_newest(broken)


def damage(folder: Path, step: int, part: str = "arrays") -> None:
    name = {"arrays": "tree/manifest.ocdbt", "record": "record/metadata"}[part]
    (folder / str(step) / name).write_bytes(b"{}")


def test_all_damaged_is_one_error_and_nothing_is_deleted(broken):
    damage(broken, 1, "arrays")
    damage(broken, 2, "record")
    before = files(broken)
    with CheckpointManager.open(broken) as store:
        for step in (None, "best"):
            with pytest.raises(DamagedCheckpointError) as caught:
                store.restore(tree_of(0), step)
            text = str(caught.value)
            assert "step 1: these leaves cannot be read" in text
            assert "step 2: record/metadata cannot be used" in text
            assert "nothing was deleted" in text
    assert files(broken) == before


def test_a_damaged_number_can_be_saved_again_and_nothing_is_lost(broken):
    for round_, aside in enumerate(["2.damaged", "2.damaged.2"], 1):
        damage(broken, 2)
        with CheckpointManager.open(broken) as store:
            assert store.restore(tree_of(0)).step == 1
            assert store.steps() == [1]
            store.save(2, tree_of(20 + round_), {"again": round_})
            assert store.steps() == [1, 2]
            assert same(store.restore(tree_of(0)).tree, tree_of(20 + round_))
        assert (broken / aside / "tree" / "manifest.ocdbt").read_bytes() == b"{}"
    assert names(broken) == ["1", "2", "2.damaged", "2.damaged.2"]


def test_a_step_below_the_damaged_one_can_be_saved(two_steps, tmp_path):
    with CheckpointManager.open(tmp_path) as store:
        store.save(10, tree_of(10))
        store.save(20, tree_of(20))
    damage(tmp_path, 20, "record")
    with CheckpointManager.open(tmp_path) as store:
        store.save(15, tree_of(15))
    assert names(tmp_path) == ["10", "15", "20.damaged"]


def test_a_step_asked_for_by_number_is_never_replaced(broken):
    damage(broken, 2)
    with CheckpointManager.open(broken, read_only=True) as store:
        with pytest.raises(DamagedCheckpointError, match=r"step 2: .*\n.*other steps there: \[1\]"):
            store.restore(tree_of(0), 2)
        with pytest.raises(FileNotFoundError, match=r"no step 5; there are \[1, 2\].* is 2"):
            store.restore(tree_of(0), 5)
        assert store.restore(tree_of(0), 1).step == 1


@pytest.mark.parametrize("part", ["arrays", "record"])
def test_a_damaged_best_is_reported_and_the_next_best_taken(part, tmp_path):
    with CheckpointManager.open(tmp_path, keep_best=2) as store:
        for step, metric in [(1, 0.8), (2, 0.9), (3, 0.1), (4, None)]:
            store.save(step, tree_of(step), metric=metric)
    damage(tmp_path, 2, part)
    with CheckpointManager.open(tmp_path) as store:
        restored = store.restore(tree_of(0), "best")
        assert restored.step == 1
        assert [step for step, _ in restored.skipped] == [2]


def test_a_shortage_of_the_machine_is_not_damage(broken, monkeypatch):
    async def fail(self, infos, args=None):
        raise ValueError("Error opening file [os_error_code='24']")

    monkeypatch.setattr(orbax_io._WaitingNumpyHandler, "deserialize", fail)
    with CheckpointManager.open(broken) as store:
        with pytest.raises(OSError, match="step 2 cannot be read now") as caught:
            store.restore(tree_of(0))
        assert caught.value.errno == errno.EMFILE
        assert store.steps() == [1, 2]


def test_another_configuration_is_an_error_that_lists_every_leaf(broken):
    other = {"a": {"kernal": np.ones((50, 70))}, "b": np.ones(901), "n": 3}
    with CheckpointManager.open(broken) as store:
        with pytest.raises(ValueError, match="was the configuration changed") as caught:
            store.restore(other)
        assert store.steps() == [1, 2]
    assert not isinstance(caught.value, DamagedCheckpointError)
    for line in (
        "asked for, not saved: a/kernal (float64[50, 70]); saved there is a/kernel",
        "asked for, not saved: n (Python int)",
        "saved, not asked for: a/kernel (float64[50, 70])",
        "b: saved as float64[900], asked for as float64[901]",
    ):
        assert line in str(caught.value)


def test_another_configuration_is_not_passed_over_for_an_older_step(tmp_path):
    with CheckpointManager.open(tmp_path) as store:
        store.save(1, tree_of(1))
        store.save(2, {"new": np.ones(3)})
        with pytest.raises(ValueError, match="step 2 of"):
            store.restore(tree_of(0))
