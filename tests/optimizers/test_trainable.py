"""The trainable and the frozen part of a tree, and their merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_params import GROUPS, LABELS, NAMED, PARAMS, SHAPES, assert_same, run

from flaxtransfer.optimizers import FROZEN, frozen, merge, partition, trainable, trainable_mask
from flaxtransfer.paths import flatten


def test_trainable_and_frozen_are_two_halves_that_merge_to_the_whole():
    moving, still = trainable(PARAMS, NAMED, GROUPS), frozen(PARAMS, NAMED, GROUPS)
    assert set(flatten(moving)) == {p for p in SHAPES if p.startswith(("fc", "layer4"))}
    assert not set(flatten(moving)) & set(flatten(still))
    assert jax.tree.structure(merge(still, moving)) == jax.tree.structure(PARAMS)
    assert_same(merge(still, moving), PARAMS)
    assert_same(merge(moving, still), PARAMS)
    assert trainable(NAMED, NAMED, GROUPS)["fc"] == {"kernel": "head", "bias": "head"}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_pruned_tree_trains_as_the_whole_one_does(clip):
    whole, _ = run(partition(GROUPS, NAMED, clip=clip), PARAMS)
    pruned = partition(GROUPS, trainable(NAMED, NAMED, GROUPS), clip=clip)
    moving, _ = run(pruned, trainable(PARAMS, NAMED, GROUPS))
    assert_same(merge(frozen(PARAMS, NAMED, GROUPS), moving), whole)


def test_with_everything_frozen_nothing_moves():
    groups = dict.fromkeys(LABELS, FROZEN)
    assert trainable(PARAMS, NAMED, groups) == {}
    assert_same(run(partition(groups, NAMED, clip=1.0), PARAMS)[0], PARAMS)


def test_merge_prefers_the_second_tree_and_refuses_misfits():
    assert merge({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}}) == {"a": 1, "b": {"c": 3}}
    with pytest.raises(ValueError, match="'a' is a leaf, and 'a/b' runs through it"):
        merge({"a": 1}, {"a": {"b": 2}})
    with pytest.raises(
        ValueError, match=r"different shapes cannot be merged: a: \(2,\) and \(3,\)"
    ):
        merge({"a": np.zeros(2)}, {"a": np.zeros(3)})


def test_trainable_mask_is_true_where_the_group_is_not_frozen():
    assert flatten(trainable_mask(NAMED, GROUPS)) == {
        path: name != "frozen" for path, name in flatten(NAMED).items()
    }


def test_a_tree_of_other_leaves_is_refused():
    for function in (trainable, frozen):
        with pytest.raises(
            ValueError, match="2 leaves without label: x/y, z; 7 labels without leaf"
        ):
            function({"x": {"y": 1}, "z": 2}, NAMED, GROUPS)
    with pytest.raises(ValueError, match="not of this parameters: 1 leaves without label: new"):
        partition(GROUPS, NAMED).init(PARAMS | {"new": jnp.zeros(2)})
