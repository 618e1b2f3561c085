"""Paths, segments, did-you-mean, and text from outside."""

from dataclasses import dataclass
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer import paths
from flaxtransfer.models.layout import RESNET
from flaxtransfer.paths import (
    flatten,
    listing,
    map_with_path,
    merge,
    nearest,
    suggest,
    unflatten,
)

keys = st.text("abé0_.*[{ ", min_size=1, max_size=3)
trees = st.dictionaries(
    keys,
    st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3)),
    max_size=4,
)


@given(trees)
def test_unflatten_is_the_inverse_of_flatten(tree):
    assert unflatten(flatten(tree)) == tree


@given(trees)
def test_paths_and_order_of_leaves_are_those_of_jax(tree):
    # Peer: jax.tree_util, which sorts the keys.
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert flatten(tree) == expected
    assert jax.tree.structure(map_with_path(lambda path, leaf: path, tree)) == jax.tree.structure(
        tree
    )


def test_map_with_path_gives_each_leaf_its_path():
    tree = {"layer1": {"0": {"conv1": {"kernel": 3}}}, "fc": {"bias": 4}}
    assert map_with_path(lambda path, leaf: (path, leaf * 2), tree) == {
        "layer1": {"0": {"conv1": {"kernel": ("layer1/0/conv1/kernel", 6)}}},
        "fc": {"bias": ("fc/bias", 8)},
    }


def test_nodes_without_leaves_have_no_path_and_stay():
    tree = {"a": {}, "b": {"c": optax.MaskedNode(), "d": None, "e": 1}}
    assert flatten(tree) == {"b/e": 1}
    assert map_with_path(lambda path, leaf: path, tree) == {
        "a": {},
        "b": {"c": optax.MaskedNode(), "d": None, "e": "b/e"},
    }


class Pair(NamedTuple):
    first: object
    second: object


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: object
    bias: object


class Network(eqx.Module):
    layers: list
    activation: object


NETWORK = Network([eqx.nn.Linear(2, 3, key=jax.random.key(0))], jax.nn.relu)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ([1, (2, {"a": 3})], ["0", "1/0", "1/1/a"]),
        ({"b": [1], "a": 2}, ["b/0", "a"]),
        ({"res_net/~/conv_1": {"w": 1}, "res_net": {"w": 2}}, ["res_net/~/conv_1/w", "res_net/w"]),
        ({"a/b": 1, "a": {"b/c": 2}}, ["a/b", "a/b/c"]),
        ({0: 1, 10: {2: 3}}, ["0", "10/2"]),
        (Pair(1, [2]), ["first", "second/0"]),
        (Pair(None, {"value": 2}), ["second/value"]),
        ({"a": Layer(1, 2)}, ["a/kernel", "a/bias"]),
        (NETWORK, ["layers/0/weight", "layers/0/bias", "activation"]),
        (eqx.filter(NETWORK, eqx.is_array), ["layers/0/weight", "layers/0/bias"]),
        (
            nnx.state(nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]), nnx.Param),
            ["0/bias", "0/kernel"],
        ),
        (nnx.state(nnx.Dict(value=nnx.Param(jnp.ones(1)))), ["value"]),
        (FrozenDict({"a": {"value": 1}}), ["a/value"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else None,
)
def test_any_pytree_has_paths(tree, expected):
    flat = flatten(tree)
    assert list(flat) == expected
    named = map_with_path(lambda path, leaf: path, tree)
    assert jax.tree.structure(named) == jax.tree.structure(tree)
    assert sorted(jax.tree.leaves(named)) == sorted(expected)
    # Peer: JAX's own leaves, in its own order.
    by_jax = dict(zip(jax.tree.leaves(named), jax.tree.leaves(tree), strict=True))
    assert all(by_jax[path] is leaf for path, leaf in flat.items())


def test_merge_takes_the_second_trees_leaves_and_refuses_misfits():
    assert merge({"a": 1, "b": {"c": 2}, "d": {}}, {"b": {"c": 3}}) == {"a": 1, "b": {"c": 3}}
    haiku = {"net/~/a": {"w": 1}, "net/~/b": {"w": 2}}
    assert merge(haiku, {"net/~/b": {"w": 3}}) == {"net/~/a": {"w": 1}, "net/~/b": {"w": 3}}
    with pytest.raises(ValueError, match="'a' is a leaf, and 'a/b' runs through it"):
        merge({"a": 1}, {"a": {"b": 2}})
    with pytest.raises(ValueError, match="'a' is a leaf, and 'a/b' runs through it"):
        merge({"a": {"b": 2}}, {"a": 1})
    with pytest.raises(
        ValueError, match=r"different shapes cannot be merged: a: \(2,\) and \(3,\)"
    ):
        merge({"a": np.zeros(2)}, {"a": np.zeros(3)})


def test_shapes_without_arrays_are_leaves():
    leaf = jax.ShapeDtypeStruct((3, 4), "float32")
    assert flatten({"fc": {"kernel": leaf}}) == {"fc/kernel": leaf}


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        (3, TypeError, "a tree of leaves, such as a nested dict, is needed, got one int"),
        ({"a": {2.5: 0}}, TypeError, "key 2.5 in 'a' must be a string or an int"),
        ({"a": {True: 0}}, TypeError, "key True in 'a' must be a string or an int"),
        ({"a": {"": 0}}, ValueError, "key '' in 'a' is empty"),
        ({"": 0}, ValueError, "key '' is empty"),
        ({0.5: 1, "a": {None: 2}}, TypeError, "key 0.5 must be .*, key None in 'a' must be"),
        ({"a/b": 0, "a": {"b": 1}}, ValueError, "['a/b'] and ['a']['b'] have the path 'a/b'"),
        ({"a": {1: 0, "1": 1}}, ValueError, "['a'][1] and ['a']['1'] have the path 'a/1'"),
    ],
)
def test_trees_without_clear_paths_are_refused(tree, error, text):
    with pytest.raises(error, match=text.replace("[", r"\[").replace("]", r"\]")):
        flatten(tree)
    with pytest.raises(error):
        map_with_path(lambda path, leaf: leaf, tree)


@pytest.mark.parametrize(
    ("flat", "text"),
    [
        ({"a//b": 1}, "'a//b' has an empty component"),
        ({"": 1}, "'' has an empty component"),
        ({"a": 1, "a/b": 2}, "'a' is a leaf, and 'a/b' runs through it"),
        ({"a/b": 1, "a": 2, "/": 3}, "runs through it; '/' has an empty component"),
    ],
)
def test_flat_names_without_a_tree_are_refused(flat, text):
    with pytest.raises(ValueError, match=text):
        unflatten(flat)


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("layr2", RESNET.segments, "layer2"),
        ("HEAD", RESNET.segments, "head"),
        ("fc", ["conv1/kernel", "fc/kernel"], "fc/kernel"),
        ("conv9/kernel", ["layer1/0/conv1/kernel", "fc/bias"], "layer1/0/conv1/kernel"),
        ("layer5/0/bn1/scale", ["layer4/0/bn1/scale", "layer4/0/bn1/bias"], "layer4/0/bn1/scale"),
        ("decoder/kernl", ["decoder/bias", "decoder/kernel", "head/kernel"], "decoder/kernel"),
    ],
)
def test_nearest_name_comes_first(name, candidates, expected):
    assert nearest(name, candidates)[0] == expected
    assert repr(expected) in suggest(name, candidates)


def test_nothing_alike_suggests_nothing():
    assert nearest("xyz", RESNET.segments) == []
    assert suggest("xyz", RESNET.segments) == ""


def test_suggestions_are_at_most_n():
    assert nearest("layer", RESNET.segments, n=2) == ["layer1", "layer2"]
    assert suggest("layer", ["layer1", "layer2"]) == "; did you mean 'layer1' or 'layer2'?"


def test_listing_counts_what_it_leaves_out():
    assert listing(map(str, range(10)), most=3) == "0, 1, 2 and 7 more"
    assert listing([]) == ""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café, 猫, a b", "café, 猫, a b"),
        ("x[/b] [red] :cat: $a$ <b>", "x[/b] [red] :cat: $a$ <b>"),
        ("a\x1b]0;owned\x07", r"a\x1b]0;owned\x07"),
        ("a\nb\tc\rd", r"a\x0ab\x09c\x0dd"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202eexe.gnp", r"\u202eexe.gnp"),
        (b"caf\xe9".decode(errors="surrogateescape"), r"caf\xe9"),
        ("half of a pair \ud83d", r"half of a pair \ud83d"),
    ],
)
def test_what_would_act_on_a_terminal_is_shown_and_all_else_stays(text, shown):
    assert paths.visible(text) == shown
    assert paths.visible(shown) == shown


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "L"])))
def test_visible_text_can_be_written_on_one_line(text):
    assert len(paths.visible(text).encode().decode().splitlines()) <= 1


@given(st.text(max_size=300), st.integers(10, 200))
def test_shortened_text_fits_and_short_text_stays(text, most):
    assert len(paths.shortened(text, most)) <= most
    assert paths.shortened(text, max(len(text), 10)) == text
