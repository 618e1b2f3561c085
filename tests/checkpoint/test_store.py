"""Claims about checkpoints: what goes in comes out, and which steps are kept."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.checkpoint import CheckpointManager
from tests.support.stored import files, names, same, tree_of


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


# What goes in comes out.


def test_a_train_state_comes_back_bit_for_bit(tmp_path):
    state = train_state(7)
    with CheckpointManager.open(tmp_path) as store:
        store.save(7, state, {"phase": "head", "seen": (1, 2)}, metric=jnp.float32(0.25))
        restored = store.restore(train_state(0))
    assert same(restored.tree, state)
    assert type(restored.tree.step) is int
    assert (restored.step, restored.metric, restored.skipped) == (7, 0.25, ())
    assert restored.meta == {"phase": "head", "seen": [1, 2]}


def test_shapes_alone_are_template_enough(tmp_path):
    state = train_state(3)._replace(step=jnp.int32(3))
    with CheckpointManager.open(tmp_path) as store:
        store.save(3, state)
        restored = store.restore(jax.eval_shape(lambda: state))
    assert same(restored.tree, state)


TREES = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.sampled_from(
        [
            3,
            2.5,
            True,
            float("inf"),
            None,
            (),
            {},
            np.float32(1),
            np.zeros((2, 0)),
            np.ones(()),
            np.arange(3),
            jnp.ones((2, 1), jnp.bfloat16),
            jnp.arange(4, dtype=jnp.int8),
            jax.random.key(1),
            jax.random.split(jax.random.key(2, impl="rbg")),
            optax.EmptyState(),
            optax.MaskedNode(),
            [np.bool_(True), {"x": jnp.float16(2)}],
        ]
    ),
    max_size=5,
)


@settings(max_examples=15, deadline=None)
@given(tree=TREES)
def test_any_tree_comes_back_from_the_disk(tree, tmp_path_factory):
    with CheckpointManager.open(tmp_path_factory.mktemp("any")) as store:
        store.save(0, tree)
        assert same(store.restore(tree).tree, tree)


def test_a_tree_may_be_donated_while_it_is_written(tmp_path):
    tree = {f"w{i}": jnp.arange(50_000.0) + i for i in range(8)}
    expected = jax.tree.map(np.array, tree)
    with CheckpointManager.open(tmp_path) as store:
        store.save(1, tree, wait=False)
        step = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
        for _ in range(20):
            tree = step(tree)
        assert same(store.restore(expected).tree, expected)


def test_numpy_arrays_may_be_written_into_while_they_are_saved(tmp_path):
    tree = {f"w{i}": np.arange(50_000.0) + i for i in range(8)}
    expected = jax.tree.map(np.array, tree)
    with CheckpointManager.open(tmp_path) as store:
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
    with CheckpointManager.open(tmp_path, **keep) as store:
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
    with CheckpointManager.open(broken) as store:
        with pytest.raises(ValueError, match=rf"step must be above .*\[1, 2\], got {step}"):
            store.save(step, tree_of(step))
        assert store.steps() == [1, 2]
    assert files(broken) == before


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_a_step_is_a_whole_number(step, tmp_path):
    with (
        CheckpointManager.open(tmp_path) as store,
        pytest.raises(ValueError, match="whole number >= 0"),
    ):
        store.save(step, tree_of(0))


@pytest.mark.parametrize("keep", [{"keep_best": -1}, {"keep_latest": 0}])
def test_numbers_to_keep_are_checked(keep, tmp_path):
    with (
        pytest.raises(ValueError, match="keep_best must be >= 0 and keep_latest >= 1"),
        CheckpointManager.open(tmp_path, **keep),
    ):
        pass


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    with CheckpointManager.open(tmp_path) as store:
        for tree, meta, metric in [
            ({"a": "text"}, {}, None),
            (tree_of(0), {"loss": np.float32(1)}, None),
            (tree_of(0), {}, "high"),
        ]:
            with pytest.raises(TypeError):
                store.save(1, tree, meta, metric=metric)
    assert names(tmp_path) == []
