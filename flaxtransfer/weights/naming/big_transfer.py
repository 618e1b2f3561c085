"""The names in the `.npz` files of Big Transfer (BiT).

Reference: A. Kolesnikov et al., "Big Transfer (BiT): General Visual Representation Learning",
2020, whose files are `BiT-{S,M}-R{50,101,152}x{1,2,3,4}.npz`. Kernels are stored as we keep them.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.naming.key_map import Rule, Table
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["PREPROCESSING", "TABLE", "unnumbered", "with_standardized_weights"]


PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, size=224, resize=256)
"""Pixels between -1 and 1; the size is that of the pre-training."""


def _group_norm(key: str, path: str) -> Table:
    return (
        Rule(f"{key}/gamma", f"params/{path}/scale"),
        Rule(f"{key}/beta", f"params/{path}/bias"),
    )


def _branch(letter: str, number: int) -> Table:
    unit, block = f"resnet/block{{s}}/unit{{b+1:02}}/{letter}", "layer{s}/{b}"
    kernel = f"{unit}/standardized_conv2d/kernel"
    return (
        Rule(kernel, f"params/{block}/conv{number}/kernel"),
        *_group_norm(f"{unit}/group_norm", f"{block}/gn{number}"),
    )


TABLE: Table = (
    Rule("resnet/root_block/standardized_conv2d/kernel", "params/conv1/kernel"),
    *_branch("a", 1),
    *_branch("b", 2),
    *_branch("c", 3),
    Rule(
        "resnet/block{s}/unit{b+1:02}/a/proj/standardized_conv2d/kernel",
        "params/layer{s}/{b}/downsample/0/kernel",
    ),
    *_group_norm("resnet/group_norm", "layer4/gn1"),
    Rule("resnet/head/conv2d/kernel", "params/fc/kernel", units=(0, 1)),
    Rule("resnet/head/conv2d/bias", "params/fc/bias"),
)


def unnumbered(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays without the counters that TensorFlow put behind the names of some files' layers.

    >>> list(unnumbered({"resnet/block1/unit01/a/standardized_conv2d_3/kernel": 0})[0])
    ['resnet/block1/unit01/a/standardized_conv2d/kernel']
    """
    renamed = {
        re.sub(r"(standardized_conv2d|group_norm)_\d+/", r"\1/", key): array
        for key, array in arrays.items()
    }
    if len(renamed) != len(arrays):
        raise ValueError("two keys have one name once the counters behind layers are removed")
    return renamed, []


def with_standardized_weights(config: ResNetConfig) -> ResNetConfig:
    """What all networks of BiT are and no leaf shows."""
    return dataclasses.replace(
        config, preactivation=True, norm="group", standardized=1e-10, stem_pool="zero-padded"
    )
