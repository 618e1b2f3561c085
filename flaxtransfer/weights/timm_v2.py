"""timm's names for networks of pre-activations, those of its `resnetv2.py`.

Reference: R. Wightman, "PyTorch Image Models", 2019-, `timm/models/resnetv2.py`.
"""

import dataclasses
from collections.abc import Iterable

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.weights.rename import CONV, DENSE, Rule, Table, batch_norm
from flaxtransfer.weights.timm import of_groups

__all__ = ["table_for", "table_of", "with_big_transfer"]

EPSILON = 1e-8
"""Of the weight standardisation in timm's BiT; BiT's own is 1e-10."""

_BLOCK, _PATH = "stages.{s-1}.blocks.{b}", "layer{s}/{b}"

TABLE: Table = (
    Rule("stem.conv.weight", "params/conv1/kernel", CONV),
    Rule("stem.conv1.weight", "params/conv1/0/kernel", CONV),
    *batch_norm("stem.norm1", "conv1/bn1"),
    Rule("stem.conv2.weight", "params/conv1/3/kernel", CONV),
    *batch_norm("stem.norm2", "conv1/bn4"),
    Rule("stem.conv3.weight", "params/conv1/6/kernel", CONV),
    Rule(f"{_BLOCK}.conv{{k}}.weight", f"params/{_PATH}/conv{{k}}/kernel", CONV),
    *batch_norm(f"{_BLOCK}.norm{{k}}", f"{_PATH}/bn{{k}}"),
    Rule(f"{_BLOCK}.downsample.conv.weight", f"params/{_PATH}/downsample/0/kernel", CONV),
    *batch_norm("norm", "layer4/bn1"),
    Rule("head.fc.weight", "params/fc/kernel", DENSE, units=(2, 3)),
    Rule("head.fc.bias", "params/fc/bias"),
)


def table_of(keys: Iterable[str]) -> Table:
    """The table for a file with these keys.

    >>> table_of(["norm.weight", "norm.bias"])[3].leaf
    'params/conv1/gn1/bias'
    """
    keys = set(keys)
    groups = "norm.weight" in keys and "norm.running_mean" not in keys
    # A deep stem goes with pooled shortcuts, for no key shows whether a shortcut is pooled.
    return _table("stem.conv1.weight" in keys, groups)


def table_for(config: ResNetConfig) -> Table:
    """The table for a network."""
    return _table(config.shortcut == "average", config.norm == "group")


def with_big_transfer(config: ResNetConfig) -> ResNetConfig:
    """The network, with what timm's of GroupNorms behind a plain stem are and no leaf shows: BiT.

    >>> with_big_transfer(ResNetConfig(norm="group")).stem_pool
    'zero-padded'
    """
    config = dataclasses.replace(config, preactivation=True)
    if config.norm == "group" and config.stem == "plain":
        return dataclasses.replace(config, standardised=EPSILON, stem_pool="zero-padded")
    return config


def _table(pooled: bool, groups: bool) -> Table:
    table = tuple(_pooled(rule) for rule in TABLE) if pooled else TABLE
    return tuple(map(of_groups, table)) if groups else table


def _pooled(rule: Rule) -> Rule:
    return dataclasses.replace(rule, leaf=rule.leaf.replace("downsample/0/", "downsample/1/"))
