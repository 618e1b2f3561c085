"""The names of Hugging Face's `ResNetForImageClassification`.

Its configuration can ask for graphs with the same names and shapes but other strides, which
nothing in the weights tells: the stride in the first convolution of bottlenecks is supported, a
stride in the first stage is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.weights.rename import CONV, DENSE, Rule, Table, batch_norm

__all__ = ["TABLE", "other_graph", "with_strides"]

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

_GRAPH = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
}


def other_graph(config: Mapping[str, Any]) -> list[str]:
    """What a `config.json` asks for that this package's network does not do.

    >>> other_graph({"model_type": "resnet", "downsample_in_first_stage": True})
    ['downsample_in_first_stage is True, and only False is supported']
    """
    return [
        f"{name} is {config[name]!r}, and only {supported!r} is supported"
        for name, supported in _GRAPH.items()
        if config.get(name, supported) != supported
    ]


def with_strides(seen: ResNetConfig, config: Mapping[str, Any]) -> ResNetConfig:
    """The network with its strides where a `config.json` has them.

    >>> bottlenecks = ResNetConfig("bottleneck", (3, 4, 6, 3))
    >>> with_strides(bottlenecks, {"downsample_in_bottleneck": True}).stride_in
    '1x1'
    """
    if seen.block == "bottleneck" and config.get("downsample_in_bottleneck"):
        return dataclasses.replace(seen, stride_in="1x1")
    return seen
