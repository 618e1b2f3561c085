"""Keys of timm: its ResNets, its pre-activation ResNets, and its fixed stem width.

Narrow networks in timm, whose plain stem has 64 channels whatever the width of the stages.

The channels that a narrower network has not are silent: zero filters, zero scales, zero weights in
what follows. Where timm then has a shortcut in the first block, and the network has none, it
passes the other channels on as they are.

timm's names for the networks of its `resnet.py`, which contain torchvision's.

Reference: R. Wightman, "PyTorch Image Models", 2019-, `timm/models/resnet.py`. In a network of
GroupNorms the keys are those of BatchNorms without statistics, and our leaves have names of
their own: no policy of BatchNorms applies to them.

timm's names for networks of pre-activations, those of its `resnetv2.py`.

Reference: R. Wightman, "PyTorch Image Models", 2019-, `timm/models/resnetv2.py`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.naming import torchvision
from flaxtransfer.weights.naming.key_map import CONV, DENSE, Rule, Table, batch_norm

__all__ = [
    "STEM_WIDTH",
    "TABLE",
    "narrowed",
    "of_groups",
    "table_for",
    "table_of",
    "v2_table_for",
    "v2_table_of",
    "widened",
    "with_big_transfer",
]


STEM_WIDTH = 64

# The axis of the stem's channels, and what a silent one holds there.
_SILENT = {
    "conv1.weight": (0, 0.0),
    "bn1.weight": (0, 0.0),
    "bn1.bias": (0, 0.0),
    "bn1.running_mean": (0, 0.0),
    "bn1.running_var": (0, 1.0),
    "layer1.0.conv1.weight": (1, 0.0),
    "layer1.0.downsample.0.weight": (1, 0.0),
    "layer1.0.downsample.1.weight": (1, 0.0),
}


def widened(arrays: Mapping[str, np.ndarray], config: ResNetConfig) -> dict[str, np.ndarray]:
    """The arrays of a narrow network under timm's keys, as those of one with timm's stem.

    Raises:
        ValueError: a wider network, or GroupNorms, whose groups silent channels would disturb.
    """
    width = config.width
    if width > STEM_WIDTH or config.norm == "group":
        raise ValueError(
            f"timm's plain stem has {STEM_WIDTH} channels and that of {config.name} {width}; --to "
            "huggingface, onnx or stablehlo may hold it"
        )
    wide = dict(arrays)
    for key, (axis, value) in _of_the_stem(arrays).items():
        pads = [(0, 0)] * arrays[key].ndim
        pads[axis] = (0, STEM_WIDTH - width)
        wide[key] = np.pad(arrays[key], pads, constant_values=value)
    if not config.has_shortcut(1, 0):
        wide |= _passing(width, int(config.shortcut == "average"))
    return wide


def narrowed(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The way back from `widened`; other arrays are left as they are.

    Returns:
        The arrays, and a note where channels were taken away.
    """
    width = _width(arrays)
    keys = _of_the_stem(arrays)
    if (
        width >= STEM_WIDTH
        or not {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= keys.keys()
    ):
        return dict(arrays), []
    beyond = {
        key: (np.moveaxis(arrays[key], axis, 0)[width:], value)
        for key, (axis, value) in keys.items()
    }
    if any(
        len(part) != STEM_WIDTH - width or (part != value).any() for part, value in beyond.values()
    ):
        return dict(arrays), []
    passing = any(_holds(arrays, _passing(width, number)) for number in (0, 1))
    narrow = {
        key: array
        for key, array in arrays.items()
        if not (passing and key.startswith("layer1.0.downsample."))
    }
    for key, (axis, _) in keys.items():
        if key in narrow:
            narrow[key] = np.take(arrays[key], np.arange(width), axis)
    return narrow, [f"{STEM_WIDTH - width} silent channels of timm's stem were left out"]


def _of_the_stem(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, float]]:
    # `downsample.1.weight` is a kernel behind an average-pool, and a scale elsewhere.
    return {
        key: (axis, value)
        for key, (axis, value) in _SILENT.items()
        if key in arrays and np.ndim(arrays[key]) == (4 if axis or key == "conv1.weight" else 1)
    }


def _width(arrays: Mapping[str, np.ndarray]) -> int:
    """Planes of the first stage; timm's width where the keys are of no such network."""
    for key, expansion in (("layer1.0.conv3.weight", 4), ("layer1.0.conv2.weight", 1)):
        if key in arrays and np.ndim(arrays[key]) == 4:
            return arrays[key].shape[0] // expansion
    return STEM_WIDTH


def _passing(width: int, number: int) -> dict[str, np.ndarray]:
    norm = f"layer1.0.downsample.{number + 1}"
    return {
        f"layer1.0.downsample.{number}.weight": np.eye(width, STEM_WIDTH, dtype=np.float32)[
            ..., None, None
        ],
        f"{norm}.weight": np.ones(width, np.float32),
        f"{norm}.bias": np.zeros(width, np.float32),
        f"{norm}.running_mean": np.zeros(width, np.float32),
        # With the epsilon of timm's norms it is 1.
        f"{norm}.running_var": np.full(width, 1 - 1e-5, np.float32),
    }


def _holds(arrays: Mapping[str, np.ndarray], part: Mapping[str, np.ndarray]) -> bool:
    return all(key in arrays and np.array_equal(arrays[key], part[key]) for key in part)


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


V2_EPSILON = 1e-8
"""Of the weight standardization in timm's BiT; BiT's own is 1e-10."""

_V2_BLOCK, _V2_PATH = "stages.{s-1}.blocks.{b}", "layer{s}/{b}"

V2_TABLE: Table = (
    Rule("stem.conv.weight", "params/conv1/kernel", CONV),
    Rule("stem.conv1.weight", "params/conv1/0/kernel", CONV),
    *batch_norm("stem.norm1", "conv1/bn1"),
    Rule("stem.conv2.weight", "params/conv1/3/kernel", CONV),
    *batch_norm("stem.norm2", "conv1/bn4"),
    Rule("stem.conv3.weight", "params/conv1/6/kernel", CONV),
    Rule(f"{_V2_BLOCK}.conv{{k}}.weight", f"params/{_V2_PATH}/conv{{k}}/kernel", CONV),
    *batch_norm(f"{_V2_BLOCK}.norm{{k}}", f"{_V2_PATH}/bn{{k}}"),
    Rule(f"{_V2_BLOCK}.downsample.conv.weight", f"params/{_V2_PATH}/downsample/0/kernel", CONV),
    *batch_norm("norm", "layer4/bn1"),
    Rule("head.fc.weight", "params/fc/kernel", DENSE, units=(2, 3)),
    Rule("head.fc.bias", "params/fc/bias"),
)


def v2_table_of(keys: Iterable[str]) -> Table:
    """The table for a file with these keys.

    >>> v2_table_of(["norm.weight", "norm.bias"])[3].leaf
    'params/conv1/gn1/bias'
    """
    keys = set(keys)
    groups = "norm.weight" in keys and "norm.running_mean" not in keys
    # A deep stem goes with pooled shortcuts, for no key shows whether a shortcut is pooled.
    return _v2_table("stem.conv1.weight" in keys, groups)


def v2_table_for(config: ResNetConfig) -> Table:
    """The table for a network."""
    return _v2_table(config.shortcut == "average", config.norm == "group")


def with_big_transfer(config: ResNetConfig) -> ResNetConfig:
    """The network, with what timm's of GroupNorms behind a plain stem are and no leaf shows: BiT.

    >>> with_big_transfer(ResNetConfig(norm="group")).stem_pool
    'zero-padded'
    """
    config = dataclasses.replace(config, preactivation=True)
    if config.norm == "group" and config.stem == "plain":
        return dataclasses.replace(config, standardized=V2_EPSILON, stem_pool="zero-padded")
    return config


def _v2_table(pooled: bool, groups: bool) -> Table:
    table = tuple(_pooled(rule) for rule in V2_TABLE) if pooled else V2_TABLE
    return tuple(map(of_groups, table)) if groups else table


def _pooled(rule: Rule) -> Rule:
    return dataclasses.replace(rule, leaf=rule.leaf.replace("downsample/0/", "downsample/1/"))
