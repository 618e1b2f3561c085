"""Each leaf by its group's optimizer: freezing, decay, clip, rates, and optax's own tools."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import ParamGroups, label, rest
from flaxtransfer.masks import batch_norm, everything, glob, kernels, matrices
from flaxtransfer.optimizers import partition
from flaxtransfer.paths import flatten, merge
from tests.support.small_params import GROUPS, NAMED, PARAMS, assert_same, bits, draw, only, run

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
    moving = ParamGroups(NAMED, groups).trainable(gradients)
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    expected, _ = plain.update(moving, plain.init(moving), moving)
    assert_same(ParamGroups(NAMED, groups).trainable(updates), expected)
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
    tx = partition(
        {"all": Group(optax.sgd, 1.0, 2.0, everything())},
        label(PARAMS, {"all": everything()}),
        clip=1e-6,
    )
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
        rates.append(
            [
                -float(u.ravel()[0])
                for u in (
                    updates["fc"]["bias"],
                    updates["layer4"]["0"]["bn1"]["scale"],
                    updates["bn1"]["bias"],
                )
            ]
        )
    assert rates == [[1, 0.25, 0], [1, 0.25, 0], [0.5, 0.25, 0], [0.5, 0.25, 0]]


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
    groups = {
        "head": optax.adamw(1e-2, weight_decay=0.5, mask=matrices()),
        "late": FROZEN,
        "frozen": FROZEN,
    }
    after, _ = run(partition(groups, NAMED), PARAMS)
    group = Group(optax.adamw, 1e-2, weight_decay=0.5, decay_mask=glob("**/kernel"))
    assert_same(only(after, "fc"), run(group.transformation(), only(PARAMS, "fc"))[0])
