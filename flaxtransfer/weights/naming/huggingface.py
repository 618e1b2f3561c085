"""Keys of Hugging Face's ``ResNetForImageClassification``, in torch and in Flax.

Its configuration can ask for networks with the same names and shapes but other strides, which the
weights do not show. A stride in the first convolution of bottlenecks is supported; a stride in the
first stage is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.naming.key_map import CONV, DENSE, Rule, Table, batch_norm

__all__ = ["FLAX", "TABLE", "in_flax", "other_graph", "with_strides"]


_BLOCK = "resnet.encoder.stages.{s-1}.layers.{b}"

TABLE: Table = (
    Rule("resnet.embedder.embedder.convolution.weight", "params/conv1/kernel", CONV),
    *batch_norm("resnet.embedder.embedder.normalization", "bn1"),
    Rule(
        _BLOCK + ".layer.{k-1}.convolution.weight",
        "params/layer{s}/{b}/conv{k}/kernel",
        CONV,
    ),
    *batch_norm(_BLOCK + ".layer.{k-1}.normalization", "layer{s}/{b}/bn{k}"),
    Rule(_BLOCK + ".shortcut.convolution.weight", "params/layer{s}/{b}/downsample/0/kernel", CONV),
    *batch_norm(_BLOCK + ".shortcut.normalization", "layer{s}/{b}/downsample/1"),
    Rule("classifier.1.weight", "params/fc/kernel", DENSE),
    Rule("classifier.1.bias", "params/fc/bias"),
)


def _flax_norm(key: str, path: str) -> Table:
    return tuple(
        Rule(f"{collection}/{key}/{leaf}", f"{collection}/{path}/{leaf}")
        for collection, leaves in (("params", ("scale", "bias")), ("batch_stats", ("mean", "var")))
        for leaf in leaves
    )


_FLAX_BLOCK = "resnet/encoder/stages/{s-1}/layers/{b}"

FLAX: Table = (
    Rule("params/resnet/embedder/embedder/convolution/kernel", "params/conv1/kernel"),
    *_flax_norm("resnet/embedder/embedder/normalization", "bn1"),
    Rule(
        f"params/{_FLAX_BLOCK}/layer/{{k-1}}/convolution/kernel",
        "params/layer{s}/{b}/conv{k}/kernel",
    ),
    *_flax_norm(_FLAX_BLOCK + "/layer/{k-1}/normalization", "layer{s}/{b}/bn{k}"),
    Rule(
        f"params/{_FLAX_BLOCK}/shortcut/convolution/kernel",
        "params/layer{s}/{b}/downsample/0/kernel",
    ),
    *_flax_norm(_FLAX_BLOCK + "/shortcut/normalization", "layer{s}/{b}/downsample/1"),
    Rule("params/classifier/1/kernel", "params/fc/kernel"),
    Rule("params/classifier/1/bias", "params/fc/bias"),
)
"""The keys of transformers' former Flax networks; kernels have our axis order."""


def in_flax(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays with uniform keys: basic blocks name their layers ``layer_0`` and ``layer_1``.

    >>> list(in_flax({"params/resnet/encoder/stages/0/layers/1/layer/layer_0/x": 0})[0])
    ['params/resnet/encoder/stages/0/layers/1/layer/0/x']
    """
    return {key.replace("/layer/layer_", "/layer/"): a for key, a in arrays.items()}, []


_GRAPH = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
}


def other_graph(config: Mapping[str, Any]) -> list[str]:
    """The settings in a ``config.json`` that are not supported.

    >>> other_graph({"model_type": "resnet", "downsample_in_first_stage": True})
    ['downsample_in_first_stage must be False, got True']
    """
    return [
        f"{name} must be {supported!r}, got {config[name]!r}"
        for name, supported in _GRAPH.items()
        if config.get(name, supported) != supported
    ]


def with_strides(seen: ResNetConfig, config: Mapping[str, Any]) -> ResNetConfig:
    """The configuration with the strides in a ``config.json``.

    >>> bottlenecks = ResNetConfig("bottleneck", (3, 4, 6, 3))
    >>> with_strides(bottlenecks, {"downsample_in_bottleneck": True}).stride_in
    '1x1'
    """
    if seen.block == "bottleneck" and config.get("downsample_in_bottleneck"):
        return dataclasses.replace(seen, stride_in="1x1")
    return seen
