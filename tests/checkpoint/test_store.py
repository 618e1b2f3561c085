"""Claims about checkpoints, most of them proven by breaking something.

The expected values are analytic: what was saved is what must come back, or a named reason why
not. Faults are real ones: flipped bits, cut and missing files, a killed writer, a full disk.
"""

from __future__ import annotations

import errno
import json
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.checkpoint import Checkpoints, DamagedCheckpointError, orbax_driver
from flaxtransfer.checkpoint.record import seal, unseal

ROOT = Path(__file__).resolve().parents[2]


class TrainState(NamedTuple):
    step: int
    params: dict
    opt_state: optax.OptState
    rng: jax.Array


def train_state(value: float = 0.0) -> TrainState:
    params = {
        "stem": {"kernel": jnp.full((3, 4), value, jnp.bfloat16)},
        "fc": {"kernel": jnp.full((4, 2), value + 1), "bias": jnp.zeros(0)},
    }
    labels = {"stem": "frozen", "fc": "new"}
    tx = optax.partition({"new": optax.adamw(1e-3), "frozen": optax.set_to_zero()}, labels)
    return TrainState(int(value), params, tx.init(params), jax.random.key(int(value)))


def tree_of(value: float) -> dict:
    return {"a": {"kernel": np.full((50, 70), float(value))}, "b": np.arange(900.0) + value}


def same(a, b) -> bool:
    """Equal structures, and leaves that are equal in type, dtype and every bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (type(x), getattr(x, "dtype", 0), bits(x)) == (type(y), getattr(y, "dtype", 0), bits(y))
        for x, y in pairs
    )


def bits(leaf) -> bytes:
    key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A folder with step 1 (metric 0.9) and step 2 (metric 0.5), to copy and to break."""
    folder = tmp_path_factory.mktemp("two") / "steps"
    with Checkpoints.open(folder) as store:
        store.save(1, tree_of(1), {"epoch": 1}, metric=0.9)
        store.save(2, tree_of(2), {"epoch": 2}, metric=0.5)
    return folder


@pytest.fixture
def broken(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "steps"))


# What goes in comes out.


def test_a_train_state_comes_back_bit_for_bit(tmp_path):
    state = train_state(7)
    with Checkpoints.open(tmp_path) as store:
        store.save(7, state, {"phase": "head", "seen": (1, 2)}, metric=jnp.float32(0.25))
        restored = store.restore(train_state(0))
    assert same(restored.tree, state)
    assert type(restored.tree.step) is int
    assert (restored.step, restored.metric, restored.skipped) == (7, 0.25, ())
    assert restored.meta == {"phase": "head", "seen": [1, 2]}


def test_shapes_alone_are_template_enough(tmp_path):
    state = train_state(3)._replace(step=jnp.int32(3))
    with Checkpoints.open(tmp_path) as store:
        store.save(3, state)
        restored = store.restore(jax.eval_shape(lambda: state))
    assert same(restored.tree, state)


TREES = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.sampled_from(
        [
            3, 2.5, True, float("inf"), None, (), {}, np.float32(1), np.zeros((2, 0)), np.ones(()),
            np.arange(3), jnp.ones((2, 1), jnp.bfloat16), jnp.arange(4, dtype=jnp.int8),
            jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg")), optax.EmptyState(),
            optax.MaskedNode(), [np.bool_(True), {"x": jnp.float16(2)}],
        ]
    ),
    max_size=5,
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(tree=TREES)
def test_any_tree_comes_back_from_the_disk(tree, tmp_path_factory):
    with Checkpoints.open(tmp_path_factory.mktemp("any")) as store:
        store.save(0, tree)
        assert same(store.restore(tree).tree, tree)


def test_a_tree_may_be_donated_while_it_is_written(tmp_path):
    tree = {f"w{i}": jnp.arange(50_000.0) + i for i in range(8)}
    expected = jax.tree.map(np.array, tree)
    with Checkpoints.open(tmp_path) as store:
        store.save(1, tree, wait=False)
        step = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
        for _ in range(20):
            tree = step(tree)
        assert same(store.restore(expected).tree, expected)


def test_numpy_arrays_may_be_written_into_while_they_are_saved(tmp_path):
    tree = {f"w{i}": np.arange(50_000.0) + i for i in range(8)}
    expected = jax.tree.map(np.array, tree)
    with Checkpoints.open(tmp_path) as store:
        store.save(1, tree, wait=False)
        for array in tree.values():
            array[:] = -1
        assert same(store.restore(expected).tree, expected)


# Which steps are kept, and which is the best.


@pytest.mark.parametrize(
    ("metrics", "keep", "kept", "best"),
    [
        ([0.1, 0.9, 0.3, 0.2, 0.4], {}, [2, 4, 5], 2),
        ([0.1, 0.9, 0.3, 0.2, 0.4], {"keep_latest": 1}, [2, 5], 2),
        ([0.1, 0.9, 0.3, 0.5, 0.4], {"keep_latest": 1, "keep_best": 2}, [2, 4, 5], 2),
        ([0.1, 0.9, 0.3], {"keep_latest": 1, "keep_best": 0}, [3], 3),
        ([0.5, 0.5, 0.5, 0.5], {"keep_latest": 1}, [1, 4], 1),
        ([0.1, np.nan, 0.5, np.nan, 0.2], {"keep_latest": 1}, [3, 5], 3),
        ([np.nan, np.nan, np.nan], {"keep_latest": 1}, [3], None),
        ([-np.inf, np.inf, 0.0, None], {"keep_latest": 1}, [3, 4], 3),
        ([None, None, None], {}, [2, 3], None),
        ([None, 0.2, None, None], {}, [2, 3, 4], 2),
    ],
)
def test_best_and_latest_are_kept(metrics, keep, kept, best, tmp_path):
    with Checkpoints.open(tmp_path, **keep) as store:
        for step, metric in enumerate(metrics, 1):
            store.save(step, tree_of(step), metric=metric)
        assert (store.steps(), store.best(), store.latest()) == (kept, best, len(metrics))
        if best is None:
            with pytest.raises(FileNotFoundError, match="no step has a metric"):
                store.restore(tree_of(0), "best")
        else:
            restored = store.restore(tree_of(0), "best")
            assert (restored.step, restored.metric) == (best, metrics[best - 1])
            assert same(restored.tree, tree_of(best))
    assert names(tmp_path) == [str(step) for step in kept]


@pytest.mark.parametrize("step", [2, 1, 0])
def test_a_step_that_is_not_above_the_newest_is_refused(step, broken):
    before = files(broken)
    with Checkpoints.open(broken) as store:
        with pytest.raises(ValueError, match=rf"step {step} is not above.*\[1, 2\]"):
            store.save(step, tree_of(step))
        assert store.steps() == [1, 2]
    assert files(broken) == before


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_a_step_is_a_whole_number(step, tmp_path):
    with Checkpoints.open(tmp_path) as store, pytest.raises(ValueError, match="whole number"):
        store.save(step, tree_of(0))


@pytest.mark.parametrize("keep", [{"keep_best": -1}, {"keep_latest": 0}])
def test_numbers_to_keep_are_checked(keep, tmp_path):
    with pytest.raises(ValueError, match="must be kept"), Checkpoints.open(tmp_path, **keep):
        pass


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    with Checkpoints.open(tmp_path) as store:
        for tree, meta, metric in [
            ({"a": "text"}, {}, None),
            (tree_of(0), {"loss": np.float32(1)}, None),
            (tree_of(0), {}, "high"),
        ]:
            with pytest.raises(TypeError):
                store.save(1, tree, meta, metric=metric)
    assert names(tmp_path) == []


# Damage.


def restore_newest(folder: Path):
    with Checkpoints.open(folder, read_only=True) as store:
        return store.restore(tree_of(0))


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
    path.write_text(json.dumps(seal(unseal(path.read_text()) | {"format": 2})))
    with pytest.raises(ValueError, match=r"has the format 2; .* reads format 1"):
        restore_newest(broken)


def damage(folder: Path, step: int, part: str = "arrays") -> None:
    name = {"arrays": "tree/manifest.ocdbt", "record": "record/metadata"}[part]
    (folder / str(step) / name).write_bytes(b"{}")


def test_all_damaged_is_one_error_and_nothing_is_deleted(broken):
    damage(broken, 1, "arrays")
    damage(broken, 2, "record")
    before = files(broken)
    with Checkpoints.open(broken) as store:
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
        with Checkpoints.open(broken) as store:
            assert store.restore(tree_of(0)).step == 1
            assert store.steps() == [1]
            store.save(2, tree_of(20 + round_), {"again": round_})
            assert store.steps() == [1, 2]
            assert same(store.restore(tree_of(0)).tree, tree_of(20 + round_))
        assert (broken / aside / "tree" / "manifest.ocdbt").read_bytes() == b"{}"
    assert names(broken) == ["1", "2", "2.damaged", "2.damaged.2"]


def test_a_step_below_the_damaged_one_can_be_saved(two_steps, tmp_path):
    with Checkpoints.open(tmp_path) as store:
        store.save(10, tree_of(10))
        store.save(20, tree_of(20))
    damage(tmp_path, 20, "record")
    with Checkpoints.open(tmp_path) as store:
        store.save(15, tree_of(15))
    assert names(tmp_path) == ["10", "15", "20.damaged"]


def test_a_step_asked_for_by_number_is_never_replaced(broken):
    damage(broken, 2)
    with Checkpoints.open(broken, read_only=True) as store:
        with pytest.raises(DamagedCheckpointError, match=r"step 2: .*\n.*other steps there: \[1\]"):
            store.restore(tree_of(0), 2)
        with pytest.raises(FileNotFoundError, match=r"no step 5; there are \[1, 2\].* is 2"):
            store.restore(tree_of(0), 5)
        assert store.restore(tree_of(0), 1).step == 1


@pytest.mark.parametrize("part", ["arrays", "record"])
def test_a_damaged_best_is_reported_and_the_next_best_taken(part, tmp_path):
    with Checkpoints.open(tmp_path, keep_best=2) as store:
        for step, metric in [(1, 0.8), (2, 0.9), (3, 0.1), (4, None)]:
            store.save(step, tree_of(step), metric=metric)
    damage(tmp_path, 2, part)
    with Checkpoints.open(tmp_path) as store:
        restored = store.restore(tree_of(0), "best")
        assert restored.step == 1
        assert [step for step, _ in restored.skipped] == [2]


def test_a_shortage_of_the_machine_is_not_damage(broken, monkeypatch):
    async def fail(self, infos, args=None):
        raise ValueError("Error opening file [os_error_code='24']")

    monkeypatch.setattr(orbax_driver._Patient, "deserialize", fail)
    with Checkpoints.open(broken) as store:
        with pytest.raises(OSError, match="step 2 cannot be read now") as caught:
            store.restore(tree_of(0))
        assert caught.value.errno == errno.EMFILE
        assert store.steps() == [1, 2]


def test_another_configuration_is_an_error_that_lists_every_leaf(broken):
    other = {"a": {"kernal": np.ones((50, 70))}, "b": np.ones(901), "n": 3}
    with Checkpoints.open(broken) as store:
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
    with Checkpoints.open(tmp_path) as store:
        store.save(1, tree_of(1))
        store.save(2, {"new": np.ones(3)})
        with pytest.raises(ValueError, match="step 2 of"):
            store.restore(tree_of(0))


# The folder.


def test_reading_changes_nothing_and_saving_is_refused(broken):
    (broken / "3.orbax-checkpoint-tmp").mkdir()
    before = names(broken), files(broken)
    with Checkpoints.open(broken, read_only=True) as store:
        assert store.restore(tree_of(0)).step == 2
        with pytest.raises(ValueError, match="not open for writing"):
            store.save(3, tree_of(3))
    assert (names(broken), files(broken)) == before


def test_a_folder_can_be_read_while_it_is_written_but_has_one_writer(tmp_path):
    with Checkpoints.open(tmp_path) as store:
        store.save(1, tree_of(1))
        with Checkpoints.open(tmp_path, read_only=True) as reader:
            assert reader.restore(tree_of(0)).step == 1
            store.save(2, tree_of(2))
            assert reader.latest() == 2
        with (
            pytest.raises(ValueError, match="is being written by process"),
            Checkpoints.open(tmp_path),
        ):
            pass
    with pytest.raises(ValueError, match="not open for writing"):
        store.save(3, tree_of(3))


def test_leftovers_of_a_killed_writer_are_removed_by_the_next_one(broken):
    for name in ("3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17", "1.deleting"):
        (broken / name / "tree").mkdir(parents=True)
    (broken / "notes").mkdir()
    with Checkpoints.open(broken) as store:
        assert store.steps() == [1, 2]
    assert names(broken) == ["1", "2", "notes"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_a_folder(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError), Checkpoints.open(tmp_path / place):
        pass
    with (
        pytest.raises((NotADirectoryError, FileNotFoundError)),
        Checkpoints.open(tmp_path / place, read_only=True),
    ):
        pass


def test_places_without_checkpoints(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="no folder of checkpoints"),
        Checkpoints.open(tmp_path / "none", read_only=True),
    ):
        pass
    with pytest.raises(ValueError, match="mounted folder"), Checkpoints.open("gs://bucket/run"):
        pass
    (tmp_path / "3.damaged").mkdir()
    with Checkpoints.open(tmp_path) as store:
        assert (store.steps(), store.latest(), store.best()) == ([], None, None)
        with pytest.raises(FileNotFoundError, match=r"no checkpoint there.*3\.damaged"):
            store.restore(tree_of(0))


def test_an_exception_in_the_block_does_not_lose_the_step_being_written(tmp_path):
    def train():
        with Checkpoints.open(tmp_path) as store:
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

    with Checkpoints.open(tmp_path) as store:
        store.save(1, tree_of(1))
        blocker = tmp_path / "2"
        blocker.write_text("")
        with pytest.raises(OSError, match=r"step 2 was not written .*steps \[1\] are") as caught:
            save(2)
        assert "\n" not in str(caught.value)
        blocker.unlink()
        store.save(2, tree_of(2))
        assert store.steps() == [1, 2]


# Whole processes: killed, out of space, on other devices.

PRELUDE = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
from flaxtransfer.checkpoint import Checkpoints

def tree(step, leaves=40, size=30_000):
    return {f"w{i}": np.full(size, step * 100.0 + i, np.float32) for i in range(leaves)}
"""


def child(code: str, *arguments: object, prefix: tuple[str, ...] = (), **environment: str):
    script = PRELUDE + textwrap.dedent(code)
    return subprocess.Popen(
        [*prefix, sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def big_tree(step: int) -> dict:
    return {f"w{i}": np.full(30_000, step * 100.0 + i, np.float32) for i in range(40)}


FOREVER = """
with Checkpoints.open(sys.argv[1]) as store:
    step = (store.latest() or 0) + 1
    while True:
        store.save(step, tree(step), {"step": step}, metric=1 / step, wait=sys.argv[2] == "wait")
        print(step, flush=True)
        step += 1
"""


def check_after_a_kill(folder: Path, acknowledged: int) -> None:
    with Checkpoints.open(folder) as store:
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
        "orbax_driver._Patient._open_and_write",
        # The step has its name, but the system may still hold it in memory.
        "step_files.flush",
        # An older step has lost its name, and its files are about to go.
        "steps.shutil.rmtree",
    ],
)
def test_killed_at_a_place(place, tmp_path):
    code = f"""
    from flaxtransfer.checkpoint import orbax_driver, step_files, steps
    with Checkpoints.open(sys.argv[1], keep_latest=1, keep_best=0) as store:
        store.save(1, tree(1), {{"step": 1}})
        owner, name = {place.rpartition(".")[0]}, {place.rpartition(".")[2]!r}
        setattr(owner, name, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
        store.save(2, tree(2), {{"step": 2}})
    """
    process = child(code, tmp_path)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (-signal.SIGKILL, "")
    assert any(not name.isdecimal() for name in names(tmp_path)) is ("flush" not in place)
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

with Checkpoints.open(folder) as store:
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
        with Checkpoints.open(folder):
            pass
    except OSError as error:
        print(errno.errorcode[error.errno], error.strerror)
    with Checkpoints.open(folder, read_only=True) as store:
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
    with Checkpoints.open(sys.argv[1]) as store:
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
    with Checkpoints.open(tmp_path, read_only=True) as store:
        tree = store.restore(like | {"keys": jax.random.split(key, 8)}).tree
    assert same(tree, {"cut": jnp.arange(16.0), "whole": jnp.arange(3), "key": key}
                | {"keys": jax.random.split(key, 8)})  # fmt: skip


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
    with Checkpoints.open(folder) as store:
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
            print("said:", "step 3 was not written" in text, "process 0 could not" in text)
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
    assert first == ["True False", "1 [2]", "[1, 2] 1"]
    assert second == ["False True", "1 [2]", "[1, 2] 1"]
    with Checkpoints.open(tmp_path) as store:
        like = {"cut": jnp.zeros(8), "whole": jnp.zeros(3), "key": jax.random.key(0)}
        tree = store.restore(like).tree
    assert same(tree, {"cut": jnp.arange(8.0), "whole": jnp.arange(3.0), "key": jax.random.key(4)})
