"""Checkpoints of whole processes: killed, out of space, on other devices."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.checkpoint import CheckpointManager
from tests.support.stored import names, same

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from flaxtransfer.checkpoint import CheckpointManager

def tree(step, leaves=40, size=30_000):
    return {f"w{i}": np.full(size, step * 100.0 + i, np.float32) for i in range(leaves)}
"""


def child(code: str, *arguments: object, prefix: tuple[str, ...] = (), **environment: str):
    script = PRELUDE + textwrap.dedent(code)
    return subprocess.Popen(
        [*prefix, sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def big_tree(step: int) -> dict:
    return {f"w{i}": np.full(30_000, step * 100.0 + i, np.float32) for i in range(40)}


FOREVER = """
with CheckpointManager.open(sys.argv[1]) as store:
    step = (store.latest() or 0) + 1
    while True:
        store.save(step, tree(step), {"step": step}, metric=1 / step, wait=sys.argv[2] == "wait")
        print(step, flush=True)
        step += 1
"""


def check_after_a_kill(folder: Path, acknowledged: int) -> None:
    with CheckpointManager.open(folder) as store:
        restored = store.restore(big_tree(0))
        assert restored.skipped == ()
        assert restored.step >= acknowledged
        assert restored.meta == {"step": restored.step}
        assert same(restored.tree, big_tree(restored.step))
        assert all(name.isdecimal() for name in names(folder))
        store.save(restored.step + 1, big_tree(restored.step + 1), {"step": restored.step + 1})


@pytest.mark.parametrize("wait", ["wait", "go on"])
def test_killed_at_random_moments(wait, tmp_path):
    """Each writer goes on where the killed one ended; what was acknowledged is there."""
    generator = random.Random(wait)
    for _ in range(3):
        process = child(FOREVER, tmp_path, wait)
        last = 0
        for _ in range(generator.randint(2, 4)):
            last = int(process.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        said, err = process.communicate()
        last = max([last, *map(int, said.split())])
        assert err == ""
        # With wait=False the last step that save returned for may still be on its way.
        check_after_a_kill(tmp_path, last if wait == "wait" else last - 1)


@pytest.mark.parametrize(
    "place",
    [
        # While the arrays are being written.
        "orbax_io._WaitingNumpyHandler._open_and_write",
        # The step has its name, but the system may still hold it in memory.
        "step_files.sync",
        # An older step has lost its name, and its files are about to go.
        "step_files.shutil.rmtree",
    ],
)
def test_killed_at_a_place(place, tmp_path):
    code = f"""
    from flaxtransfer.checkpoint import orbax_io, step_files
    with CheckpointManager.open(sys.argv[1], keep_latest=1, keep_best=0) as store:
        store.save(1, tree(1), {{"step": 1}})
        owner, name = {place.rpartition(".")[0]}, {place.rpartition(".")[2]!r}
        setattr(owner, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        store.save(2, tree(2), {{"step": 2}})
    """
    process = child(code, tmp_path)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (-signal.SIGKILL, "")
    assert any(not name.isdecimal() for name in names(tmp_path)) is ("sync" not in place)
    check_after_a_kill(tmp_path, 1)


FULL = """
import errno, pathlib, resource
folder, kind = sys.argv[1:]
unlimited = resource.RLIM_INFINITY

def shrink():
    if kind == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited))
    elif kind == "disk":
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        pathlib.Path(folder, "fill").write_bytes(bytes(free - 2_000_000))

def grow():
    if kind == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    elif kind == "disk":
        os.unlink(folder + "/fill")

def attempt(step, **more):
    try:
        store.save(step, tree(step), **more)
        print("saved", step)
    except OSError as error:
        assert "\\n" not in str(error)
        print(errno.errorcode[error.errno], error.strerror)

with CheckpointManager.open(folder) as store:
    attempt(1)
    shrink()
    attempt(2)
    attempt(2, wait=False)   # may fail at once or later
    attempt(3)               # in the latter case the error comes out here
    print(store.steps(), sorted(n for n in os.listdir(folder) if "tmp" in n))
    grow()
    attempt(4)
    print(store.restore(tree(0)).tree["w3"][7] == 403.0, store.restore(tree(0), 1).step)

if kind == "disk":
    assert os.system(f"mount -o remount,ro {folder}") == 0
    try:
        with CheckpointManager.open(folder):
            pass
    except OSError as error:
        print(errno.errorcode[error.errno], error.strerror)
    with CheckpointManager.open(folder, read_only=True) as store:
        print("read", store.restore(tree(0)).step)
"""

# A private name space, so that what is mounted goes away with the process.
_PRIVATE = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=30m none "$0" && exec "$@"')


def _may_mount() -> bool:
    return shutil.which("unshare") is not None and (
        subprocess.run([*_PRIVATE, "/mnt", "true"], capture_output=True, check=False).returncode
        == 0
    )


# Without the right to mount, the limit on the size of a file stands for the full disk.
@pytest.mark.parametrize(
    ("kind", "code"), [("file size", "EFBIG")] + [("disk", "ENOSPC")] * _may_mount()
)
def test_no_space_is_one_clear_error_and_older_steps_stay(kind, code, tmp_path):
    prefix = () if kind == "file size" else (*_PRIVATE, str(tmp_path))
    lines = finish(child(FULL, tmp_path, kind, prefix=prefix))
    assert lines.pop(0) == "saved 1"
    if kind == "disk":
        assert lines.pop() == "read 4"
        assert lines.pop() == "EROFS the folder cannot be written (read-only file system)"
    assert lines[-3:] == ["[1] []", "saved 4", "True 1"]
    # Without waiting, the failure may come out of the same call or of the next.
    refusals = [line for line in lines[:-3] if line != "saved 2"]
    assert len(refusals) >= 2
    for line in refusals:
        assert re.match(rf"{code} step [23] was not written \(.*steps \[1\] are intact", line)
        assert ("MB free" in line) is (kind == "disk")


def test_other_devices_and_shardings(tmp_path):
    """Saved cut over 8 devices; restored cut over 2, and here on one."""
    code = """
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    assert jax.device_count() == 8

    def place(count, spec):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, spec)

    tree = {
        "cut": jax.device_put(jnp.arange(16.0), place(8, P("data"))),
        "whole": jax.device_put(jnp.arange(3), place(8, P())),
        "key": jax.device_put(jax.random.key(5), place(8, P())),
        "keys": jax.device_put(jax.random.split(jax.random.key(5), 8), place(8, P("data"))),
    }
    with CheckpointManager.open(sys.argv[1]) as store:
        store.save(1, tree)
        like = {
            "cut": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=place(2, P("data"))),
            "whole": jax.ShapeDtypeStruct((3,), jnp.int32, sharding=place(2, P())),
            "key": jax.ShapeDtypeStruct((), tree["key"].dtype, sharding=place(2, P())),
            "keys": jax.ShapeDtypeStruct((8,), tree["key"].dtype, sharding=place(2, P("data"))),
        }
        restored = store.restore(like).tree
    for name, leaf in restored.items():
        assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim), name
        a, b = (jax.random.key_data(x) if "key" in name else x for x in (leaf, tree[name]))
        assert np.array_equal(a, b), name
    """
    flags = "--xla_force_host_platform_device_count=8"
    finish(child(code, tmp_path, XLA_FLAGS=flags, NPROC="16"))
    key = jax.random.key(5)
    like = {"cut": jnp.zeros(16), "whole": jnp.zeros(3, jnp.int32), "key": key}
    with CheckpointManager.open(tmp_path, read_only=True) as store:
        tree = store.restore(like | {"keys": jax.random.split(key, 8)}).tree
    assert same(
        tree,
        {"cut": jnp.arange(16.0), "whole": jnp.arange(3), "key": key}
        | {"keys": jax.random.split(key, 8)},
    )


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    code = """
    import jax.experimental.multihost_utils
    folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    make = jax.jit(
        lambda: {"cut": jnp.arange(8.0), "whole": jnp.arange(3.0), "key": jax.random.key(4)},
        out_shardings={"cut": cut, "whole": whole, "key": whole},
    )
    tree = make()
    with CheckpointManager.open(folder) as store:
        store.save(1, tree, {"a": 1}, metric=0.5)
        store.save(2, tree, wait=False)
        restored = store.restore(tree)
        assert restored.step == 2, restored.step
        for name, leaf in restored.tree.items():
            assert leaf.sharding == tree[name].sharding, name
        numbers = lambda t: t | {"key": jax.random.key_data(t["key"])}
        equal = lambda a, b: jax.tree.map(lambda x, y: (x == y).all(), numbers(a), numbers(b))
        assert all(jax.tree.leaves(jax.jit(equal)(restored.tree, tree)))
        if index == 0:
            open(folder + "/3", "w").close()
        try:
            store.save(3, tree)
            raise AssertionError
        except OSError as error:
            text = str(error)
            print("said:", "step 3 was not written" in text, error.errno)
        if index == 0:
            os.unlink(folder + "/3")
            os.unlink(folder + "/2/tree/manifest.ocdbt")
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        restored = store.restore(tree)
        print("said:", restored.step, [step for step, _ in restored.skipped])
        store.save(2, tree)
        print("said:", store.steps(), store.best())
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pair = [child(code, tmp_path, port, index, NPROC="8") for index in range(2)]
    said = [process.communicate(timeout=180) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    # Gloo, which connects the two, prints lines of its own in between.
    first, second = (re.findall(r"said: (.*)", out) for out, _ in said)
    assert first == second
    assert first[1:] == ["1 [2]", "[1, 2] 1"]
    assert first[0].startswith("True ")
    with CheckpointManager.open(tmp_path) as store:
        like = {"cut": jnp.zeros(8), "whole": jnp.zeros(3), "key": jax.random.key(0)}
        tree = store.restore(like).tree
    assert same(tree, {"cut": jnp.arange(8.0), "whole": jnp.arange(3.0), "key": jax.random.key(4)})
