"""Key tables of torchvision and timm: ResNets, pre-activation ResNets, fixed stem width, BiT.

In a network with GroupNorm the keys are those of BatchNorms without statistics, but our leaves have
names of their own ("gn1"), because no BatchNorm policy applies to them. timm's plain stem has 64
channels whatever the width of the stages. ``widened`` adds silent channels (zero filters, zero
scales, and zero weights in what follows) to a narrower stem, and ``narrowed`` removes them.
If timm then has a shortcut in the first block and the network has none, the added shortcut passes
the other channels on unchanged. Big Transfer's own files,
``BiT-{S,M}-R{50,101,152}x{1,2,3,4}.npz``, hold the same pre-activation networks, with kernels in
our axis order.

References: R. Wightman, "PyTorch Image Models", 2019-, ``timm/models/resnet.py`` and
``timm/models/resnetv2.py``. A. Kolesnikov et al., "Big Transfer (BiT): General Visual
Representation Learning", 2020.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from flaxtransfer.models.config import BASE_FIELDS, ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES
from flaxtransfer.paths import shortened, visible
from flaxtransfer.weights.naming.key_map import CONV, DENSE, Rule, Table, batch_norm
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "BIT_PREPROCESSING",
    "BIT_TABLE",
    "OWN",
    "PLAIN_TABLE",
    "STEM_WIDTH",
    "TABLE",
    "has_groups",
    "narrowed",
    "of_groups",
    "of_pooled_shortcuts",
    "other_graph",
    "own",
    "pools_shortcuts",
    "table_for",
    "table_of",
    "takes_stem",
    "unnumbered",
    "v2_table_of",
    "widened",
    "with_arguments",
    "with_big_transfer",
    "with_standardized_weights",
]


_BLOCK, _PATH = "layer{s}.{b}", "layer{s}/{b}"

PLAIN_TABLE: Table = (
    # torchvision has no adapters; `fold_adapter` removes a linear one before a file is written.
    Rule("adapter.weight", "params/adapter/kernel", CONV),
    Rule("adapter.curves", "params/adapter/curves"),
    Rule("conv1.weight", "params/conv1/kernel", CONV),
    *batch_norm("bn1", "bn1"),
    Rule("layer{s}.{b}.conv{k}.weight", "params/layer{s}/{b}/conv{k}/kernel", CONV),
    *batch_norm("layer{s}.{b}.bn{k}", "layer{s}/{b}/bn{k}"),
    Rule("layer{s}.{b}.downsample.0.weight", "params/layer{s}/{b}/downsample/0/kernel", CONV),
    *batch_norm("layer{s}.{b}.downsample.1", "layer{s}/{b}/downsample/1"),
    Rule("fc.weight", "params/fc/kernel", DENSE),
    Rule("fc.bias", "params/fc/bias"),
)
"""torchvision's keys, which timm's plain ResNets have too."""

TABLE: Table = (
    *PLAIN_TABLE,
    Rule("conv1.0.weight", "params/conv1/0/kernel", CONV),
    *batch_norm("conv1.1", "conv1/bn1"),
    Rule("conv1.3.weight", "params/conv1/3/kernel", CONV),
    *batch_norm("conv1.4", "conv1/bn4"),
    Rule("conv1.6.weight", "params/conv1/6/kernel", CONV),
    Rule("maxpool.0.weight", "params/maxpool/0/kernel", CONV),
    *batch_norm("maxpool.1", "maxpool/bn1"),
    Rule(f"{_BLOCK}.se.fc{{k}}.weight", f"params/{_PATH}/se/fc{{k}}/kernel", CONV),
    Rule(f"{_BLOCK}.se.fc{{k}}.bias", f"params/{_PATH}/se/fc{{k}}/bias"),
    Rule(f"{_BLOCK}.se.conv.weight", f"params/{_PATH}/se/conv/kernel", (2, 1, 0)),
)


def table_of(keys: Iterable[str]) -> Table:
    """The key map for a file with these keys.

    >>> table_of(["bn1.weight", "bn1.bias"])[3].leaf
    'params/gn1/scale'
    """
    keys = set(keys)
    groups = "bn1.weight" in keys and not any(key.endswith(".running_mean") for key in keys)
    pooled = any(key.endswith(".downsample.2.weight") for key in keys)
    return _variant(TABLE, pooled, groups)


def table_for(config: ResNetConfig) -> Table:
    """The key map for a network; plain networks get torchvision's keys."""
    table = V2_TABLE if config.preactivation else TABLE
    return _variant(table, config.shortcut == "average", config.norm == "group")


def _variant(table: Table, pooled: bool, groups: bool) -> Table:
    table = tuple(map(of_pooled_shortcuts, table)) if pooled else table
    return tuple(map(of_groups, table)) if groups else table


def of_pooled_shortcuts(rule: Rule) -> Rule:
    """The rule for a network with average-pooled shortcuts, whose layers count from 1."""

    def next_number(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) + 1}"

    key, leaf = (re.sub(r"(downsample[./])(\d)", next_number, x) for x in (rule.key, rule.leaf))
    return dataclasses.replace(rule, key=key, leaf=leaf)


def of_groups(rule: Rule) -> Rule:
    """The rule for a network with GroupNorm."""
    leaf = re.sub(r"/bn(\d+|\{k\})/", r"/gn\1/", rule.leaf)
    leaf = re.sub(r"/downsample/(\d)/(scale|bias)", r"/downsample/gn\1/\2", leaf)
    return dataclasses.replace(rule, leaf=leaf)


V2_EPSILON = 1e-8
"""Epsilon of weight standardization in timm's BiT; the original has 1e-10."""

_V2_BLOCK, _V2_PATH = "stages.{s-1}.blocks.{b}", "layer{s}/{b}"

V2_TABLE: Table = (
    Rule("stem.conv.weight", "params/conv1/kernel", CONV),
    Rule("stem.conv.bias", "params/conv1/bias"),  # of Keras' networks in our own files
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


def v2_table_of(keys: Iterable[str], pooled: bool | None = None) -> Table:
    """The key map for a file with these keys.

    Args:
        keys: of the file.
        pooled: whether its shortcuts are average-pooled, which no key shows; None goes by the stem,
            as timm's own networks do: a deep one implies pooled shortcuts.

    >>> v2_table_of(["norm.weight", "norm.bias"])[4].leaf
    'params/conv1/gn1/bias'
    """
    keys = set(keys)
    norms = any(re.search(r"(^|\.)norm\d?\.weight$", key) for key in keys)
    groups = norms and not any(key.endswith(".running_mean") for key in keys)
    return _variant(V2_TABLE, "stem.conv1.weight" in keys if pooled is None else pooled, groups)


def with_big_transfer(config: ResNetConfig) -> ResNetConfig:
    """Sets what timm's pre-activation networks imply; with GroupNorm and a plain stem it is BiT.

    >>> with_big_transfer(ResNetConfig(norm="group")).stem_pool
    'zero-padded'
    """
    config = dataclasses.replace(config, preactivation=True)
    if config.norm == "group" and config.stem == "plain":
        return dataclasses.replace(config, standardized=V2_EPSILON, stem_pool="zero-padded")
    return config


OWN = {False: "flaxtransfer_resnet", True: "flaxtransfer_resnetv2"}
"""The names of networks that exported folders teach timm to build, without and with
pre-activation. The arguments of their functions are the fields of our configuration."""

_FIELDS = {field.name for field in dataclasses.fields(ResNetConfig)} - {
    *("classes", "in_channels"),  # timm has names of its own for these
    # The name says the first; no export has the others.
    *("preactivation", "epsilon", "adapter", "head_reads"),
}


def own(config: Mapping[str, Any]) -> ResNetConfig | None:
    """The network of a ``config.json`` with one of our names for timm; None for others.

    Its classes and bands are those of the default configuration.

    Raises:
        ValueError: fields that are missing, or that do not describe a network.

    >>> own({"architecture": "flaxtransfer_resnet"})
    Traceback (most recent call last):
    ValueError: model_args in config.json must state all fields of flaxtransfer_resnet, got ...
    """
    kinds = {name: preactivation for preactivation, name in OWN.items()}
    name = config.get("architecture")
    if not isinstance(name, str) or name not in kinds:
        return None
    stated = config.get("model_args")
    given = stated.items() if isinstance(stated, Mapping) else ()
    fields = {field: value for field, value in given if field in _FIELDS}
    needed = [field for field in BASE_FIELDS if field in _FIELDS - fields.keys()]
    if needed:
        raise ValueError(
            f"model_args in config.json must state all fields of {name}, got none of "
            f"{', '.join(needed)}"
        )
    try:
        return ResNetConfig.from_json({**fields, "preactivation": kinds[name]})
    except (ValueError, TypeError) as error:
        reason = shortened(visible(error), 300)
        raise ValueError(f"model_args in config.json must describe a {name}: {reason}") from None


_SHOWN = {
    *("num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_block_rate"),
    *("zero_init_last", "block", "layers", "channels", "cardinality", "base_width"),
    *("stem_width", "down_kernel_size", "block_reduce_first", "replace_stem_pool"),
    *("width_factor", "stem_chs", "bottle_ratio", "basic", "rd_ratio", "avg_down"),
}
"""Arguments that the leaves show, or that only training knows."""
_ANTI_ALIAS: dict[str, Literal["average", "blur"]] = {
    **dict.fromkeys(("avg", "avgpool"), "average"),
    **dict.fromkeys(("blur", "blurpool"), "blur"),
}
_GRAPH: dict[str, tuple[Any, ...]] = {
    "act_layer": ("relu",),
    "output_stride": (32,),
    "global_pool": ("avg", "fast", "fastavg", ""),
    "norm_layer": ("batchnorm", "batchnorm2d", "frozenbatchnorm2d", "groupnorm"),
    "aa_layer": (*_ANTI_ALIAS, ""),
    "stem_type": ("deep", "deeptiered", "tiered", "fixed", "deepfixed", ""),
    "attn_layer": ("se", "eca", ""),
}
"""The values that are supported of arguments that no leaf shows."""


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a network in a ``config.json``, nested ones too, without None."""
    given = config.get("model_args")
    ours = _FIELDS if config.get("architecture") in OWN.values() else ()
    stated = {"global_pool": config.get("global_pool")} | (dict(given) if given else {})
    stated = {name: value for name, value in stated.items() if name not in ours}
    for group in ("block_args", "attn_kwargs"):
        inner = stated.pop(group, None)
        stated |= inner if isinstance(inner, Mapping) else {group: inner}
    return {
        name: value.lower().replace("_", "") if isinstance(value, str) else value
        for name, value in stated.items()
        if value is not None
    }


def other_graph(config: Mapping[str, Any], seen: ResNetConfig | None = None) -> list[str]:
    """The arguments in a ``config.json`` that ask for a network that is not supported.

    Args:
        config: the file's content.
        seen: the network of the leaves, for combinations of both; None if it is unclear.

    >>> config = {"architecture": "resnet50", "model_args": {"act_layer": "silu"}}
    >>> other_graph(config, ResNetConfig())
    ["act_layer must be 'relu', got 'silu'"]
    """
    problems = []
    arguments = _arguments(config)
    for name, value in arguments.items():
        if name in _GRAPH and value not in _GRAPH[name]:
            known = " or ".join(repr(each) for each in _GRAPH[name] if each != "")
            problems.append(f"{name} must be {known}, got {value!r}")
        elif name not in _GRAPH and name not in _SHOWN:
            problems.append(f"{name} must not be given, as it is not known here, got {value!r}")
    if seen is None:
        return problems
    if seen.stem_pool == "convolution" and arguments.get("aa_layer"):
        asked = arguments["aa_layer"]
        problems.append(f"aa_layer must not be given with replace_stem_pool, got {asked!r}")
    return problems


def has_groups(config: Mapping[str, Any]) -> bool:
    """Whether the arguments in a ``config.json`` ask for GroupNorms."""
    ours = own(config)
    if ours is not None:
        return ours.norm == "group"
    return _arguments(config).get("norm_layer") == "groupnorm"


def pools_shortcuts(config: Mapping[str, Any]) -> bool | None:
    """Whether the network of a ``config.json`` has average-pooled shortcuts; None if it is unclear.

    >>> pools_shortcuts({"architecture": "resnetv2_50d", "model_args": {"avg_down": False}})
    False
    """
    stated = own(config) or ARCHITECTURES.get(str(config.get("architecture")))
    if stated is None:
        return None
    return bool(_arguments(config).get("avg_down", stated.shortcut == "average"))


def with_arguments(seen: ResNetConfig, config: Mapping[str, Any]) -> ResNetConfig:
    """The configuration with what a ``config.json`` states and no leaf shows.

    >>> with_arguments(ResNetConfig(), {"model_args": {"aa_layer": "blur"}}).anti_alias
    'blur'
    """
    stated = ARCHITECTURES.get(str(config.get("architecture")))
    if seen.preactivation and stated is not None and stated.preactivation:
        padded = stated.stem_pool == "zero-padded"
        kind = _arguments(config).get("stem_type", "fixed" if padded else "")
        seen = dataclasses.replace(
            seen,
            standardized=V2_EPSILON if stated.standardized else None,
            stem_pool="zero-padded" if kind.endswith("fixed") else "max",
        )
    asked = _arguments(config).get("aa_layer")
    if asked is None:
        return seen
    return dataclasses.replace(seen, anti_alias=_ANTI_ALIAS.get(asked))


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


def takes_stem(config: ResNetConfig) -> bool:
    """Whether silent channels can make a stem one that timm's arguments give.

    GroupNorm's groups would be others with silent channels, and a convolution instead of the pool
    would need weights for them. A shortcut behind the stem that timm lacks cannot be added.

    >>> takes_stem(ResNetConfig(width=32)), takes_stem(ResNetConfig(stem_width=80))
    (True, False)
    """
    width = config.stem_channels[-1]
    if config.stem != "plain" or width == STEM_WIDTH:
        return True
    lacks = config.width * config.expansion == STEM_WIDTH
    silent = config.norm == "batch" and config.stem_pool != "convolution"
    return width < STEM_WIDTH and silent and not lacks


def widened(arrays: Mapping[str, np.ndarray], config: ResNetConfig) -> dict[str, np.ndarray]:
    """Adds silent channels to a plain stem with timm's keys, up to timm's stem width.

    Only where ``takes_stem`` says that this is the same network.
    """
    width = config.stem_channels[-1]
    wide = dict(arrays)
    for key, (axis, value) in _of_the_stem(arrays).items():
        pads = [(0, 0)] * arrays[key].ndim
        pads[axis] = (0, STEM_WIDTH - width)
        wide[key] = np.pad(arrays[key], pads, constant_values=value)
    if not config.has_shortcut(1, 0):
        wide |= _passing(width, int(config.shortcut == "average"))
    return wide


def narrowed(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes silent channels: the inverse of ``widened``; other arrays are unchanged.

    Training in timm gives the added channels statistics of their own. They then stay, and the
    network has a stem of timm's width.

    Returns:
        The arrays, and a note if channels were removed.
    """
    keys = _of_the_stem(arrays)
    rows = {key: np.moveaxis(arrays[key], axis, 0) for key, (axis, _) in keys.items()}
    needed = {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"}
    if not needed <= keys.keys() or {len(part) for part in rows.values()} != {STEM_WIDTH}:
        return dict(arrays), []
    loud = np.zeros(STEM_WIDTH, bool)
    for key, part in rows.items():
        loud |= (part != keys[key][1]).reshape(STEM_WIDTH, -1).any(1)
    width = int(np.flatnonzero(loud).max()) + 1 if loud.any() else _width(arrays)
    if width >= STEM_WIDTH:
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
    # `downsample.1.weight` is a kernel after an average-pool, and a scale otherwise.
    return {
        key: (axis, value)
        for key, (axis, value) in _SILENT.items()
        if key in arrays and np.ndim(arrays[key]) == (4 if axis or key == "conv1.weight" else 1)
    }


def _width(arrays: Mapping[str, np.ndarray]) -> int:
    """Planes of the first stage; timm's width for keys of other networks."""
    for key, expansion in (("layer1.0.conv3.weight", 4), ("layer1.0.conv2.weight", 1)):
        if key in arrays and np.ndim(arrays[key]) == 4:
            result: int = arrays[key].shape[0] // expansion
            return result
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


BIT_PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, size=224, resize=256)
"""Pixels from -1 to 1; the size is that of the pre-training."""


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


BIT_TABLE: Table = (
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
    """The arrays without the counters that TensorFlow appends to the names of some layers.

    >>> list(unnumbered({"resnet/block1/unit01/a/standardized_conv2d_3/kernel": 0})[0])
    ['resnet/block1/unit01/a/standardized_conv2d/kernel']
    """
    renamed = {
        re.sub(r"(standardized_conv2d|group_norm)_\d+/", r"\1/", key): array
        for key, array in arrays.items()
    }
    if len(renamed) != len(arrays):
        raise ValueError("two keys become equal after the counters of layers are removed")
    return renamed, []


def with_standardized_weights(config: ResNetConfig) -> ResNetConfig:
    """Sets what all networks of BiT imply and no leaf shows."""
    return dataclasses.replace(
        config, preactivation=True, norm="group", standardized=1e-10, stem_pool="zero-padded"
    )
