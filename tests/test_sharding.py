"""Claims about the placement of arrays: on one device here, on eight and on two processes below."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flaxtransfer.sharding import (
    batch_sharding,
    guard_cpu_thread_pool,
    leaf_shardings,
    make_mesh,
    place_batch,
    place_replicated,
    replicated,
)

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import os, sys
from flaxtransfer.sharding import *
from flaxtransfer.sharding import guard_cpu_thread_pool
import jax, jax.numpy as jnp, numpy as np, optax

def refused(call, *arguments):
    try:
        call(*arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("accepted")
"""


def child(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    script = PRELUDE + textwrap.dedent(code)
    inherited = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env=inherited | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err


# One device.


def test_axes_are_auto_and_named():
    mesh = make_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.axis_types == (AxisType.Auto,)
    assert make_mesh(jax.devices()[:1], axis="rows").axis_names == ("rows",)
    assert tuple(batch_sharding(make_mesh(axis="rows")).spec) == ("rows",)
    assert replicated(mesh).is_fully_replicated


def test_a_mesh_of_nothing_or_of_one_device_twice_is_refused():
    for devices in ([], [jax.devices()[0]] * 2):
        with pytest.raises(ValueError, match="devices must be at least one, each only once"):
            make_mesh(devices)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({}, "got shapes {}"),
        ({"x": np.ones((4, 2)), "y": np.ones(3)}, r"'x': \(4, 2\), 'y': \(3,\)"),
        ({"x": np.ones(4), "n": 3}, r"'n': \(\)"),
        ({"x": np.ones((0, 2))}, "must be a multiple of the 1 devices, got 0; the nearest is 1"),
    ],
)
def test_a_batch_without_one_first_axis_is_refused(batch, said):
    with pytest.raises(ValueError, match=said):
        place_batch(batch, make_mesh())


def test_a_batch_keeps_its_values_and_types():
    batch = {"image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), "label": np.array([3, 4])}
    placed = place_batch(batch, make_mesh())
    assert placed["image"].dtype == np.uint8
    assert placed["label"].dtype == np.int32  # jax's own integer
    assert jax.tree.all(jax.tree.map(np.array_equal, placed, batch))


@pytest.mark.parametrize("make", [np.ones, jnp.ones])
def test_a_replicated_tree_can_be_donated_and_the_given_one_stays(make):
    given = {"w": make(4096, np.float32), "key": jax.random.key(3)}
    placed = place_replicated(given, make_mesh())
    step = jax.jit(
        lambda t: {"w": t["w"] * 0, "key": jax.random.fold_in(t["key"], 1)}, donate_argnums=0
    )
    jax.block_until_ready(step(placed))
    assert placed["w"].is_deleted()
    assert np.array_equal(given["w"], np.ones(4096))
    assert np.array_equal(jax.random.key_data(given["key"]), jax.random.key_data(jax.random.key(3)))


# The threads of forced devices.


@pytest.mark.parametrize(
    ("flags", "nproc", "expected"),
    [
        ("", None, None),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("--xla_force_host_platform_device_count=8", None, 16),
        ("--xla_foo --xla_force_host_platform_device_count=4 --xla_bar=1", "2", 8),
        ("--xla_force_host_platform_device_count=8", "64", 64),
        ("--xla_force_host_platform_device_count=8", "many", 16),
        # The last of two flags is the one that XLA takes.
        (
            "--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=4",
            None,
            8,
        ),
    ],
)
def test_threads_for_forced_devices(flags, nproc, expected, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("NPROC", raising=False)
    if nproc is not None:
        monkeypatch.setenv("NPROC", nproc)
    assert guard_cpu_thread_pool() == expected
    assert os.environ.get("NPROC") == (nproc if expected is None else str(expected))


# Eight devices.


def test_eight_devices_compute_what_one_computes():
    """Values of one device are the reference; the loop is long enough to hang without the guard."""
    code = """
    assert guard_cpu_thread_pool() == 16
    mesh, one = make_mesh(), make_mesh(jax.devices()[:1])
    assert mesh.size == 8

    generator = np.random.default_rng(0)
    batch = {
        "image": generator.normal(size=(16, 5)).astype(np.float32),
        "label": generator.integers(0, 3, 16),
    }
    state = {"w": generator.normal(size=(5, 3)).astype(np.float32), "key": jax.random.key(1)}

    def step(state, batch):
        def loss(w):
            # The mean and the variance of the whole batch, as batch normalization takes them.
            x = batch["image"]
            x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
            logits = x @ w + jax.random.normal(state["key"], (3,))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean()
        value, gradient = jax.value_and_grad(loss)(state["w"])
        return state | {"w": state["w"] - 0.1 * gradient}, value

    def run(mesh, steps):
        compiled = jax.jit(step, donate_argnums=0)
        now, placed = place_replicated(state, mesh), place_batch(batch, mesh)
        shares = [s.data.shape for s in placed["image"].addressable_shards]
        assert shares == [(16 // mesh.size, 5)] * mesh.size, shares
        for _ in range(steps):
            now, value = compiled(now, placed)
        assert now["w"].sharding.is_fully_replicated
        return np.asarray(now["w"]), float(value)

    (w8, v8), (w1, v1) = run(mesh, 200), run(one, 200)
    np.testing.assert_allclose(w8, w1, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(v8, v1, rtol=1e-5)

    placed = place_replicated({"key": jax.random.key(5), "n": 3, "x": np.ones(2)}, mesh)
    assert all(x.sharding.is_fully_replicated and len(x.devices()) == 8
               for x in jax.tree.leaves(placed))
    data = jax.random.key_data
    assert jnp.array_equal(data(placed["key"]), data(jax.random.key(5)))

    # Donating what was placed leaves what was given, on all devices and on those alone.
    next_key = lambda key: jax.random.fold_in(key, 1)
    for held in (jnp.ones(9), jax.device_put(jnp.ones(9), jax.devices()[3])):
        given = {"w": held, "key": jax.random.key(2)}
        for target in (mesh, one):
            jax.block_until_ready(jax.jit(jnp.negative, donate_argnums=0)(
                place_replicated(given, target)["w"]))
            jax.block_until_ready(jax.jit(next_key, donate_argnums=0)(
                place_replicated(given, target)["key"]))
            assert np.array_equal(given["w"], np.ones(9))
            assert jnp.array_equal(data(given["key"]), data(jax.random.key(2)))

    keys = place_batch(jax.random.split(jax.random.key(0), 8), mesh)
    assert len(keys.devices()) == 8

    said = refused(place_batch, {"image": np.ones((20, 2))}, mesh)
    assert "must be a multiple of the 8 devices, got 20" in said, said
    assert said.endswith("is 16 or 24"), said
    assert refused(place_batch, np.ones(5), mesh).endswith("is 8")
    assert refused(place_batch, np.ones(7), make_mesh(jax.devices()[2:5])).endswith("is 6 or 9")
    """
    finish(child(code, XLA_FLAGS="--xla_force_host_platform_device_count=8"))


def test_large_leaves_are_split_and_the_rest_is_as_before():
    """One device is the reference; float64, so that only the order of sums differs.

    The bytes of a device are computed from shapes; a kernel that eight does not divide stays whole.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "tests/support/run_sharded.py"],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
            "NPROC": "16",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"] == found["computed"] < found["whole"] / 5
    assert 0 < found["divided"] < found["large"]
    assert "layer4/0/conv1/kernel" in found["split"]
    assert "conv1/kernel" not in found["split"]
    assert found["split in the average"] == found["split"]
    assert [found[f"programs of {name}"] for name in ("one", "eight", "split")] == [1, 1, 1]
    assert found["difference of eight"] < 1e-12
    assert found["difference of split"] < 1e-12
    # Kernels are joined, and no image is sent: convolutions stay those of a device's own images.
    # A BatchNorm by the batch has one message in each pass; flax's, on one device, has none here,
    # and over devices 3.7 of them.
    assert found["norms"] == 11
    assert found["all-gather"] == len(found["split"]) + found["norms"]
    assert found["all-reduce"] <= 2 * found["norms"]
    assert found["all-to-all"] == found["collective-permute"] == 0


@pytest.mark.parametrize(
    ("shape", "above", "spec"),
    [
        ((3, 3, 16, 32), 1024, (None, None, None, "data")),
        ((3, 3, 32, 16), 1024, (None, None, "data")),
        ((512, 512), 1024, (None, "data")),
        # Not larger than what is large; not divisible; nothing is split.
        ((256,), 1024, ()),
        ((257,), 1024, ("data",)),
        ((512, 512), None, ()),
        ((), 0, ()),
    ],
)
def test_a_large_leaf_is_split_along_its_longest_axis(shape, above, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = leaf_shardings({"w": leaf, "key": jax.random.key(0)}, make_mesh(), above)
    assert tuple(found["w"].spec) == spec
    assert tuple(found["key"].spec) == ()


@pytest.mark.slow
def test_two_processes_of_four_devices():
    """Each process gives its share; a mean over the batch is that of both shares."""
    code = """
    port, index = sys.argv[1], int(sys.argv[2])
    jax.config.update("jax_num_cpu_devices", 4)
    assert guard_cpu_thread_pool() >= 8
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    mesh = make_mesh()
    assert mesh.size == 8
    share = np.arange(8.0, dtype=np.float32).reshape(4, 2) + 8 * index
    batch = place_batch({"x": share}, mesh)
    assert batch["x"].shape == (8, 2)
    mean = jax.jit(lambda b: b["x"].mean(0), out_shardings=replicated(mesh))(batch)
    assert np.array_equal(mean, [7.0, 8.0]), mean
    assert refused(place_batch, {"x": share[:3]}, mesh).endswith("is 4")

    tree = {"key": jax.random.key(3), "w": jnp.ones(2), "n": 5, "host": np.arange(3)}
    placed = place_replicated(tree, mesh)
    again = place_replicated(placed, mesh)
    for leaf in jax.tree.leaves((placed, again)):
        assert leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8
    key = jax.jit(jax.random.key_data, out_shardings=replicated(mesh))(again["key"])
    assert np.array_equal(key.addressable_data(0), jax.random.key_data(tree["key"]))
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = [child(code, port, index) for index in range(2)]
    for process in pair:
        finish(process)


KEEPS = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from flaxtransfer.sharding import keep_compiled

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
place = keep_compiled(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
found = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8)))
print(place, sum(name.endswith("/cache_hits") for name in hits) > 0, float(found.sum()))
"""


def started(folder, **environment):
    names = {name: text for name, text in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", KEEPS, str(folder)],
        env=names | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.once
def test_a_second_start_finds_what_the_first_one_compiled(tmp_path):
    place, hit, value = started(tmp_path / "compiled")
    assert (hit, Path(place).parent) == ("False", tmp_path / "compiled")
    assert list(Path(place).glob("*-cache"))
    assert started(tmp_path / "compiled") == [place, "True", value]
    # A file is in the way of the folder; and jax was told another one.
    (tmp_path / "file").touch()
    assert started(tmp_path / "file") == ["None", "False", value]
    other = started(tmp_path / "no", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "told"))
    assert other[0] == "None"
    assert not (tmp_path / "no").exists()
