"""A small tree in groups, and steps on it by drawn gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import head, stage
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
GROUPS = {
    "head": Group(optax.adamw, 1e-2, weight_decay=0.1),
    "late": Group(functools.partial(optax.sgd, momentum=0.9), 0.1, weight_decay=0.1),
    "frozen": FROZEN,
}


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
