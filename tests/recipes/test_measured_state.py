"""Measured rates and the optimizer's state, against one optimizer of optax over the whole network.

Published code for rates by relative gradient norm makes a new Adam whenever rates change, which
throws its moments away. Here rates are scaled behind one Adam whose moments go on.
"""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import flaxtransfer as ft
from flaxtransfer.masks import resolve
from flaxtransfer.models.layout import segment_of
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.training.step import optimizer
from tests.support.small import network

PARAMS = network()[1]["params"]
BODY = ("stem", "layer1", "layer2", "layer3", "layer4")
RATIOS = dict(zip(BODY, (1.0, 2.0, 4.0, 3.0, 0.5), strict=True))
STEPS = 6


def gradients(step):
    random = np.random.default_rng(step)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), PARAMS)


def trajectory(plan):
    """Parameters and optimizer state after some steps, all of them in the one phase there is."""
    (phase,) = plan.resolve(PARAMS).phases
    tx = optimizer(phase)
    moving = phase.param_groups.trainable(PARAMS)
    state, update = tx.init(moving), jax.jit(tx.update)
    for step in range(STEPS):
        pulls = phase.param_groups.trainable(gradients(step))
        updates, state = update(pulls, state, moving)
        moving = optax.apply_updates(moving, updates)
    return flatten(moving), state


def one_adam(factors, *, rebuilt=False):
    """Optax's own AdamW, and each leaf's update times the factor of its part."""
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1, mask=resolve(ft.matrices(), PARAMS)),
        optax.scale_by_schedule(ft.WarmupCosine(1e-2).over(STEPS)),
        optax.scale(-1.0),
    )
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(gradients(step), state, params)
        if rebuilt:
            state = (state[0], tx.init(params)[1], *state[2:])
        scaled = {path: leaf * factors[segment_of(path)] for path, leaf in flatten(updates).items()}
        params = optax.apply_updates(params, unflatten(scaled))
    return flatten(params)


def differs(found, wanted):
    return max(float(np.abs(found[path] - wanted[path]).max()) for path in wanted)


def test_rates_by_gradient_are_one_adam_whose_moments_go_on():
    plan = ft.recipes.gradient_scaled(
        PARAMS,
        gradients=RATIOS,
        learning_rate=1e-2,
        weight_decay=0.1,
        head_learning_rate=1e-2,
        steps=STEPS,
    )
    found, _ = trajectory(plan)
    factors = {name: value / 4.0 for name, value in RATIOS.items()} | {"head": 1.0}
    assert differs(found, one_adam(factors)) < 1e-5
    assert differs(found, one_adam(factors, rebuilt=True)) > 1e-3


def test_rates_by_curvature_are_one_adam_too():
    curvature = dict(zip(BODY, (8.0, 3.0, 0.0, 15.0, 3.0), strict=True))
    plan = ft.recipes.curvature_scaled(
        PARAMS,
        curvature=curvature,
        examples=1,
        prior_precision=1.0,
        learning_rate=1e-2,
        head_learning_rate=1e-2,
        weight_decay=0.1,
        steps=STEPS,
    )
    found, _ = trajectory(plan)
    factors = dict(zip(BODY, (1 / 3, 1 / 2, 1.0, 1 / 4, 1 / 2), strict=True)) | {"head": 1.0}
    assert differs(found, one_adam(factors)) < 1e-5


@pytest.mark.parametrize("batch_norms", [True, False])
def test_surgery_keeps_moments_of_what_it_moves_and_of_nothing_else(batch_norms):
    plan = ft.recipes.surgical(PARAMS, gradients=RATIOS, batch_norms=batch_norms, steps=STEPS)
    found, state = trajectory(plan)
    wanted = ft.head() | (ft.stage(2) if batch_norms else ft.stage(2) - ft.batch_norm())
    assert set(found) == {path for path, moves in flatten(resolve(wanted, PARAMS)).items() if moves}
    adams = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
    assert [int(adam.count) for adam in adams] == [STEPS] * 2
    moments = sum(leaf.size for adam in adams for leaf in jax.tree.leaves(adam.mu))
    assert moments == sum(leaf.size for leaf in found.values())


def _is_adam(state):
    return isinstance(state, optax.ScaleByAdamState)
