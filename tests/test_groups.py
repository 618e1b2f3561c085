"""Groups are values, and those that cannot be meant are refused."""

import copy
import functools
import pickle

import optax
import pytest

from flaxtransfer.groups import FROZEN, Group, trainable_mask
from flaxtransfer.masks import matrices
from flaxtransfer.optimizers import partition
from tests.support.small_params import GROUPS, NAMED


@pytest.mark.parametrize("use", [partition, lambda g, named: trainable_mask(named, g)])
def test_labels_and_groups_that_do_not_fit_are_told_all_at_once(use):
    groups = {"haed": GROUPS["head"], "late": GROUPS["late"], "extra": optax.sgd(0.1)}
    with pytest.raises(ValueError, match="has no group") as caught:
        use(groups, NAMED)
    text = str(caught.value)
    assert "label 'head' has no group; did you mean 'haed'? (leaves fc/kernel, fc/bias)" in text
    assert "label 'frozen' has no group (leaves conv1/kernel, bn1/scale, bn1/bias)" in text
    assert "group 'haed' has no leaves; did you mean 'head'?" in text
    assert "group 'extra' has no leaves" in text


def test_an_unused_frozen_group_is_no_mistake():
    partition(GROUPS | {"never": FROZEN}, NAMED)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: partition({**GROUPS, "head": 1e-3}, NAMED), TypeError, "got 'head': 0.001"),
        (lambda: partition({**GROUPS, "head": optax.adam}, NAMED), TypeError, "'head': <function"),
        (lambda: partition(GROUPS, {"fc": 3}), TypeError, "got 'fc': 3"),
        (lambda: partition([], NAMED), TypeError, "groups must be a dict by label"),
        (
            lambda: partition(GROUPS, NAMED, clip=0.0),
            ValueError,
            "clip must be above 0 .*0.0",
        ),
        (lambda: partition(GROUPS, NAMED, clip=float("nan")), ValueError, "above 0 .*, got nan"),
        (lambda: Group(optax.adamw(1e-3), 1e-3), TypeError, "the function, such as optax.adamw"),
        (lambda: Group(optax.clip, 1e-3), ValueError, "clip takes no learning_rate; it takes"),
        (
            lambda: Group(optax.sgd, -1.0),
            ValueError,
            "learning_rate must be finite and >= 0, got -1.0",
        ),
        (lambda: Group(optax.sgd, float("inf")), ValueError, "got inf"),
        (lambda: Group(optax.sgd, "fast"), TypeError, "learning_rate must be a number, got 'fast'"),
        (lambda: Group(optax.sgd, 0.1, -0.1), ValueError, "weight_decay must be finite"),
        (lambda: Group(optax.sgd, 0.1, 0.1, "haed()"), ValueError, "did you mean 'head'"),
        (lambda: Group(optax.sgd, 0.1, 0.1, True), TypeError, "must be a Mask or its expression"),
        (
            lambda: Group(functools.partial(optax.adamw, weight_decay=0.1), 0.1),
            ValueError,
            r"to Group, not to partial: adamw already has \['weight_decay'\]",
        ),
        (lambda: Group(functools.partial(optax.sgd, 0.1), 0.1), ValueError, r"has \(0.1,\)"),
        (
            lambda: Group(functools.partial(optax.sgd, learning_rate=1), 1),
            ValueError,
            "already has",
        ),
    ],
)
def test_groups_that_cannot_be_meant_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_groups_are_values():
    assert Group(optax.adamw, 1e-3) == Group(optax.adamw, 1e-3, 0.0, matrices())
    assert hash(Group(optax.adamw, 1e-3)) == hash(Group(optax.adamw, 1e-3))
    assert repr(FROZEN) == "FROZEN"
    for same in (copy.copy(FROZEN), copy.deepcopy(FROZEN), pickle.loads(pickle.dumps(FROZEN))):
        assert same is FROZEN
