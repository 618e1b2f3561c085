"""Keys of ``keras.applications`` and of Keras Hub's ResNets.

References: F. Chollet et al., "Keras", 2015-, ``keras/src/applications/resnet.py``; the Keras team,
"KerasHub", 2024-, ``keras_hub/src/models/resnet/resnet_backbone.py``.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.naming.key_map import Rule, Table, to_keys
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "CAFFE",
    "EPSILON",
    "TF",
    "first_version",
    "hub_table",
    "prepared",
    "second_version",
    "table",
    "to_keras",
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


def prepared(
    arrays: Mapping[str, np.ndarray], reversed: bool = True
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts Keras variables: keys by name, biases folded into norms, input channels as RGB.

    Arrays of other files are returned unchanged. ``reversed`` says whether the network's own input
    is BGR, as ``preprocess_input`` gives it.
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
        if reversed and blocks and kernel is not None and kernel.ndim == 4 and kernel.shape[2] == 3:
            named["conv1_conv/kernel"] = kernel[:, :, ::-1]
            notes.append("the stem's input channels were reordered from BGR to RGB")
    folded = [key for key in biases if key not in named]
    if folded:
        notes.append(f"{len(folded)} biases of convolutions were folded into running means")
    return named, notes


def to_keras(leaves: Mapping[str, np.ndarray], config: ResNetConfig) -> dict[str, np.ndarray]:
    """Converts leaves to Keras variables: the inverse of ``prepared``, with biases of 0.

    Returns:
        Arrays by "layer/variable", in the order of the layers in Keras' model.
    """
    keys = ["post_bn/gamma"] if config.preactivation else []
    named = to_keys(table(keys), leaves)
    for key in [key for key in named if key.endswith("_conv/kernel")]:
        # In blocks of the second version, the convolutions before a norm have no bias.
        if not (config.preactivation and re.search("_[12]_conv/", key)):
            channels = named[key].shape[-1]
            named.setdefault(key.replace("kernel", "bias"), np.zeros(channels, np.float32))
    if not config.preactivation and config.in_channels == 3:
        named["conv1_conv/kernel"] = named["conv1_conv/kernel"][:, :, ::-1]
    return {key: named[key] for key in sorted(named, key=_rank)}


_IN_BLOCK = ("preact_bn", "1_conv", "1_bn", "2_conv", "2_bn", "0_conv", "3_conv", "0_bn", "3_bn")
"""The layers of a block as Keras sorts them: by their distance from the output."""


def _rank(key: str) -> tuple[int, ...]:
    layer, variable = key.split("/")
    kind = _VARIABLES[layer.rsplit("_", 1)[-1]]
    if block := re.match(r"conv(\d+)_block(\d+)_", layer):
        place = (int(block[1]), int(block[2]), _IN_BLOCK.index(layer[block.end() :]))
    else:
        ends = ("conv1_conv", "conv1_bn", "post_bn", "predictions")
        place = ((1, 1, 6, 7)[ends.index(layer)], ends.index(layer), 0)
    return (*place, kind.index(variable))


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
