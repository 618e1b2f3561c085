"""Keys of ``keras.applications`` and of Keras Hub's ResNets, and the graph that a file states.

A ``.keras`` or whole ``.h5`` file has the graph of its layers as JSON. ``stated`` compares it with
the network that the weights' names imply; nothing in it is run.

References: F. Chollet et al., "Keras", 2015-, ``keras/src/applications/resnet.py``; the Keras team,
"KerasHub", 2024-, ``keras_hub/src/models/resnet/resnet_backbone.py``.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import shortened
from flaxtransfer.weights.naming.key_map import Rule, Table
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "CAFFE",
    "TF",
    "first_version",
    "hub_table",
    "prepared",
    "second_version",
    "stated",
    "table",
]


CAFFE = Preprocessing(
    (123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3, size=224, resize=256
)
"""Of the first version: pixels from 0 to 255 minus ImageNet's means, without division."""
TF = Preprocessing((0.5,) * 3, (0.5,) * 3, size=224, resize=256)
"""Of the second version: pixels from -1 to 1."""

EPSILON = 1.001e-5

_VARIABLES = {
    "conv": ("kernel", "bias"),
    "bn": ("gamma", "beta", "moving_mean", "moving_variance"),
    "predictions": ("kernel", "bias"),
}


def _norm(key: str, path: str) -> Table:
    return (
        Rule(f"{key}/gamma", f"params/{path}/scale"),
        Rule(f"{key}/beta", f"params/{path}/bias"),
        Rule(f"{key}/moving_mean", f"batch_stats/{path}/mean"),
        Rule(f"{key}/moving_variance", f"batch_stats/{path}/var"),
    )


def table(keys: Collection[str]) -> Table:
    """The key map of ``keras.applications``, in the version of the keys."""
    return _table("conv{s+1}_block{b+1}", "preact_bn", "post_bn/gamma" in keys, "downsample/0")


def hub_table(keys: Collection[str]) -> Table:
    """The key map of Keras Hub; a stem with three convolutions implies pooled shortcuts."""
    deep = "conv3_conv/kernel" in keys
    shortcut = "downsample/1" if deep else "downsample/0"
    blocks = _table("stack{s-1}_block{b}", "pre_activation_bn", "post_bn/gamma" in keys, shortcut)
    if not deep:
        return blocks
    stem = (
        Rule("conv1_conv/kernel", "params/conv1/0/kernel"),
        *_norm("conv1_bn", "conv1/bn1"),
        Rule("conv2_conv/kernel", "params/conv1/3/kernel"),
        *_norm("conv2_bn", "conv1/bn4"),
        Rule("conv3_conv/kernel", "params/conv1/6/kernel"),
        *_norm("conv3_bn", "bn1"),
    )
    return (*stem, *(rule for rule in blocks if not rule.key.startswith("conv1_")))


def _table(block: str, first_norm: str, preactivation: bool, shortcut: str) -> Table:
    path, number = "layer{s}/{b}", int(shortcut[-1])
    shared = (
        Rule("conv1_conv/kernel", "params/conv1/kernel"),
        Rule("conv1_conv/bias", "params/conv1/bias"),
        Rule(f"{block}_0_conv/kernel", f"params/{path}/{shortcut}/kernel"),
        Rule(f"{block}_{{k}}_conv/kernel", f"params/{path}/conv{{k}}/kernel"),
        Rule("predictions/kernel", "params/fc/kernel"),
        Rule("predictions/bias", "params/fc/bias"),
    )
    if preactivation:
        return (
            *shared,
            *_norm(f"{block}_{first_norm}", f"{path}/bn1"),
            # A norm has the number of the convolution that it follows.
            *(rule for k in (1, 2) for rule in _norm(f"{block}_{k}_bn", f"{path}/bn{k + 1}")),
            *_norm("post_bn", "layer4/bn1"),
        )
    return (
        *shared,
        *_norm("conv1_bn", "bn1"),
        *_norm(f"{block}_0_bn", f"{path}/downsample/{number + 1}"),
        *_norm(f"{block}_{{k}}_bn", f"{path}/bn{{k}}"),
    )


def first_version(config: ResNetConfig) -> ResNetConfig:
    """Sets what ``keras.applications.ResNet50`` and similar imply and no leaf shows."""
    if config.preactivation:
        return second_version(config)
    return dataclasses.replace(config, stride_in="1x1", epsilon=EPSILON)


def second_version(config: ResNetConfig) -> ResNetConfig:
    """Sets what ``keras.applications.ResNet50V2`` and similar imply and no leaf shows."""
    return dataclasses.replace(config, stride_at="last", stem_pool="zero-padded", epsilon=EPSILON)


_HARMLESS = re.compile(r"InputLayer|ZeroPadding2D|Random\w+|.*Dropout\w*|GaussianNoise")
"""Classes of layers that change nothing at inference, and the padding before the stem."""
_OF_BLOCKS = ("Conv2D", "BatchNormalization", "Activation", "ReLU", "Add", "MaxPooling2D")


def stated(graph: Any, config: ResNetConfig) -> tuple[ResNetConfig, list[str]]:
    """The configuration with what a graph states, and what it states that is not supported.

    Args:
        graph: Keras' JSON, a model with its layers.
        config: of the network, by the names and shapes of its weights.

    >>> relu6 = {"class_name": "ReLU", "config": {"name": "conv1_relu", "max_value": 6}}
    >>> stem = {"class_name": "Conv2D", "config": {"name": "conv1_conv", "strides": [2, 2]}}
    >>> stated({"config": {"layers": [stem, relu6]}}, ResNetConfig("bottleneck"))[1]
    ["conv1_relu must be a plain ReLU, got {'max_value': 6}"]
    """
    layers = list(_layers(graph))
    names = [fields["name"] for _, fields in layers]
    if "conv1_conv" not in names:
        return config, []
    start = names.index("conv1_conv")
    body = [n for n, name in enumerate(names) if re.match(r"conv\d|pool1|post_", name)]
    problems = [
        f"{fields['name']} must not be in front of the network (save the base alone), got a {kind}"
        for kind, fields in layers[:start]
        if not _HARMLESS.fullmatch(kind)
    ]
    inside = layers[start : body[-1] + 1]
    for kind, fields in inside:
        problems += _problem(kind, fields)
    strided = {f["name"] for kind, f in inside if kind == "Conv2D" and _most(f, "strides") > 1}
    if odd := (strided ^ _strided(config)) & set(names):
        listed = ", ".join(sorted(odd))
        problems.append(f"strides must be those of keras.applications, got others in {listed}")
    norms = [f.get("epsilon") for kind, f in inside if kind == "BatchNormalization"]
    if len(different := sorted(set(map(repr, norms)))) > 1:
        got = shortened(", ".join(different), 60)
        problems.append(f"epsilon must be one number for all norms, got {got}")
    elif norms and isinstance(norms[0], float):
        config = dataclasses.replace(config, epsilon=norms[0])
    pooled = any(kind.startswith("GlobalMax") for kind, _ in layers[start:])
    if pooled and "predictions" in names:
        problems.append("pooling must be 'avg', got 'max'")
    return config, problems


def _layers(graph: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Class and settings of each named layer, in order, those of inner models as well."""
    inner = graph.get("config") if isinstance(graph, dict) else None
    layers = inner.get("layers") if isinstance(inner, dict) else inner
    for layer in layers if isinstance(layers, list) else []:
        fields = layer.get("config") if isinstance(layer, dict) else None
        if not isinstance(fields, dict):
            continue
        if "layers" in fields:
            yield from _layers(layer)
        elif isinstance(fields.get("name"), str):
            yield str(layer.get("class_name")), fields


def _problem(kind: str, fields: Mapping[str, Any]) -> list[str]:
    """What a layer of the network's body does that ours do not."""
    name = fields["name"]
    if kind == "Conv2D" and _most(fields, "dilation_rate") > 1:
        return [f"{name} must have a dilation_rate of 1, got {_most(fields, 'dilation_rate')}"]
    asked = fields.get("activation", "linear")
    if asked != ("relu" if kind == "Activation" else "linear"):
        return [f"{name} must have the activation 'relu', got {shortened(repr(asked), 60)}"]
    slopes = ("max_value", "negative_slope", "threshold")
    if kind == "ReLU" and (own := {n: fields[n] for n in slopes if fields.get(n)}):
        return [f"{name} must be a plain ReLU, got {shortened(repr(own), 60)}"]
    if kind in _OF_BLOCKS or _HARMLESS.fullmatch(kind):
        return []
    return [f"{name} must be a layer of keras.applications, got a {shortened(kind, 60)}"]


def _most(fields: Mapping[str, Any], name: str) -> int:
    values = fields.get(name)
    numbers = values if isinstance(values, list) else [values]
    return max((n for n in numbers if isinstance(n, int)), default=1)


def _strided(config: ResNetConfig) -> set[str]:
    """The convolutions with a stride in ``keras.applications``."""
    if config.stride_at == "last":
        last = zip(range(2, 5), config.depths, strict=False)
        return {"conv1_conv", *(f"conv{s}_block{depth}_2_conv" for s, depth in last)}
    return {"conv1_conv", *(f"conv{s}_block1_{k}_conv" for s in (3, 4, 5) for k in (0, 1))}


def prepared(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts Keras variables: keys by name, biases folded into norms, input channels as RGB.

    Arrays of other files are returned unchanged.
    """
    if not any(key.startswith("conv1_conv/") for key in arrays):
        return dict(arrays), []
    named = {_named(key): np.asarray(array) for key, array in arrays.items()}
    notes = []
    blocks = sorted(
        {m[1] for key in named if (m := re.match(r"(conv\d+_block\d+)_", key))}, key=_order
    )
    biases = [key for key in named if key.endswith("_conv/bias")]
    if "post_bn/moving_mean" in named:
        _fold_along_the_stream(named, blocks)
    else:
        for key in biases:
            norm = key.replace("_conv/bias", "_bn/moving_mean")
            if norm in named:
                _shift(named, norm, named.pop(key))
        kernel = named.get("conv1_conv/kernel")
        if blocks and kernel is not None and kernel.ndim == 4 and kernel.shape[2] == 3:
            named["conv1_conv/kernel"] = kernel[:, :, ::-1]
            notes.append("the stem's input channels were reordered from BGR to RGB")
    folded = [key for key in biases if key not in named]
    if folded:
        notes.append(f"{len(folded)} biases of convolutions were folded into running means")
    return named, notes


def _fold_along_the_stream(named: dict[str, np.ndarray], blocks: list[str]) -> None:
    """Folds the biases of pre-activation blocks into the running means of later norms.

    A bias is added to the residual stream, which later norms and identity shortcuts see. A shortcut
    with a convolution starts behind a norm, so earlier biases end there.
    """
    added = np.zeros(())
    for block in blocks:
        _shift(named, f"{block}_preact_bn/moving_mean", added)
        if f"{block}_0_conv/bias" in named:
            added = named.pop(f"{block}_0_conv/bias").astype(np.float64)
        if f"{block}_3_conv/bias" in named:
            added = added + named.pop(f"{block}_3_conv/bias")
    _shift(named, "post_bn/moving_mean", added)


def _shift(named: dict[str, np.ndarray], mean: str, bias: np.ndarray) -> None:
    if mean not in named or np.shape(bias) not in ((), named[mean].shape):
        raise ValueError(f"{mean} must exist and have the shape of the bias before it")
    old = named[mean]
    named[mean] = (old.astype(np.float64) - bias).astype(old.dtype)


def _named(key: str) -> str:
    layer, _, variable = key.rpartition("/")
    names = _VARIABLES.get(layer.rsplit("_", 1)[-1], ())
    if variable.isdigit() and int(variable) < len(names):
        return f"{layer}/{names[int(variable)]}"
    return key


def _order(block: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", block)))
