"""The trainable and the frozen part of a tree, and their merge."""

import jax
import jax.numpy as jnp
import optax
import pytest

from flaxtransfer import groups, labels, optimizers, paths
from flaxtransfer.batchnorm import policy
from flaxtransfer.groups import FROZEN, trainable_mask
from flaxtransfer.labels import ParamGroups
from flaxtransfer.optimizers import partition
from flaxtransfer.paths import flatten, merge
from tests.support.small_params import GROUPS, LABELS, NAMED, PARAMS, SHAPES, assert_same, run

BOUND = ParamGroups(NAMED, GROUPS)


def test_trainable_and_frozen_are_two_halves_that_merge_to_the_whole():
    moving, still = BOUND.trainable(PARAMS), BOUND.frozen(PARAMS)
    assert set(flatten(moving)) == {p for p in SHAPES if p.startswith(("fc", "layer4"))}
    assert not set(flatten(moving)) & set(flatten(still))
    assert jax.tree.structure(merge(still, moving)) == jax.tree.structure(PARAMS)
    assert_same(merge(still, moving), PARAMS)
    assert_same(merge(moving, still), PARAMS)
    assert BOUND.trainable(NAMED)["fc"] == {"kernel": "head", "bias": "head"}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_pruned_tree_trains_as_the_whole_one_does(clip):
    whole, _ = run(partition(GROUPS, NAMED, clip=clip), PARAMS)
    moving, _ = run(BOUND.optimizer(clip), BOUND.trainable(PARAMS))
    assert_same(BOUND.merge(BOUND.frozen(PARAMS), moving), whole)


def test_with_everything_frozen_nothing_moves():
    groups = dict.fromkeys(LABELS, FROZEN)
    assert ParamGroups(NAMED, groups).trainable(PARAMS) == {}
    assert_same(run(partition(groups, NAMED, clip=1.0), PARAMS)[0], PARAMS)


def test_trainable_mask_is_true_where_the_group_is_not_frozen():
    assert flatten(trainable_mask(NAMED, GROUPS)) == {
        path: name != "frozen" for path, name in flatten(NAMED).items()
    }


def test_a_tree_of_other_leaves_is_refused():
    for function in (BOUND.trainable, BOUND.frozen):
        with pytest.raises(
            ValueError, match="2 leaves without label: x/y, z; 7 labels without leaf"
        ):
            function({"x": {"y": 1}, "z": 2})
    with pytest.raises(ValueError, match="not of this parameters: 1 leaves without label: new"):
        partition(GROUPS, NAMED).init(PARAMS | {"new": jnp.zeros(2)})


def test_labels_and_groups_are_checked_when_they_are_bound():
    with pytest.raises(ValueError, match="label 'head' has no group; did you mean 'haed'"):
        ParamGroups(NAMED, {"haed" if n == "head" else n: group for n, group in GROUPS.items()})
    with pytest.raises(TypeError, match=r"got 'head': 0\.1"):
        ParamGroups(NAMED, GROUPS | {"head": 0.1})


def test_bound_labels_and_groups_are_a_value():
    assert ParamGroups.of(PARAMS, LABELS, GROUPS) == BOUND
    assert ParamGroups(NAMED, GROUPS | {"late": FROZEN}) != BOUND
    assert BOUND.named == flatten(NAMED)
    assert BOUND.trainable_paths == tuple(flatten(BOUND.trainable(PARAMS)))
    assert BOUND.mask == trainable_mask(NAMED, GROUPS)
    assert BOUND.batch_norm() == policy(PARAMS, BOUND.mask) == {"layer4/0/bn1"}
    with pytest.raises(ValueError, match="must be above 0"):
        BOUND.optimizer(clip=0.0)


def test_no_method_walks_the_paths_of_a_tree_that_fits(monkeypatch):
    """Peer: the count of calls. Everything that depends on the labels alone is kept."""
    calls = []
    for module in (paths, groups, optimizers, labels):
        monkeypatch.setattr(module, "flatten", lambda tree: calls.append(1) or flatten(tree))
    bound = ParamGroups(NAMED, GROUPS)
    assert len(calls) == 1
    moving, still = bound.trainable(PARAMS), bound.frozen(PARAMS)
    bound.merge(still, moving)
    bound.optimizer(clip=1.0)
    bound.batch_norm()
    assert bound.mask
    assert bound.trainable_paths
    assert len(calls) == 1


def test_a_part_leaves_out_what_has_no_leaves():
    bound = ParamGroups({"a": {"b": "new"}, "c": "old"}, {"new": optax.sgd(0.1), "old": FROZEN})
    tree = {"a": {"b": 1, "none": None}, "empty": {}, "c": 2}
    assert bound.trainable(tree) == {"a": {"b": 1}}
    assert bound.frozen(tree) == {"c": 2}
    assert bound.merge(tree, {"a": {"b": 3}}) == {"a": {"b": 3}, "c": 2}


def test_a_tree_that_is_nested_in_another_way_is_refused():
    bound = ParamGroups({"a": {"b": "new"}}, {"new": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="nested in another way"):
        bound.trainable({"a/b": 1})
