"""Masks, labels, groups and tables on the trees of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxtransfer as ft
from flaxtransfer.batchnorm import modules, policy
from flaxtransfer.groups import trainable_mask
from flaxtransfer.masks import resolve, selected
from flaxtransfer.optimizers import migrate
from flaxtransfer.paths import flatten

KEY = jax.random.key(0)


def drawn(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape)


class Pair(NamedTuple):
    encoder: Any
    decoder: Any


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: Any
    bias: Any


class Network(eqx.Module):
    layers: list[Any]
    activation: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](self.activation(self.layers[0](x)))


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])
        self.head = nnx.Linear(3, 2, rngs=rngs)


EQUINOX = Network([eqx.nn.Linear(2, 3, key=KEY), eqx.nn.Linear(3, 2, key=KEY)], jax.nn.relu)

# The tree, a glob for the last layer, the paths of that layer, and those of all matrices.
TREES = {
    "equinox": (
        eqx.filter(EQUINOX, eqx.is_array),
        "layers/1/*",
        {"layers/1/weight", "layers/1/bias"},
        {"layers/0/weight", "layers/1/weight"},
    ),
    "haiku": (
        {
            "res_net/~/conv1": {"w": drawn(3, 3, 1, 2)},
            "res_net/~/block/~/bn": {"scale": drawn(2), "offset": drawn(2)},
            "res_net/~/logits": {"w": drawn(2, 4), "b": drawn(4)},
        },
        "res_net/~/logits/*",
        {"res_net/~/logits/w", "res_net/~/logits/b"},
        {"res_net/~/conv1/w", "res_net/~/logits/w"},
    ),
    "list": (
        [{"w": drawn(2, 3), "b": drawn(3)}, {"w": drawn(3, 2), "b": drawn(2)}],
        "1/*",
        {"1/w", "1/b"},
        {"0/w", "1/w"},
    ),
    "named tuple": (
        Pair([drawn(2, 3), drawn(3)], {"w": drawn(3, 2), "none": None}),
        "decoder/*",
        {"decoder/w"},
        {"encoder/0", "decoder/w"},
    ),
    "dataclass": (
        {"first": Layer(drawn(2, 3), drawn(3)), "last": Layer(drawn(3, 2), drawn(2))},
        "last/*",
        {"last/kernel", "last/bias"},
        {"first/kernel", "last/kernel"},
    ),
    "nnx": (
        nnx.state(Module(nnx.Rngs(0)), nnx.Param),
        "head/*",
        {"head/kernel", "head/bias"},
        {"layers/0/kernel", "head/kernel"},
    ),
}
MATRICES = ft.where(lambda path, leaf: leaf.ndim > 1, name="matrices")
EVERY = pytest.mark.parametrize("name", TREES)


def labeled(name):
    tree, last, _, _ = TREES[name]
    return tree, ft.label(tree, {"new": ft.glob(last), "old": ft.rest()})


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


@EVERY
def test_masks_select_by_path_and_by_predicate(name):
    tree, last, expected, matrices = TREES[name]
    assert selected(ft.glob(last), tree) == expected
    assert selected(MATRICES, tree) == selected(ft.matrices(), tree) == matrices
    assert selected(ft.glob(last) - MATRICES, tree, allow_empty=True) == expected - matrices
    resolved = resolve(MATRICES, tree)
    assert jax.tree.structure(resolved) == jax.tree.structure(tree)
    assert {path for path, taken in flatten(resolved).items() if taken is True} == matrices
    assert resolved == MATRICES(tree)


@EVERY
def test_labels_have_the_structure_of_the_tree(name):
    tree, labels = labeled(name)
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    assert {path for path, label in flatten(labels).items() if label == "new"} == TREES[name][2]


@EVERY
@pytest.mark.parametrize("clip", [None, 0.5])
def test_partition_moves_the_last_layer_and_leaves_the_rest_bit_for_bit(name, clip):
    tree, labels = labeled(name)
    groups = {"new": ft.Group(optax.adamw, 0.1, weight_decay=0.1), "old": ft.FROZEN}
    tx = ft.partition(groups, labels, clip=clip)
    gradients = jax.tree.map(jnp.ones_like, tree)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)
    assert jax.tree.structure(after) == jax.tree.structure(tree)
    before = bits(tree)
    assert {path for path, now in bits(after).items() if now != before[path]} == TREES[name][2]


@EVERY
def test_parts_merge_to_the_whole_and_train_as_the_whole_does(name):
    tree, labels = labeled(name)
    groups = {"new": ft.Group(optax.adamw, 0.1, weight_decay=0.1), "old": ft.FROZEN}
    parts = ft.ParamGroups(labels, groups)
    moving, still = parts.trainable(tree), parts.frozen(tree)
    assert set(flatten(moving)) == TREES[name][2] == set(parts.trainable_paths)
    assert set(flatten(still)) == set(flatten(tree)) - TREES[name][2]
    assert jax.tree.structure(parts.merge(still, moving)) == jax.tree.structure(tree)
    assert bits(parts.merge(still, moving)) == bits(tree)
    assert bits(parts.merge(tree, moving)) == bits(tree)

    def step(tx, params):
        gradients = jax.tree.map(lambda leaf: leaf + 1, params)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates)

    whole = step(ft.partition(groups, labels, clip=0.5), tree)
    assert bits(parts.merge(still, step(parts.optimizer(clip=0.5), moving))) == bits(whole)
    with pytest.raises(ValueError, match=r"labels are not of this tree: .*leaves without label: x"):
        parts.trainable({"x": jnp.ones(1)})


@EVERY
def test_optax_takes_the_labels_as_they_are(name):
    tree, labels = labeled(name)
    tx = optax.multi_transform(
        {"new": optax.sgd(1.0), "old": optax.set_to_zero()},
        # optax calls what can be called, a module of Equinox too.
        (lambda _: labels) if name == "equinox" else labels,
    )
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    assert {path for path, leaf in flatten(updates).items() if np.any(leaf)} == TREES[name][2]


@EVERY
def test_the_table_lists_every_leaf(name):
    tree, labels = labeled(name)
    groups = {"new": ft.Group(optax.adamw, 0.1, 0.1), "old": ft.FROZEN}
    table = ft.parameter_table({"params": tree}, labels, groups)
    assert {row.path for row in table.rows} == set(flatten(tree))
    assert {row.path for row in table.rows if row.trainable} == TREES[name][2]
    assert {row.path for row in table.rows if row.weight_decay} == TREES[name][2] & TREES[name][3]
    assert table == ft.ParamGroups(labels, groups).table({"params": tree})


@pytest.mark.parametrize("name", ["equinox", "haiku", "list", "dataclass", "nnx"])
def test_moments_are_carried_to_the_next_phase(name):
    tree, labels = labeled(name)
    groups = {"new": ft.Group(optax.adam, 0.1), "old": ft.FROZEN}
    first = ft.partition(groups, labels)
    second = ft.partition(groups | {"old": ft.Group(optax.adam, 0.01)}, labels)
    _, state = first.update(jax.tree.map(jnp.ones_like, tree), first.init(tree), tree)
    carried = migrate(state, second.init(tree))
    new, old = (carried[0].inner_states[label].inner_state[0] for label in ("new", "old"))
    assert int(new.count) == 1
    assert int(old.count) == 0
    assert all(leaf.any() for leaf in jax.tree.leaves(new.mu))
    assert not any(leaf.any() for leaf in jax.tree.leaves(old.mu))
    assert jax.tree.structure(carried) == jax.tree.structure(second.init(tree))


def test_the_batch_norm_policy_of_an_nnx_state():
    module = Module(nnx.Rngs(0))
    params, statistics = nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)
    assert modules(statistics) == ("layers/1",)
    for mask, expected in ((ft.glob("layers/1/*"), {"layers/1"}), (ft.glob("head/*"), set())):
        assert policy(statistics, resolve(mask, params)) == expected


def test_the_batch_norm_policy_of_a_haiku_tree():
    tree = TREES["haiku"][0]
    assert modules(tree) == ("res_net/~/block/~/bn",)
    assert policy(tree, ft.glob("**/logits/*")) == frozenset()
    assert policy(tree, ft.everything()) == {"res_net/~/block/~/bn"}
    labels = ft.label(tree, {"new": "glob('**/bn/*')", "old": ft.rest()})
    parts = ft.ParamGroups(labels, {"new": optax.sgd(0.1), "old": ft.FROZEN})
    assert parts.batch_norm() == parts.batch_norm(tree) == {"res_net/~/block/~/bn"}
    assert parts.batch_norm(tree, overrides={"everything()": "running"}) == frozenset()
    assert parts.mask == trainable_mask(labels, parts.groups)


def test_a_step_of_an_equinox_network_differentiates_what_moves():
    labels = ft.label(
        eqx.filter(EQUINOX, eqx.is_array), {"new": ft.glob("layers/1/*"), "old": ft.rest()}
    )
    parts = ft.ParamGroups(labels, {"new": ft.Group(optax.sgd, 1.0), "old": ft.FROZEN})
    arrays, functions = eqx.partition(EQUINOX, eqx.is_array)
    still, moving = parts.frozen(arrays), parts.trainable(arrays)

    def loss(moving):
        network = eqx.combine(parts.merge(still, moving), functions)
        return network(jnp.ones(2)).sum()

    gradients = jax.grad(loss)(moving)
    # Peer: Equinox's own gradient of the whole network.
    theirs = eqx.filter_grad(lambda network: network(jnp.ones(2)).sum())(EQUINOX)
    assert bits(gradients) == {p: b for p, b in bits(theirs).items() if p.startswith("layers/1/")}


def test_functions_among_the_leaves_are_leaves():
    assert "activation" in selected(ft.everything(), EQUINOX)
    with pytest.raises(TypeError, match=r"matrices\(\) needs shapes, but 'activation' is"):
        selected(ft.matrices(), EQUINOX)
