"""Folders that orbax wrote, of other programs and of our own runs."""

import errno
import json
import os
import re

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from flaxtransfer.checkpoint import CheckpointManager, orbax_io
from flaxtransfer.checkpoint.step_files import find_tree_folder, read_any_arrays
from flaxtransfer.models.config import Adapter, ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import load
from flaxtransfer.weights.naming import native

CONFIG = ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=3)


def leaves_of(config=CONFIG):
    rng = np.random.default_rng(0)
    return {p: rng.uniform(0.5, 1, s).astype(np.float32) for p, s in leaf_shapes(config).items()}


def same(checkpoint, leaves):
    found = flatten(checkpoint.variables)
    return sorted(found) == sorted(leaves) and all(
        np.array_equal(found[path], leaves[path]) for path in leaves
    )


def standard(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def pytree(path, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def plain_zarr(path, tree):
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(path, tree)


def managed(path, tree):
    with ocp.CheckpointManager(path.parent) as manager:
        manager.save(int(path.name), args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()


@pytest.mark.parametrize("write", [standard, pytree, plain_zarr, managed])
def test_every_way_of_orbax_to_write_a_tree(tmp_path, write):
    leaves = leaves_of()
    tree = unflatten(leaves)
    tree["params"]["fc"] = {k: jnp.asarray(v) for k, v in tree["params"]["fc"].items()}
    write(tmp_path / "5", tree)
    checkpoint = load(tmp_path / "5")
    assert same(checkpoint, leaves)
    assert (checkpoint.config, checkpoint.format) == (CONFIG, "flaxtransfer")
    assert checkpoint.notes[0].startswith("a folder of orbax without checksums")
    assert len(checkpoint.sha256) == 64


def test_what_else_a_run_keeps_is_left_out_and_said(tmp_path):
    leaves = leaves_of()
    state = {**unflatten(leaves), "opt_state": [jnp.zeros(2), None], "step": 3, "empty": {}}
    pytree(tmp_path / "c", {"state": state, "seed": 7, "name": "text"})
    checkpoint = load(tmp_path / "c")
    assert same(checkpoint, leaves)
    assert "the network is under 'state/'; left out: opt_state, seed, step" in checkpoint.notes


def test_differences_are_all_listed(tmp_path):
    leaves = leaves_of()
    del leaves["params/layer2/0/conv1/kernel"]
    leaves["params/layer2/0/conv9/kernel"] = leaves.pop("batch_stats/bn1/mean")
    leaves["params/layer3/0/bn1/scale"] = np.ones(5, np.float32)
    standard(tmp_path / "c", unflatten(leaves))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "c"))) as caught:
        load(tmp_path / "c")
    parts = [
        "under flaxtransfer's names; keys: 2 missing, 1 unexpected, 1 of another shape",
        "missing: params/layer2/0/conv1/kernel [3, 3, 2, 4]",
        "missing: batch_stats/bn1/mean [2]",
        "unexpected: params/layer2/0/conv9/kernel [2]; did you mean",
        "shape: params/layer3/0/bn1/scale must be [8] for the network, got [5] in the file",
    ]
    assert [part for part in parts if part not in str(caught.value)] == []


def test_another_network_is_refused(tmp_path):
    standard(tmp_path / "c", {"params": {"Dense_0": {"kernel": np.ones((2, 2), np.float32)}}})
    with pytest.raises(ValueError, match=r"has no ResNet .*params/Dense_0/kernel"):
        load(tmp_path / "c")
    leaves = leaves_of()
    standard(tmp_path / "two", {"a": unflatten(leaves), "b": unflatten(leaves)})
    assert same(load(tmp_path / "two"), leaves)
    apart = {**unflatten(leaves), "opt_state": {"mu": {"x": np.ones(1, np.float32)}}}
    for name, part in apart.items():
        standard(tmp_path / "items" / name, part)
    found = load(tmp_path / "items")
    assert same(found, leaves)
    assert "left out: opt_state" in found.notes


def test_of_steps_the_newest_and_of_several_trees_none(tmp_path):
    leaves = leaves_of()
    standard(tmp_path / "steps" / "5" / "default", {"x": np.ones(1)})
    managed(tmp_path / "steps" / "10", unflatten(leaves))
    found = load(tmp_path / "steps")
    assert same(found, leaves)
    assert "10 is the newest of 2 steps in the folder, by name" in found.notes
    for name in ("a", "b"):
        standard(tmp_path / "both" / name, {"x": np.ones(1)})
    with pytest.raises(ValueError, match=r"several trees, give one of them: \S+both/a, \S+both/b"):
        load(tmp_path / "both")
    assert find_tree_folder(tmp_path / "both" / "a") == tmp_path / "both" / "a"


def test_a_folder_of_nothing(tmp_path):
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"nothing that orbax wrote; the steps of .* run are .*/40"
    ):
        load(tmp_path)


def test_damage(tmp_path):
    plain_zarr(tmp_path / "c", unflatten(leaves_of()))
    array = tmp_path / "c" / "params.fc.kernel" / "0.0"
    array.write_bytes(array.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"is damaged: these leaves cannot be read.*fc.kernel"):
        load(tmp_path / "c")
    described = tmp_path / "c" / "params.fc.kernel" / ".zarray"
    huge = json.loads(described.read_text()) | {"shape": [1 << 40, 3], "chunks": [1 << 40, 3]}
    described.write_text(json.dumps(huge))
    with pytest.raises(ValueError, match=r"must have at most .* numbers, got 3,298,534,"):
        load(tmp_path / "c")
    (tmp_path / "c" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="is damaged: its arrays cannot be read"):
        load(tmp_path / "c")


def test_what_was_never_finished(tmp_path):
    path = tmp_path / "5.orbax-checkpoint-tmp-0"
    standard(tmp_path / "5", unflatten(leaves_of()))
    (tmp_path / "5").rename(path)
    with pytest.raises(ValueError, match="is incomplete"):
        load(path)


def test_links_are_not_followed(tmp_path):
    plain_zarr(tmp_path / "c", unflatten(leaves_of()))
    array = tmp_path / "c" / "params.fc.kernel" / "0.0"
    array.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", array)
    with pytest.raises(ValueError, match=r"must not hold links, got \S+0\.0"):
        load(tmp_path / "c")


class TestStepsOfRuns:
    """What `CheckpointManager` keeps: parameters, statistics, an optimizer's state, averages."""

    @pytest.fixture
    def run(self, tmp_path):
        self.config = ResNetConfig(
            depths=(1, 1, 1, 1),
            width=2,
            classes=3,
            anti_alias="blur",
            adapter=Adapter(4, "curves", 5, (-1.0, 3.0)),
        )
        self.leaves = leaves_of(self.config)
        tree = unflatten(self.leaves)
        average = {"fc": {"bias": np.full(3, 9, np.float32)}}
        state = {**tree, "ema": average, "opt_state": {"mu": np.ones(2)}, "step": np.int32(40)}
        with CheckpointManager.open(tmp_path / "checkpoints") as store:
            store.save(40, state, {"epoch": 2})
        model = {"model": self.config.to_json()}
        (tmp_path / "config.json").write_text(json.dumps(model))
        return tmp_path

    def test_averages_and_what_no_leaf_shows(self, run):
        checkpoint = load(run / "checkpoints" / "40")
        averaged = self.leaves | {"params/fc/bias": np.full(3, 9, np.float32)}
        assert same(checkpoint, averaged)
        assert checkpoint.config == self.config
        assert {"a folder of orbax", "1 leaves are averages over steps"} <= set(checkpoint.notes)

    def test_damage_is_found_by_checksums(self, run):
        held = run / "checkpoints" / "40" / "tree"
        largest = max((p for p in held.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(bytes(data))
        with pytest.raises(ValueError, match=r"40 is damaged: (the content differs|.*read)"):
            load(run / "checkpoints" / "40")

    def test_another_network_than_the_runs(self, run):
        other = {"model": CONFIG.to_json()}
        (run / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"holds resnet.*, but its run trains resnet"):
            load(run / "checkpoints" / "40")

    def test_the_finished_run_is_its_file(self, run, basic, write):
        write(basic, "model.safetensors")
        assert load(run).config.width == 4


def test_other_files_are_left_alone(basic):
    assert native.prepared(basic) == (dict(basic), [])


def test_averages_of_nothing():
    arrays = {"params/layer1/0/conv1/kernel": 1, "ema/fc/bias": 2}
    with pytest.raises(ValueError, match="averages of unknown parameters: params/fc/bias"):
        native.prepared(arrays)


def test_a_kind_of_leaf_that_nobody_knows(tmp_path):
    standard(tmp_path / "tree", {"a": np.ones(3), "b": jnp.ones(3)})
    described = tmp_path / "tree" / "_METADATA"
    text = described.read_text()
    described.write_text(text.replace('"value_type": "jax.Array"', '"value_type": "jaxArray"', 1))
    assert described.read_text() != text
    with pytest.raises(ValueError, match="jaxArray"):
        read_any_arrays(tmp_path / "tree", most=1000)


def test_a_shortage_of_the_machine_is_not_damage(tmp_path, monkeypatch):
    standard(tmp_path / "tree", {"a": np.ones(3)})

    async def fail(self, infos, args=None):
        raise ValueError("Error opening file [os_error_code='24']")

    monkeypatch.setattr(orbax_io._WaitingNumpyHandler, "deserialize", fail)
    with pytest.raises(OSError, match="it cannot be read now") as caught:
        read_any_arrays(tmp_path / "tree", most=1000)
    assert caught.value.errno == errno.EMFILE
