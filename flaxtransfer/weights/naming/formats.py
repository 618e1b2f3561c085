"""Weight formats: one table row per naming, and the properties that a table cannot state.

A user's head has any name and any number of layers. ``with_head`` gives it the name of the format
where it is one linear map, and leaves it out elsewhere.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import shortened
from flaxtransfer.weights.naming import (
    huggingface,
    keras,
    keras_model,
    key_map,
    native,
    onnx,
    timm,
)
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["FORMATS", "Format", "Head", "detect_naming", "with_head"]


Arrays = Mapping[str, np.ndarray]


def _unchanged(arrays: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    return dict(arrays), []


@dataclasses.dataclass(frozen=True)
class Format:
    """The file format of one project.

    Args:
        table: returns the key map for a file with these keys.
        prepare: returns the file's arrays with the keys of the table, and notes on changes
            (training state omitted, biases folded). It also runs for files of other formats, and
            must return them unchanged.
        implied: sets the fields of the configuration that the format implies and no leaf shows.
        preprocessing: of a network if none is recorded; None if ImageNet's is assumed.
        variants: whether its files have networks that differ in what no leaf shows.
    """

    table: Callable[[Collection[str]], key_map.Table]
    prepare: Callable[[Arrays], tuple[dict[str, np.ndarray], list[str]]] = _unchanged
    implied: Callable[[ResNetConfig], ResNetConfig] = lambda config: config
    preprocessing: Callable[[ResNetConfig], Preprocessing | None] = lambda config: None
    variants: bool = False


FORMATS: dict[str, Format] = {
    "torchvision": Format(lambda keys: timm.PLAIN_TABLE, prepare=timm.narrowed, variants=True),
    "timm": Format(timm.table_of, prepare=timm.narrowed, variants=True),
    "timm-v2": Format(timm.v2_table_of, implied=timm.with_big_transfer, variants=True),
    "huggingface": Format(lambda keys: huggingface.TABLE, variants=True),
    "huggingface-flax": Format(
        lambda keys: huggingface.FLAX, prepare=huggingface.in_flax, variants=True
    ),
    "bit": Format(
        lambda keys: timm.BIT_TABLE,
        prepare=timm.unnumbered,
        implied=timm.with_standardized_weights,
        preprocessing=lambda config: timm.BIT_PREPROCESSING,
    ),
    "keras": Format(
        keras.table,
        prepare=keras.prepared,
        implied=keras.first_version,
        preprocessing=lambda config: keras.TF if config.preactivation else keras.CAFFE,
    ),
    "keras-hub": Format(keras.hub_table, prepare=keras.prepared),
    "flaxtransfer": Format(lambda keys: native.TABLE, prepare=native.prepared),
    "onnx": Format(lambda keys: onnx.TABLE),
}


def detect_naming(arrays: Arrays) -> str:
    """The format that matches most keys; the first of equal ones."""
    # Torch's counters are nobody's leaves, and no format adds keys to those of a file of another.
    most = sum(not key.endswith(".num_batches_tracked") for key in arrays)
    best, score = "", -2
    for name, format in FORMATS.items():
        if (matches := _matches(format, arrays)) > score:
            best, score = name, matches
        if score == most:
            break
    return best


def _matches(format: Format, arrays: Arrays) -> int:
    try:
        prepared, _ = format.prepare(arrays)
    except ValueError:
        return -1
    table = format.table(prepared)
    found = (key_map.leaf_of(table, key, array.shape) for key, array in prepared.items())
    leaves = {leaf for leaf, _ in filter(None, found)}
    # A scale without statistics belongs to a GroupNorm, whatever its key.
    lonely = [leaf for leaf in leaves if _statistic_of(leaf) not in {None, *leaves}]
    return len(leaves) - len(lonely)


def _statistic_of(leaf: str) -> str | None:
    """The mean that belongs to a BatchNorm's scale; None for other leaves."""
    if not leaf.endswith("/scale") or "/gn" in leaf:
        return None
    return leaf.replace("params/", "batch_stats/").removesuffix("scale") + "mean"


_HEAD = re.compile(
    r"(?i)(\w+_)?(fc|head|heads|classifier|cls|linear|logits?|out|output|dense|top|mlp|"
    r"projector|projection|predictor|prototypes)\d*(_\w+)?"
)
_PROJECTION = re.compile(
    r"(?i)(.*_)?(projector|projection|predictor|prototypes|contrastive|decoders?|decode|"
    r"segmentation|segm?|semantic|masks?|depth|heatmaps?|keypoints?|bbox|rpn|roi|aux|auxiliary)"
    r"\d*(_.*)?"
)
"""Layers beside a network that lead to no class: projections, decoders, heads for each pixel."""
_BETWEEN = re.compile(r"(?i)(.*_)?(proj|embeddings?|neck|fpn|laterals?|upsample)\d*(_.*)?")
"""Layers that others may follow: no classifier by themselves, and none behind them is linear."""
_NO_LAYER = re.compile(
    r"(?i)(.*_)?(loss|criterion|metrics?|mean|std|n_averaged|queue)(_.*)?\d*|ema_.*"
)
"""Measures, buffers, and the plain weights that mmcv's hook for averages keeps beside them."""


@dataclasses.dataclass(frozen=True)
class Head:
    """The arrays of a file with its head under the format's keys, or without one.

    Args:
        arrays: of the network, by key.
        missing: why there is no head; "" if there is one.
        notes: where the head was found, and what was left out.
    """

    arrays: Mapping[str, np.ndarray]
    missing: str
    notes: tuple[str, ...]


def with_head(
    table: key_map.Table,
    arrays: Arrays,
    beside: Arrays,
    features: int,
    place: Collection[str] = (),
    outside: keras_model.Around | None = None,
) -> Head:
    """Finds the head: the only layer that is no part of the body, if it is one linear map.

    Dropout has no arrays and does nothing at inference, so ``fc.1`` behind it is a linear map. A
    head that is left out stops no load.

    Args:
        table: the naming of the body.
        arrays: of the network; groups that are neither body nor head stay, to be refused by name.
        beside: arrays around the network, as of ``self.backbone = resnet50()``.
        features: inputs of a linear head.
        place: names that lead to the network; some say that no classifier follows.
        outside: what the layers around a Keras network are.

    >>> from flaxtransfer.weights.naming import timm
    >>> head = with_head(timm.PLAIN_TABLE, {"fc.1.weight": np.ones((3, 8))}, {}, 8)
    >>> [(key, array.shape) for key, array in head.arrays.items()], head.notes[0]
    ([('fc.weight', (3, 8)), ('fc.bias', (3,))], "the head is the linear layer 'fc.1'")
    """
    rules = {rule.leaf: rule for rule in table if rule.leaf.startswith("params/fc/")}
    kernel, bias = rules["params/fc/kernel"], rules["params/fc/bias"]
    if "/" in kernel.key:
        # These projects' own names; a user's layers stand only around a Keras network.
        has_head = any(rule.key in arrays for rule in (kernel, bias))
        named = outside.dense if outside else ""
        missing = outside.no_head if outside else ""
        if not named and not missing:
            return Head(arrays, "" if has_head else _NONE, ())
        left = {key: a for key, a in arrays.items() if key not in (kernel.key, bias.key)}
        layer = keras_model.head(beside, named, features) if named else missing
        if isinstance(layer, str):
            parts = {
                key.rpartition("/")[0] for key in (*beside, *([kernel.key] if has_head else []))
            }
            text = shortened(", ".join(sorted(parts)), 200)
            return Head(left, layer, (f"left out: {text}",) if parts else ())
        note = f"the head is the linear layer {named!r}"
        return Head(left | dict(zip((kernel.key, bias.key), layer, strict=True)), "", (note,))
    body = {
        key
        for key, array in arrays.items()
        if (found := key_map.leaf_of(table, key, array.shape)) and "/fc/" not in found[0]
    }
    rooms = {key.split(".")[0] for key in body}
    inside = _groups({k: a for k, a in arrays.items() if k.split(".")[0] not in rooms})
    inside = {name: group for name, group in inside.items() if _excused(name, group, features)}
    others = _groups(beside)
    kept = {key: a for key, a in arrays.items() if key.split(".")[0] not in inside}
    groups = [*inside.items(), *others.items()]
    layers = [
        (name, group)
        for name, group in groups
        if not any(names.fullmatch(name) for names in (_PROJECTION, _NO_LAYER))
        and not (name in group and np.ndim(group[name]) == 0)  # a counter of a wrapper
    ]
    missing, notes = _NONE, []
    named = shortened(", ".join(sorted({name for name, _ in layers})), 150)
    if layers and not native.SELF_SUPERVISED.isdisjoint(place):
        missing = f"{named} follows an encoder of self-supervised training and is no classifier"
    elif len(layers) == 1 and _leads_on(*layers[0]):
        missing = f"{_NONE}, and {named} is called like no classifier"
    elif len(layers) > 1:
        missing = f"the head is not one linear map, but has the parts {named}"
    elif layers:
        ((_, group),) = layers
        linear = _linear(group, features)
        if isinstance(linear, str):
            missing = f"the head {named} is not one linear map: {linear}"
        else:
            module, weight, added = linear
            missing = ""
            kept[kernel.key] = kernel.to_key(weight.T)
            kept[bias.key] = np.zeros(len(weight), np.float32) if added is None else added
            if f"{module}.weight" != kernel.key:
                notes.append(f"the head is the linear layer {module!r}")
            if added is None:
                notes.append("the head has no bias: zeros replace it")
    used = [] if missing else [group for _, group in layers]
    left_out = sorted({name for name, group in groups if not any(group is u for u in used)})
    if left_out:
        notes.append(f"left out: {shortened(', '.join(left_out), 200)}")
    return Head(kept, missing, tuple(notes))


_NONE = "the file has no head"


def _leads_on(name: str, group: Arrays) -> bool:
    """Whether a layer is no classifier by its name; a convolution is one by its name alone."""
    convolves = any(np.ndim(array) == 4 for array in group.values())
    return bool(_BETWEEN.fullmatch(name)) or (convolves and not _HEAD.fullmatch(name))


def _groups(arrays: Arrays) -> dict[str, dict[str, np.ndarray]]:
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        groups.setdefault(key.split(".")[0], {})[key] = array
    return groups


def _excused(name: str, group: Arrays, features: int) -> bool:
    """Whether layers beside the body take its features, or are called like what follows a body."""
    takes = any(key.endswith(".weight") and a.shape[1:] == (features,) for key, a in group.items())
    return takes or any(
        names.fullmatch(name) for names in (_HEAD, _PROJECTION, _BETWEEN, _NO_LAYER)
    )


def _linear(group: Arrays, features: int) -> tuple[str, np.ndarray, np.ndarray | None] | str:
    """Name, kernel and bias of the only linear layer of a group, or why it is none."""
    modules = sorted({key.rpartition(".")[0] for key in group})
    if len(modules) > 1:
        return f"it has the layers {shortened(', '.join(modules), 100)}"
    (module,) = modules
    weight, bias = group.get(f"{module}.weight"), group.get(f"{module}.bias")
    others = [key for key in group if key not in (f"{module}.weight", f"{module}.bias")]
    if weight is None or others:
        return f"it has {shortened(', '.join(sorted(others or group)), 100)}"
    # A convolution of 1x1 pixels and the average over pixels can change places.
    if weight.ndim < 2 or weight.shape[1:] not in ((features,), (features, 1, 1)):
        return f"{module}.weight must be [classes, {features}], got {list(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"{module}.bias must be {list(weight.shape[:1])}, got {list(bias.shape)}"
    return module, weight.reshape(weight.shape[:2]), bias
