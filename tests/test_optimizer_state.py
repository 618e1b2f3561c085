"""Optimizer state across a change of labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import ParamGroups, label, rest
from flaxtransfer.masks import head, stage
from flaxtransfer.optimizers import migrate, partition
from flaxtransfer.paths import merge
from tests.support.small_params import LABELS, PARAMS, assert_same, bits, only, run


def adam(rate=1e-2):
    return Group(optax.adamw, rate)


def phase(rules, groups, params=PARAMS, pruned=True):
    """The transformation of a phase, and its trainable parameters."""
    labels = label(params, rules)
    if not pruned:
        return partition(groups, labels), params
    bound = ParamGroups(labels, groups)
    return bound.optimizer(), bound.trainable(params)


HEAD = ({"head": head(), "frozen": rest()}, {"head": adam(), "frozen": FROZEN})
HEAD_AND_LATE = (LABELS, {"head": adam(), "late": adam(), "frozen": FROZEN})
ALL_IN_ONE = ({"all": head() | stage(4), "frozen": rest()}, {"all": adam(), "frozen": FROZEN})


@pytest.mark.parametrize("pruned_before", [True, False])
@pytest.mark.parametrize("pruned_after", [True, False])
def test_unfreezing_leaves_the_head_as_if_nothing_had_happened(pruned_before, pruned_after):
    before, params = phase(*HEAD, pruned=pruned_before)
    params, state = run(before, params, [1, 2, 3])
    after, grown = phase(*HEAD_AND_LATE, params=merge(PARAMS, params), pruned=pruned_after)
    grown, _ = run(after, grown, [4, 5], migrate(state, after.init(grown)))
    # The peer: one Adam on the head alone, never disturbed; one on the stage, begun now.
    undisturbed, _ = run(optax.adam(1e-2), only(PARAMS, "fc"), [1, 2, 3, 4, 5])
    assert_same(only(grown, "fc"), undisturbed)
    assert_same(only(grown, "layer4"), run(optax.adam(1e-2), only(PARAMS, "layer4"), [4, 5])[0])
    # The mistake that this prevents: with a fresh state the head's next steps are others.
    forgetful, _ = run(optax.adam(1e-2), only(params, "fc"), [4, 5])
    assert bits(forgetful)["fc/kernel"] != bits(undisturbed)["fc/kernel"]


def test_two_labels_that_become_one_keep_moments_and_count():
    before, params = phase(*HEAD_AND_LATE)
    params, state = run(before, params, [1, 2])
    after, same = phase(*ALL_IN_ONE, params=merge(PARAMS, params))
    same, _ = run(after, same, [3], migrate(state, after.init(same)))
    assert_same(same, run(before, params, [3], state)[0])


def test_one_label_that_becomes_two_keeps_them_in_both():
    before, params = phase(*ALL_IN_ONE)
    params, state = run(before, params, [1, 2])
    after, same = phase(*HEAD_AND_LATE, params=merge(PARAMS, params))
    carried = migrate(state, after.init(same))
    same, _ = run(after, same, [3], carried)
    assert_same(same, run(before, params, [3], state)[0])
    # No buffer twice: a donated state may not hold one.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carried)]
    assert len(set(pointers)) == len(pointers)


def test_refreezing_keeps_what_still_moves():
    before, params = phase(*HEAD_AND_LATE)
    params, state = run(before, params, [1, 2])
    after, fewer = phase(*HEAD, params=merge(PARAMS, params))
    fewer, _ = run(after, fewer, [3], migrate(state, after.init(fewer)))
    assert_same(fewer, only(run(before, params, [3], state)[0], "fc"))


def test_momentum_is_carried_bit_for_bit():
    sgd = Group(functools.partial(optax.sgd, momentum=0.9, nesterov=True), 0.1, weight_decay=1e-3)
    before, params = phase(HEAD[0], HEAD[1] | {"head": sgd})
    params, state = run(before, params, [1, 2])
    after, grown = phase(ALL_IN_ONE[0], ALL_IN_ONE[1] | {"all": sgd}, merge(PARAMS, params))
    grown, _ = run(after, grown, [3], migrate(state, after.init(grown)))
    assert_same(only(grown, "fc"), run(before, params, [3], state)[0])
    assert_same(only(grown, "layer4"), run(sgd.transformation(), only(PARAMS, "layer4"), [3])[0])


def test_moments_survive_another_chain_around_them():
    # Clip, decay and schedule change the shape of the state, not the moments in it.
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2])
    group = Group(optax.adam, optax.constant_schedule(1e-2), weight_decay=0.1)
    tx = partition({"new": group}, {"fc": {"kernel": "new", "bias": "new"}}, clip=1.0)
    carried = migrate(state, tx.init(params))
    old, new = moments(state), moments(carried)
    assert_same(new.mu, only(old.mu, "fc"))
    assert_same(new.nu, only(old.nu, "fc"))
    assert int(new.count) == 2


def moments(state):
    """The one Adam state in a tree."""
    nodes = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState))
    (found,) = [node for node in nodes if isinstance(node, optax.ScaleByAdamState)]
    return found


def counts(state):
    kind = optax.ScaleByScheduleState
    nodes = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, kind))
    return [int(node.count) for node in nodes if isinstance(node, kind)]


def test_schedules_begin_anew():
    group = Group(optax.adamw, optax.linear_schedule(1.0, 0.0, 10))
    tx = partition({"new": group}, {"fc": {"kernel": "new", "bias": "new"}})
    params, state = run(tx, only(PARAMS, "fc"), [1, 2, 3])
    assert counts(state) == [3]
    carried = migrate(state, tx.init(params))
    assert counts(carried) == [0]
    assert int(moments(carried).count) == 3


def test_injected_hyperparameters_are_those_of_the_new_phase():
    def make(rate):
        return optax.inject_hyperparams(optax.adam)(optax.linear_schedule(rate, 0.0, 10), b1=rate)

    params, state = run(make(0.5), only(PARAMS, "fc"), [1, 2, 3])
    carried = migrate(state, make(0.25).init(params))
    assert float(carried.hyperparams["learning_rate"]) == 0.25
    assert float(carried.hyperparams["b1"]) == 0.25
    assert int(carried.count) == 0
    assert [int(s.count) for s in carried.hyperparams_states.values()] == [0]
    assert_same(moments(carried).mu, moments(state).mu)


@pytest.mark.parametrize(
    "make",
    [
        optax.amsgrad,
        optax.adan,
        optax.lion,
        optax.adabelief,
        functools.partial(optax.rmsprop, momentum=0.9, bias_correction=True),
        optax.adafactor,
        optax.adagrad,
        optax.contrib.muon,
        lambda rate: optax.chain(optax.trace(0.5), optax.trace(0.9), optax.scale(-rate)),
        lambda rate: optax.named_chain(("a", optax.scale_by_adam()), ("b", optax.scale(-rate))),
        lambda rate: optax.MultiSteps(optax.adam(rate), 2).gradient_transformation(),
        lambda rate: optax.apply_if_finite(optax.adam(rate), 3),
    ],
)
def test_the_same_leaves_go_on_undisturbed_under_any_optimizer(make):
    tx = make(1e-2)
    params, state = run(tx, only(PARAMS, "fc"), [1, 2, 3])
    renamed = partition({"other": make(1e-2)}, {"fc": {"kernel": "other", "bias": "other"}})
    carried = migrate(state, renamed.init(params))
    assert_same(run(renamed, params, [4, 5], carried)[0], run(tx, params, [4, 5], state)[0])
    assert jax.tree.structure(carried) == jax.tree.structure(renamed.init(params))


def test_another_kind_of_optimizer_begins_afresh():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2])
    for other in (optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.sgd(0.1)):
        tx = partition({"h": other}, {"fc": {"kernel": "h", "bias": "h"}})
        carried = migrate(state, tx.init(params))
        assert_same(run(tx, params, [3], carried)[0], run(tx, params, [3])[0])


def test_new_leaves_under_an_old_count_are_warned_about():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2])
    after, grown = phase(*ALL_IN_ONE, params=merge(PARAMS, params))
    with pytest.warns(UserWarning, match="give them a label of their own") as caught:
        carried = migrate(state, after.init(grown))
    text = str(caught[0].message)
    assert "new leaves (layer4/0/bn1/scale, layer4/0/conv1/kernel) share a group" in text
    assert "that are 2 steps old" in text
    assert int(moments(carried).count) == 2
    assert caught[0].filename == __file__


def test_leaves_of_different_age_take_the_larger_count_with_a_warning():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2, 3])
    middle, grown = phase(*HEAD_AND_LATE, params=merge(PARAMS, params))
    grown, state = run(middle, grown, [4], migrate(state, middle.init(grown)))
    after, grown = phase(*ALL_IN_ONE, params=merge(PARAMS, grown))
    with pytest.warns(UserWarning, match=r"leaves \(layer4/0/bn1/scale, .* that are 4 steps old"):
        carried = migrate(state, after.init(grown))
    assert int(moments(carried).count) == 4


def test_lion_has_no_bias_correction_to_warn_about():
    lion = Group(optax.lion, 1e-3)
    before, params = phase(HEAD[0], HEAD[1] | {"head": lion})
    params, state = run(before, params, [1, 2])
    after, grown = phase(ALL_IN_ONE[0], ALL_IN_ONE[1] | {"all": lion}, merge(PARAMS, params))
    migrate(state, after.init(grown))  # Warnings are errors here.


def test_moments_of_another_shape_are_refused_all_at_once():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1])
    other = {"fc": {"kernel": jnp.zeros((4, 7)), "bias": jnp.zeros(7)}}
    with pytest.raises(ValueError, match="another shape") as caught:
        migrate(state, optax.adam(1e-3).init(other))
    text = str(caught.value)
    assert "fc/kernel has mu of shape (4, 7), carried is (4, 4)" in text
    assert "fc/bias has nu of shape (7,), carried is (4,)" in text


def test_carried_moments_take_the_type_of_the_new_phase():
    _, state = run(optax.adam(1e-2), only(PARAMS, "fc"), [1])
    fresh = optax.adam(1e-2, mu_dtype=jnp.bfloat16).init(only(PARAMS, "fc"))
    carried = moments(migrate(state, fresh))
    assert carried.mu["fc"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        carried.mu["fc"]["bias"], moments(state).mu["fc"]["bias"].astype(jnp.bfloat16)
    )


def test_carry_is_pure_and_can_be_traced():
    before, params = phase(*HEAD_AND_LATE)
    params, state = run(before, params, [1, 2])
    untouched = jax.tree.map(np.array, state)
    after, same = phase(*ALL_IN_ONE, params=merge(PARAMS, params))
    eager = migrate(state, after.init(same))
    traced = jax.jit(migrate)(state, after.init(same))
    jax.tree.map(np.testing.assert_array_equal, eager, traced)
    jax.tree.map(np.testing.assert_array_equal, state, untouched)
