"""timm's names for the networks of its `resnet.py`, which contain torchvision's.

Reference: R. Wightman, "PyTorch Image Models", 2019-, `timm/models/resnet.py`. In a network of
GroupNorms the keys are those of BatchNorms without statistics, and our leaves have names of
their own: no policy of BatchNorms applies to them.
"""

import dataclasses
import re
from collections.abc import Iterable

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.weights import torchvision
from flaxtransfer.weights.rename import CONV, Rule, Table, batch_norm

__all__ = ["TABLE", "of_groups", "table_for", "table_of"]

_BLOCK, _PATH = "layer{s}.{b}", "layer{s}/{b}"

TABLE: Table = (
    *torchvision.TABLE,
    Rule("conv1.0.weight", "params/conv1/0/kernel", CONV),
    *batch_norm("conv1.1", "conv1/bn1"),
    Rule("conv1.3.weight", "params/conv1/3/kernel", CONV),
    *batch_norm("conv1.4", "conv1/bn4"),
    Rule("conv1.6.weight", "params/conv1/6/kernel", CONV),
    Rule("maxpool.0.weight", "params/maxpool/0/kernel", CONV),
    *batch_norm("maxpool.1", "maxpool/bn1"),
    # After an average-pool the numbers in a shortcut are higher by one.
    Rule(f"{_BLOCK}.downsample.1.weight", f"params/{_PATH}/downsample/1/kernel", CONV),
    *batch_norm(f"{_BLOCK}.downsample.2", f"{_PATH}/downsample/2"),
    Rule(f"{_BLOCK}.se.fc{{k}}.weight", f"params/{_PATH}/se/fc{{k}}/kernel", CONV),
    Rule(f"{_BLOCK}.se.fc{{k}}.bias", f"params/{_PATH}/se/fc{{k}}/bias"),
    Rule(f"{_BLOCK}.se.conv.weight", f"params/{_PATH}/se/conv/kernel", (2, 1, 0)),
)


def table_of(keys: Iterable[str]) -> Table:
    """The table for a file with these keys.

    >>> table_of(["bn1.weight", "bn1.bias"])[3].leaf
    'params/gn1/scale'
    """
    keys = set(keys)
    groups = "bn1.weight" in keys and not any(key.endswith(".running_mean") for key in keys)
    return _table(any(key.endswith(".downsample.2.weight") for key in keys), groups)


def table_for(config: ResNetConfig) -> Table:
    """The table for a network; for the plain ones it gives torchvision's keys."""
    return _table(config.shortcut == "average", config.norm == "group")


def _table(pooled: bool, groups: bool) -> Table:
    table = tuple(rule for rule in TABLE if not _is_of_the_other_shortcut(rule, pooled))
    return tuple(map(of_groups, table)) if groups else table


def _is_of_the_other_shortcut(rule: Rule, pooled: bool) -> bool:
    """`downsample.1.weight` is a norm in one kind of shortcut and a convolution in the other."""
    plain = re.search(r"downsample\.[01]\.", rule.key) and "downsample/1/kernel" not in rule.leaf
    with_pool = "downsample/1/kernel" in rule.leaf or "downsample.2" in rule.key
    return bool(plain if pooled else with_pool)


def of_groups(rule: Rule) -> Rule:
    """The rule where the network has GroupNorms."""
    leaf = re.sub(r"/bn(\d+|\{k\})/", r"/gn\1/", rule.leaf)
    leaf = re.sub(r"/downsample/(\d)/(scale|bias)", r"/downsample/gn\1/\2", leaf)
    return dataclasses.replace(rule, leaf=leaf)
