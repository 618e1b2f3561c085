"""Layer-wise decay of learning rates."""

import jax
import jax.numpy as jnp
import optax
import pytest

from flaxtransfer.groups import Group
from flaxtransfer.optimizers import Scaled, layerwise_decay, partition
from flaxtransfer.paths import flatten, unflatten

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
    assert rates == {
        "adapter": 0.125,
        "stem": 0.25,
        "layer1": 0.5,
        "layer2": 1.0,
        "layer3": 2.0,
        "layer4": 4.0,
        "head": 8.0,
    }
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
        "stem": 1 / 32,
        "layer1": 1 / 16,
        "layer2": 1 / 8,
        "layer3": 1 / 4,
        "layer4": 1 / 2,
    }


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
        ({"decay": 0.0}, ValueError, r"a factor in \(0, 1\], got 0.0"),
        ({"decay": 1.5}, ValueError, "got 1.5"),
        ({"by": "layer"}, ValueError, "'segment' or 'block', got 'layer'"),
        ({"group": optax.sgd(0.1)}, TypeError, "the learning rate of a Group"),
        ({"params": {"decoder": {"kernel": 0}, "fc2": 0}}, ValueError, "decoder/kernel, fc2"),
    ],
)
def test_layerwise_decay_refuses(arguments, error, text):
    with pytest.raises(error, match=text):
        layerwise_decay(**({"params": NETWORK, "group": Group(optax.sgd, 0.1)} | arguments))
