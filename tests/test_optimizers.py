"""Groups, partition, layer-wise decay, and optimizer state across a change of labels."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxtransfer.labels import label, rest
from flaxtransfer.masks import batch_norm, everything, glob, head, kernels, matrices, stage
from flaxtransfer.optimizers import (
    FROZEN,
    Group,
    Scaled,
    carry,
    frozen,
    layerwise_decay,
    merge,
    partition,
    trainable,
    trainable_mask,
)
from flaxtransfer.paths import flatten, unflatten

SHAPES = {
    "conv1/kernel": (4, 4),
    "bn1/scale": (4,),
    "bn1/bias": (4,),
    "layer4/0/conv1/kernel": (4, 4),
    "layer4/0/bn1/scale": (4,),
    "fc/kernel": (4, 4),
    "fc/bias": (4,),
}
LABELS = {"head": head(), "late": stage(4), "frozen": rest()}


def draw(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return unflatten(
        {p: jnp.asarray(scale * random.normal(size=s), jnp.float32) for p, s in SHAPES.items()}
    )


PARAMS = draw(0)
NAMED = label(PARAMS, LABELS)


def run(tx, params, seeds=(1, 2, 3), state=None, compiled=False):
    """Parameters and state after a step on random gradients of each seed."""

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    state = tx.init(params) if state is None else state
    for seed in seeds:
        gradients = unflatten({p: flatten(draw(seed))[p] for p in flatten(params)})
        params, state = step(gradients, state, params)
    return params, state


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


def assert_same(tree, expected):
    assert bits(tree) == bits(expected)


def only(tree, prefix):
    return unflatten({p: leaf for p, leaf in flatten(tree).items() if p.startswith(prefix)})


# Freezing


@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_frozen_leaves_stay_bit_identical_under_decay_and_clip(clip, compiled):
    delicate = jnp.tile(jnp.array([-0.0, jnp.inf, jnp.nan, 1.5]), (4, 1))
    params = merge(PARAMS, {"conv1": {"kernel": delicate}})
    decaying = Group(optax.adamw, 1e-2, weight_decay=0.1, decay_mask=everything())
    tx = partition(
        {"head": decaying, "late": optax.adamw(1e-2), "frozen": FROZEN}, NAMED, clip=clip
    )
    after, _ = run(tx, params, compiled=compiled)
    for path, same in {p: b == bits(params)[p] for p, b in bits(after).items()}.items():
        assert same == (flatten(NAMED)[path] == "frozen"), path


def test_the_update_of_a_frozen_leaf_is_zero_with_the_sign_that_changes_nothing():
    tx = partition({"head": FROZEN, "late": optax.sgd(1.0), "frozen": FROZEN}, NAMED)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    kernel = np.asarray(updates["conv1"]["kernel"])
    assert (kernel == 0).all()
    assert np.signbit(kernel).all()


def test_frozen_leaves_of_integers_are_permitted():
    params = {"fc": jnp.ones(2), "steps": jnp.arange(3)}
    tx = partition({"a": optax.sgd(1.0), "b": FROZEN}, {"fc": "a", "steps": "b"})
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)["steps"]
    assert after.dtype == params["steps"].dtype
    np.testing.assert_array_equal(after, params["steps"])


def test_frozen_leaves_have_no_state():
    tx = partition({"head": optax.adam(1e-3), "late": FROZEN, "frozen": FROZEN}, NAMED)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(tx.init(PARAMS)))
    assert sizes == 1 + 2 * (4 * 4 + 4)  # Adam's count, and two moments of the head.


def test_each_group_is_its_own_optimizer():
    groups = {"head": optax.adam(1e-2), "late": optax.sgd(0.5, momentum=0.9), "frozen": FROZEN}
    after, _ = run(partition(groups, NAMED), PARAMS)
    for name, prefix in (("head", "fc"), ("late", "layer4")):
        alone, _ = run(groups[name], only(PARAMS, prefix))
        assert_same(only(after, prefix), alone)


# Decay


def test_adamw_does_not_decay_by_its_own_default():
    # optax.adamw alone decays by 1e-4; a Group without decay is Adam.
    group = Group(optax.adamw, learning_rate=1e-2)
    after, _ = run(partition({"all": group}, label(PARAMS, {"all": everything()})), PARAMS)
    assert_same(after, run(optax.adam(1e-2), PARAMS)[0])
    default, _ = run(optax.adamw(1e-2), PARAMS)
    assert bits(default)["fc/kernel"] != bits(after)["fc/kernel"]


@pytest.mark.parametrize(
    "optimizer",
    [optax.adamw, optax.lion, optax.lamb, optax.adan],
    ids=lambda optimizer: optimizer.__name__,
)
def test_optimizers_that_decay_do_it_themselves_on_matrices_alone(optimizer):
    group = Group(optimizer, learning_rate=1e-2, weight_decay=0.3)
    after, _ = run(group.transformation(), PARAMS)
    is_matrix = jax.tree.map(lambda leaf: leaf.ndim > 1, PARAMS)
    expected, _ = run(optimizer(1e-2, weight_decay=0.3, mask=is_matrix), PARAMS)
    assert_same(after, expected)


def test_sgd_with_decay_is_an_l2_penalty_with_momentum_as_in_torch():
    # torch's SGD, by hand: d = g + wd * p; b = 0.9 * b + d; p = p - lr * b.
    group = Group(
        functools.partial(optax.sgd, momentum=0.9), 0.1, weight_decay=0.01, decay_mask=kernels()
    )
    params, state = {"fc": only(PARAMS, "fc")["fc"]}, None
    tx = group.transformation()
    p = {k: np.asarray(v, np.float64) for k, v in params["fc"].items()}
    b = dict.fromkeys(p, 0.0)
    for seed in (1, 2, 3):
        params, state = run(tx, params, [seed], state)
        g = {k: np.asarray(v, np.float64) for k, v in draw(seed)["fc"].items()}
        for k in p:
            b[k] = 0.9 * b[k] + g[k] + (0.01 * p[k] if k == "kernel" else 0.0)
            p[k] = p[k] - 0.1 * b[k]
    for k in p:
        np.testing.assert_allclose(params["fc"][k], p[k], rtol=1e-5, atol=1e-6)


def test_decay_goes_where_the_mask_says_inside_a_partition():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    groups = {
        "head": Group(optax.sgd, 1.0, 0.5, "biases()"),
        "late": Group(optax.sgd, 1.0, 0.25),
        "frozen": FROZEN,
    }
    tx = partition(groups, NAMED)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    factors = {"fc/bias": -0.5, "layer4/0/conv1/kernel": -0.25}
    for path, update in flatten(updates).items():
        np.testing.assert_array_equal(update, factors.get(path, 0) * flatten(PARAMS)[path])


def test_an_optimizer_that_cannot_mask_its_decay_gets_it_as_a_penalty():
    group = Group(optax.novograd, 0.1, weight_decay=0.2)
    after, _ = run(group.transformation(), PARAMS)
    masked = optax.add_decayed_weights(0.2, mask=matrices())
    assert_same(after, run(optax.chain(masked, optax.novograd(0.1)), PARAMS)[0])


def test_a_group_without_a_leaf_that_decays_is_no_mistake():
    labels = label(PARAMS, {"norms": batch_norm(), "frozen": rest()})
    groups = {"norms": Group(optax.adamw, 1e-2, weight_decay=0.1), "frozen": FROZEN}
    after, _ = run(partition(groups, labels), PARAMS)
    assert_same(only(after, "bn1"), run(optax.adam(1e-2), only(PARAMS, "bn1"))[0])


# Clip


def test_clip_is_the_global_norm_over_the_trainable_leaves_of_all_groups():
    groups = {"head": optax.sgd(1.0), "late": optax.sgd(1.0), "frozen": FROZEN}
    tx = partition(groups, NAMED, clip=0.5)
    gradients = draw(1)
    updates, _ = tx.update(gradients, tx.init(PARAMS), PARAMS)
    # Peer: optax's clip on the trainable leaves alone.
    moving = trainable(gradients, NAMED, groups)
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    expected, _ = plain.update(moving, plain.init(moving), moving)
    assert_same(trainable(updates, NAMED, groups), expected)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-6)
    # The near misses: a clip in each of the two groups, and one that counts frozen gradients.
    each = partition({**groups, **dict.fromkeys(("head", "late"), plain)}, NAMED)
    two, _ = each.update(gradients, each.init(PARAMS), PARAMS)
    np.testing.assert_allclose(optax.tree.norm(two), 0.5 * 2**0.5, rtol=1e-6)
    over_all = optax.chain(optax.clip_by_global_norm(0.5), partition(groups, NAMED))
    less, _ = over_all.update(gradients, over_all.init(PARAMS), PARAMS)
    assert optax.tree.norm(less) < 0.49


def test_a_small_gradient_is_not_clipped_however_large_the_frozen_one():
    groups = {"head": optax.sgd(1.0), "late": optax.sgd(1.0), "frozen": FROZEN}
    tx = partition(groups, NAMED, clip=1.0)
    gradients = merge(draw(1, scale=1e-3), {"conv1": {"kernel": jnp.full((4, 4), jnp.nan)}})
    updates, _ = tx.update(gradients, tx.init(PARAMS), PARAMS)
    assert_same(updates["fc"], jax.tree.map(jnp.negative, gradients["fc"]))


def test_the_clip_comes_before_the_decay():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = partition({"all": Group(optax.sgd, 1.0, 2.0, everything())},
                   label(PARAMS, {"all": everything()}), clip=1e-6)  # fmt: skip
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    assert_same(updates, jax.tree.map(lambda p: -2 * p, PARAMS))


# Learning rates


def test_a_schedule_belongs_to_its_group():
    groups = {
        "head": Group(optax.sgd, optax.piecewise_constant_schedule(1.0, {2: 0.5})),
        "late": Group(optax.sgd, 0.25),
        "frozen": FROZEN,
    }
    tx = partition(groups, NAMED)
    state, ones = tx.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    rates = []
    for _ in range(4):
        updates, state = tx.update(ones, state, PARAMS)
        rates.append([-float(u.ravel()[0]) for u in (updates["fc"]["bias"],
                      updates["layer4"]["0"]["bn1"]["scale"], updates["bn1"]["bias"])])  # fmt: skip
    assert rates == [[1, 0.25, 0], [1, 0.25, 0], [0.5, 0.25, 0], [0.5, 0.25, 0]]


# The trainable part of a tree


GROUPS = {
    "head": Group(optax.adamw, 1e-2, weight_decay=0.1),
    "late": Group(functools.partial(optax.sgd, momentum=0.9), 0.1, weight_decay=0.1),
    "frozen": FROZEN,
}


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


# What is refused


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
        (lambda: partition({**GROUPS, "head": 1e-3}, NAMED), TypeError, "not 'head': 0.001"),
        (lambda: partition({**GROUPS, "head": optax.adam}, NAMED), TypeError, "'head': <function"),
        (lambda: partition(GROUPS, {"fc": 3}), TypeError, "not 'fc': 3"),
        (lambda: partition([], NAMED), TypeError, "groups are a dict by label"),
        (lambda: partition(GROUPS, NAMED, clip=0.0), ValueError, "above 0; not 0.0"),
        (lambda: partition(GROUPS, NAMED, clip=float("nan")), ValueError, "above 0; not nan"),
        (lambda: Group(optax.adamw(1e-3), 1e-3), TypeError, "the function, such as optax.adamw"),
        (lambda: Group(optax.clip, 1e-3), ValueError, "clip takes no learning_rate; it takes"),
        (
            lambda: Group(optax.sgd, -1.0),
            ValueError,
            "learning_rate is a finite number .* not -1.0",
        ),
        (lambda: Group(optax.sgd, float("inf")), ValueError, "not inf"),
        (lambda: Group(optax.sgd, "fast"), TypeError, "learning_rate is a number, not 'fast'"),
        (lambda: Group(optax.sgd, 0.1, -0.1), ValueError, "weight_decay is a finite number"),
        (lambda: Group(optax.sgd, 0.1, 0.1, "haed()"), ValueError, "did you mean 'head'"),
        (lambda: Group(optax.sgd, 0.1, 0.1, True), TypeError, "a mask or its expression"),
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


# Layer-wise decay


NETWORK = unflatten(
    dict.fromkeys(
        (
            "adapter/kernel",
            "conv1/kernel",
            "bn1/scale",
            "layer1/0/conv1/kernel",
            "layer1/1/conv1/kernel",
            "layer2/0/conv1/kernel",
            "layer3/0/conv1/kernel",
            "layer4/0/conv1/kernel",
            "layer4/10/conv1/kernel",
            "layer4/9/bn2/bias",
            "fc/kernel",
        ),
        jnp.zeros(1),
    )
)


def test_layerwise_decay_by_segment_counts_from_the_head():
    labels, groups = layerwise_decay(NETWORK, Group(optax.sgd, 8.0, 0.1), decay=0.5)
    rates = {name: group.learning_rate for name, group in groups.items()}
    assert rates == {"adapter": 0.125, "stem": 0.25, "layer1": 0.5, "layer2": 1.0, "layer3": 2.0,
                     "layer4": 4.0, "head": 8.0}  # fmt: skip
    assert list(groups) == ["adapter", "stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert {group.weight_decay for group in groups.values()} == {0.1}
    assert flatten(labels)["layer4/9/bn2/bias"] == "layer4"
    assert flatten(labels)["bn1/scale"] == "stem"


def test_layerwise_decay_by_block_orders_blocks_by_number():
    labels, groups = layerwise_decay(NETWORK, Group(optax.sgd, 1.0), decay=0.5, by="block")
    assert list(groups) == [
        *("adapter", "stem", "layer1/0", "layer1/1", "layer2/0", "layer3/0"),
        *("layer4/0", "layer4/9", "layer4/10", "head"),
    ]
    assert [g.learning_rate for g in groups.values()] == [0.5**d for d in range(9, -1, -1)]
    assert flatten(labels)["layer4/10/conv1/kernel"] == "layer4/10"


def test_layerwise_decay_without_adapter_or_head_keeps_the_distances():
    backbone = {k: v for k, v in NETWORK.items() if k not in ("adapter", "fc")}
    _, groups = layerwise_decay(backbone, Group(optax.sgd, 1.0), decay=0.5)
    assert {name: g.learning_rate for name, g in groups.items()} == {
        "stem": 1 / 32, "layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1 / 2
    }  # fmt: skip


def test_layerwise_decay_moves_each_leaf_by_its_own_rate():
    labels, groups = layerwise_decay(NETWORK, Group(optax.sgd, 1.0), decay=0.5)
    tx = partition(groups, labels)
    ones = jax.tree.map(jnp.ones_like, NETWORK)
    updates, _ = tx.update(ones, tx.init(NETWORK), NETWORK)
    steps = {path: -float(update[0]) for path, update in flatten(updates).items()}
    assert steps["fc/kernel"] == 1
    assert steps["layer4/0/conv1/kernel"] == steps["layer4/9/bn2/bias"] == 0.5
    assert steps["adapter/kernel"] == 0.5**6


def test_layerwise_decay_scales_schedules_as_a_whole():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    _, groups = layerwise_decay(NETWORK, Group(optax.sgd, schedule), decay=0.5)
    for step in (0, 5, 10):
        assert groups["layer3"].learning_rate(step) == 0.25 * schedule(step)
    assert groups["layer3"].learning_rate == Scaled(schedule, 0.25)
    assert groups["head"].learning_rate(0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"decay": 0.0}, ValueError, r"a factor in \(0, 1\], not 0.0"),
        ({"decay": 1.5}, ValueError, "not 1.5"),
        ({"by": "layer"}, ValueError, "'segment' or 'block', not 'layer'"),
        ({"group": optax.sgd(0.1)}, TypeError, "the learning rate of a Group"),
        ({"params": {"decoder": {"kernel": 0}, "fc2": 0}}, ValueError, "decoder/kernel, fc2"),
    ],
)
def test_layerwise_decay_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        layerwise_decay(**({"params": NETWORK, "group": Group(optax.sgd, 0.1)} | arguments))


# Carrying optimizer state


def adam(rate=1e-2):
    return Group(optax.adamw, rate)


def phase(rules, groups, params=PARAMS, pruned=True):
    """The transformation of a phase, and its trainable parameters."""
    labels = label(params, rules)
    if not pruned:
        return partition(groups, labels), params
    return partition(groups, trainable(labels, labels, groups)), trainable(params, labels, groups)


HEAD = ({"head": head(), "frozen": rest()}, {"head": adam(), "frozen": FROZEN})
HEAD_AND_LATE = (LABELS, {"head": adam(), "late": adam(), "frozen": FROZEN})
ALL_IN_ONE = ({"all": head() | stage(4), "frozen": rest()}, {"all": adam(), "frozen": FROZEN})


@pytest.mark.parametrize("pruned_before", [True, False])
@pytest.mark.parametrize("pruned_after", [True, False])
def test_unfreezing_leaves_the_head_as_if_nothing_had_happened(pruned_before, pruned_after):
    before, params = phase(*HEAD, pruned=pruned_before)
    params, state = run(before, params, [1, 2, 3])
    after, grown = phase(*HEAD_AND_LATE, params=merge(PARAMS, params), pruned=pruned_after)
    grown, _ = run(after, grown, [4, 5], carry(state, after.init(grown)))
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
    same, _ = run(after, same, [3], carry(state, after.init(same)))
    assert_same(same, run(before, params, [3], state)[0])


def test_one_label_that_becomes_two_keeps_them_in_both():
    before, params = phase(*ALL_IN_ONE)
    params, state = run(before, params, [1, 2])
    after, same = phase(*HEAD_AND_LATE, params=merge(PARAMS, params))
    carried = carry(state, after.init(same))
    same, _ = run(after, same, [3], carried)
    assert_same(same, run(before, params, [3], state)[0])
    # No buffer twice: a donated state may not hold one.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(carried)]
    assert len(set(pointers)) == len(pointers)


def test_refreezing_keeps_what_still_moves():
    before, params = phase(*HEAD_AND_LATE)
    params, state = run(before, params, [1, 2])
    after, fewer = phase(*HEAD, params=merge(PARAMS, params))
    fewer, _ = run(after, fewer, [3], carry(state, after.init(fewer)))
    assert_same(fewer, only(run(before, params, [3], state)[0], "fc"))


def test_momentum_is_carried_bit_for_bit():
    sgd = Group(functools.partial(optax.sgd, momentum=0.9, nesterov=True), 0.1, weight_decay=1e-3)
    before, params = phase(HEAD[0], HEAD[1] | {"head": sgd})
    params, state = run(before, params, [1, 2])
    after, grown = phase(ALL_IN_ONE[0], ALL_IN_ONE[1] | {"all": sgd}, merge(PARAMS, params))
    grown, _ = run(after, grown, [3], carry(state, after.init(grown)))
    assert_same(only(grown, "fc"), run(before, params, [3], state)[0])
    assert_same(only(grown, "layer4"), run(sgd.transformation(), only(PARAMS, "layer4"), [3])[0])


def test_moments_survive_another_chain_around_them():
    # Clip, decay and schedule change the shape of the state, not the moments in it.
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2])
    group = Group(optax.adam, optax.constant_schedule(1e-2), weight_decay=0.1)
    tx = partition({"new": group}, {"fc": {"kernel": "new", "bias": "new"}}, clip=1.0)
    carried = carry(state, tx.init(params))
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
    carried = carry(state, tx.init(params))
    assert counts(carried) == [0]
    assert int(moments(carried).count) == 3


def test_injected_hyperparameters_are_those_of_the_new_phase():
    def make(rate):
        return optax.inject_hyperparams(optax.adam)(optax.linear_schedule(rate, 0.0, 10), b1=rate)

    params, state = run(make(0.5), only(PARAMS, "fc"), [1, 2, 3])
    carried = carry(state, make(0.25).init(params))
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
    carried = carry(state, renamed.init(params))
    assert_same(run(renamed, params, [4, 5], carried)[0], run(tx, params, [4, 5], state)[0])
    assert jax.tree.structure(carried) == jax.tree.structure(renamed.init(params))


def test_another_kind_of_optimizer_begins_afresh():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2])
    for other in (optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.sgd(0.1)):
        tx = partition({"h": other}, {"fc": {"kernel": "h", "bias": "h"}})
        carried = carry(state, tx.init(params))
        assert_same(run(tx, params, [3], carried)[0], run(tx, params, [3])[0])


def test_new_leaves_under_an_old_count_are_warned_about():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2])
    after, grown = phase(*ALL_IN_ONE, params=merge(PARAMS, params))
    with pytest.warns(UserWarning, match="give them a label of their own") as caught:
        carried = carry(state, after.init(grown))
    text = str(caught[0].message)
    assert "new leaves (layer4/0/bn1/scale, layer4/0/conv1/kernel) share a group" in text
    assert "that are 2 steps old" in text
    assert int(moments(carried).count) == 2
    assert caught[0].filename == __file__


def test_leaves_of_different_age_take_the_larger_count_with_a_warning():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1, 2, 3])
    middle, grown = phase(*HEAD_AND_LATE, params=merge(PARAMS, params))
    grown, state = run(middle, grown, [4], carry(state, middle.init(grown)))
    after, grown = phase(*ALL_IN_ONE, params=merge(PARAMS, grown))
    with pytest.warns(UserWarning, match=r"leaves \(layer4/0/bn1/scale, .* that are 4 steps old"):
        carried = carry(state, after.init(grown))
    assert int(moments(carried).count) == 4


def test_lion_has_no_bias_correction_to_warn_about():
    lion = Group(optax.lion, 1e-3)
    before, params = phase(HEAD[0], HEAD[1] | {"head": lion})
    params, state = run(before, params, [1, 2])
    after, grown = phase(ALL_IN_ONE[0], ALL_IN_ONE[1] | {"all": lion}, merge(PARAMS, params))
    carry(state, after.init(grown))  # Warnings are errors here.


def test_moments_of_another_shape_are_refused_all_at_once():
    before, params = phase(*HEAD)
    params, state = run(before, params, [1])
    other = {"fc": {"kernel": jnp.zeros((4, 7)), "bias": jnp.zeros(7)}}
    with pytest.raises(ValueError, match="another shape") as caught:
        carry(state, optax.adam(1e-3).init(other))
    text = str(caught.value)
    assert "fc/kernel has mu of shape (4, 7), carried is (4, 4)" in text
    assert "fc/bias has nu of shape (7,), carried is (4,)" in text


def test_carried_moments_take_the_type_of_the_new_phase():
    _, state = run(optax.adam(1e-2), only(PARAMS, "fc"), [1])
    fresh = optax.adam(1e-2, mu_dtype=jnp.bfloat16).init(only(PARAMS, "fc"))
    carried = moments(carry(state, fresh))
    assert carried.mu["fc"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        carried.mu["fc"]["bias"], moments(state).mu["fc"]["bias"].astype(jnp.bfloat16)
    )


def test_carry_is_pure_and_can_be_traced():
    before, params = phase(*HEAD_AND_LATE)
    params, state = run(before, params, [1, 2])
    untouched = jax.tree.map(np.array, state)
    after, same = phase(*ALL_IN_ONE, params=merge(PARAMS, params))
    eager = carry(state, after.init(same))
    traced = jax.jit(carry)(state, after.init(same))
    jax.tree.map(np.testing.assert_array_equal, eager, traced)
    jax.tree.map(np.testing.assert_array_equal, state, untouched)


# optax's own tools work on the result


def test_a_partition_is_a_plain_optax_transformation():
    tx = partition(GROUPS, NAMED, clip=1.0)
    assert isinstance(tx, optax.GradientTransformation)
    state = tx.init(PARAMS)
    doubled = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf * 2, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    after, _ = run(optax.chain(tx, optax.scale(2.0)), PARAMS)
    assert_same(only(after, "conv1"), only(PARAMS, "conv1"))


def test_extra_arguments_reach_the_groups():
    plateau = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    tx = partition({"head": plateau, "late": FROZEN, "frozen": FROZEN}, NAMED)
    head_only = only(PARAMS, "fc")
    state, alone = tx.init(PARAMS), plateau.init(head_only)
    for _ in range(4):
        updates, state = tx.update(draw(1), state, PARAMS, value=1.0)
        expected, alone = plateau.update(only(draw(1), "fc"), alone, head_only, value=1.0)
    assert_same(only(updates, "fc"), expected)
    assert abs(updates["fc"]["bias"][0]) < abs(draw(1)["fc"]["bias"][0])


def test_masks_of_ours_serve_optax_inside_a_partition():
    groups = {"head": optax.adamw(1e-2, weight_decay=0.5, mask=matrices()), "late": FROZEN,
              "frozen": FROZEN}  # fmt: skip
    after, _ = run(partition(groups, NAMED), PARAMS)
    group = Group(optax.adamw, 1e-2, weight_decay=0.5, decay_mask=glob("**/kernel"))
    assert_same(only(after, "fc"), run(group.transformation(), only(PARAMS, "fc"))[0])
