"""The folder of checkpoints: who may write it, what is left behind, where it cannot be."""

from __future__ import annotations

import os

import numpy as np
import pytest

from flaxtransfer.checkpoint import CheckpointManager, DamagedCheckpointError
from tests.support.stored import files, names, restore_newest, tree_of


def test_reading_changes_nothing_and_saving_is_refused(broken):
    (broken / "3.orbax-checkpoint-tmp").mkdir()
    before = names(broken), files(broken)
    with CheckpointManager.open(broken, read_only=True) as store:
        assert store.restore(tree_of(0)).step == 2
        with pytest.raises(ValueError, match="not open for writing"):
            store.save(3, tree_of(3))
    assert (names(broken), files(broken)) == before


def test_a_folder_can_be_read_while_it_is_written_but_has_one_writer(tmp_path):
    with CheckpointManager.open(tmp_path) as store:
        store.save(1, tree_of(1))
        with CheckpointManager.open(tmp_path, read_only=True) as reader:
            assert reader.restore(tree_of(0)).step == 1
            store.save(2, tree_of(2))
            assert reader.latest() == 2
        with (
            pytest.raises(ValueError, match="is being written by process"),
            CheckpointManager.open(tmp_path),
        ):
            pass
    with pytest.raises(ValueError, match="not open for writing"):
        store.save(3, tree_of(3))


def test_leftovers_of_a_killed_writer_are_removed_by_the_next_one(broken):
    for name in ("3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17", "1.deleting"):
        (broken / name / "tree").mkdir(parents=True)
    (broken / "notes").mkdir()
    with CheckpointManager.open(broken) as store:
        assert store.steps() == [1, 2]
    assert names(broken) == ["1", "2", "notes"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_a_folder(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), CheckpointManager.open(tmp_path / place):
        pass
    with (
        pytest.raises((NotADirectoryError, FileNotFoundError)),
        CheckpointManager.open(tmp_path / place, read_only=True),
    ):
        pass


def test_places_without_checkpoints(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="no folder of checkpoints"),
        CheckpointManager.open(tmp_path / "none", read_only=True),
    ):
        pass
    with (
        pytest.raises(ValueError, match="local or mounted folder"),
        CheckpointManager.open("gs://bucket/run"),
    ):
        pass
    (tmp_path / "3.damaged").mkdir()
    with CheckpointManager.open(tmp_path) as store:
        assert (store.steps(), store.latest(), store.best()) == ([], None, None)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint \(damaged ones.*3\.damaged"):
            store.restore(tree_of(0))


def test_an_exception_in_the_block_does_not_lose_the_step_being_written(tmp_path):
    def train():
        with CheckpointManager.open(tmp_path) as store:
            store.save(1, tree_of(1), wait=False)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    assert restore_newest(tmp_path).step == 1


@pytest.mark.parametrize("wait", [True, False])
def test_a_step_that_cannot_be_written_is_one_clear_error(wait, tmp_path):
    """Here because its place is taken by a file."""

    def save(step):
        store.save(step, tree_of(step), wait=wait)
        store.wait()

    with CheckpointManager.open(tmp_path) as store:
        store.save(1, tree_of(1))
        blocker = tmp_path / "2"
        blocker.write_text("")
        with pytest.raises(OSError, match=r"step 2 was not written .*steps \[1\] are") as caught:
            save(2)
        assert "\n" not in str(caught.value)
        blocker.unlink()
        store.save(2, tree_of(2))
        assert store.steps() == [1, 2]


def test_planted_links_are_removed_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("1.deleting", "2.orbax-checkpoint-tmp"):
        (folder / name).symlink_to(victim)
    with CheckpointManager.open(folder):
        pass
    assert list(folder.glob("[0-9]*")) == []
    assert (victim / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["record/metadata", "tree/_METADATA", "tree/more"])
def test_a_named_pipe_in_a_step_is_damage_and_never_opened(tmp_path, name):
    with CheckpointManager.open(tmp_path) as store:
        store.save(1, {"w": np.ones(3)})
        (tmp_path / "1" / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / "1" / name)
        with pytest.raises(DamagedCheckpointError, match="regular file, got a named pipe"):
            store.restore({"w": np.zeros(3)})
