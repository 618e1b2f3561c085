"""Folders of checkpoints to read and to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flaxtransfer.checkpoint import CheckpointManager
from tests.support.stored import tree_of


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A folder with step 1 (metric 0.9) and step 2 (metric 0.5), to copy and to break."""
    folder = tmp_path_factory.mktemp("two") / "steps"
    with CheckpointManager.open(folder) as store:
        store.save(1, tree_of(1), {"epoch": 1}, metric=0.9)
        store.save(2, tree_of(2), {"epoch": 2}, metric=0.5)
    return folder


@pytest.fixture
def broken(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "steps"))
