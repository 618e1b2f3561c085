"""Keys of ``keras.applications`` and of Keras Hub's ResNets, and the layers around such a network.

A user's model has layers before it (``Rescaling``, ``Normalization``, augmentation) and behind it.
``around`` says what they do: the preprocessing that they are, and which layer is the head.

References: F. Chollet et al., "Keras", 2015-, ``keras/src/applications/resnet.py``; the Keras team,
"KerasHub", 2024-, ``keras_hub/src/models/resnet/resnet_backbone.py``.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from flaxtransfer.files import parse_json
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import shortened
from flaxtransfer.weights.naming.key_map import Rule, Table
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.readers.hdf5_file import CONFIG, LAYERS

__all__ = [
    "CAFFE",
    "TF",
    "Around",
    "around",
    "first_version",
    "head",
    "hub_table",
    "prepared",
    "second_version",
    "split",
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


def prepared(
    arrays: Mapping[str, np.ndarray], outside: "Around | None" = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts Keras variables: keys by name, biases folded into norms, input channels as RGB.

    Arrays of other files are returned unchanged. ``outside`` says whether the network's own input
    is BGR; without it, it is, as ``preprocess_input`` gives it.
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
        turned = outside is None or outside.reversed
        if turned and blocks and kernel is not None and kernel.ndim == 4 and kernel.shape[2] == 3:
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


_LAYER = re.compile(
    r"(conv\d+|stack\d+)(_block\d+)?_\w+|post_(bn|relu)|pool1_\w+|(avg|max)_pool|predictions|probs"
)
"""Names of the layers of a ResNet."""
_KEY = re.compile(r"((conv\d+|stack\d+)(_block\d+)?_\w+|post_bn|predictions)/\w+")


def split(keys: Collection[str]) -> tuple[dict[str, str], dict[str, str]] | None:
    """The keys of a ResNet in a Keras file and those of the layers around it; None without one.

    >>> split(["conv1_conv/0", "dense/0"])
    ({'conv1_conv/0': 'conv1_conv/0'}, {'dense/0': 'dense/0'})
    """
    if not any(key.startswith("conv1_conv/") for key in keys):
        return None
    body = {key: key for key in keys if _KEY.fullmatch(key)}
    return body, {key: key for key in keys if key not in body}


@dataclasses.dataclass(frozen=True)
class Around:
    """What the layers around a network do.

    Args:
        dense: name of the linear layer that is the head; "" for the network's own, or none.
        no_head: why the layers behind the network are not one linear map; "" if they are.
        preprocessing: what the layers before the network do to pixels; None if nothing.
        reversed: whether the network's own input has its channels as BGR.
        notes: on layers that were left out.
    """

    dense: str = ""
    no_head: str = ""
    preprocessing: Preprocessing | None = None
    reversed: bool = True
    notes: tuple[str, ...] = ()


_IDLE = re.compile(
    r"InputLayer|Identity|Random(?!Crop)\w+|RandAugment|AugMix|MixUp|CutMix|AutoContrast|Equalization"
    r"|(Gaussian|Spatial|Alpha)?(Dropout|Noise)(2D)?|ActivityRegularization"
)
"""Classes of layers that do nothing when a network is used."""


def around(
    metadata: Mapping[str, str], arrays: Mapping[str, np.ndarray], beside: Mapping[str, np.ndarray]
) -> Around | None:
    """Reads the layers around a Keras network; None for other files.

    Args:
        metadata: of the file; the configuration of the model, where it has one.
        arrays: of the network, by the file's keys.
        beside: of the layers around it.

    Raises:
        ValueError: a layer before the network that is more than a scale and an offset, or a
            network with other strides, dilations or activations.
    """
    kernel = next((arrays[key] for key in arrays if key.startswith("conv1_conv/")), None)
    if kernel is None:
        return None
    if np.ndim(kernel) != 4:  # a bias, or damage, that the comparison of shapes reports
        kernel = next((a for a in arrays.values() if np.ndim(a) == 4), np.zeros((1, 1, 3, 1)))
    bands = kernel.shape[2]
    try:
        with np.errstate(all="ignore"):
            found = _configured(metadata[CONFIG], bands, beside) if CONFIG in metadata else None
    except (TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        reason = shortened(str(error), 100)
        raise ValueError(f"the configuration of the model in it is damaged: {reason}") from error
    return found or _unconfigured(metadata.get(LAYERS, ""), beside, bands)


def _configured(text: str, bands: int, beside: Mapping[str, np.ndarray]) -> Around | None:
    """The layers around the network of a configuration; None if no network is in it."""
    layers = list(_flat(parse_json(text.encode(), "the model's configuration")))
    inside = [n for n, layer in enumerate(layers) if _LAYER.fullmatch(_name(layer))]
    if not any(_name(layers[n]) == "conv1_conv" for n in inside):
        return None
    _check_body(layers[inside[0] : inside[-1] + 1])
    before, after = layers[: inside[0]], layers[inside[-1] :]
    own = any(_name(layers[n]) == "predictions" for n in inside)
    dense, no_head, notes = _behind(after, own)
    return _before(before, bands, beside, Around(dense, no_head, notes=tuple(notes)))


def _unconfigured(names: str, beside: Mapping[str, np.ndarray], bands: int) -> Around:
    """The layers of a file that says no more than names and arrays."""
    if acts := re.search(r"^(rescaling|normalization|lambda)(_\d+)?$", names, re.MULTILINE):
        raise ValueError(
            f"it does not say what the layer {acts[0]!r} does to pixels before the network; load "
            "the .keras file of the whole model, which does"
        )
    groups: dict[str, list[tuple[int, ...]]] = {}
    for key, array in beside.items():
        groups.setdefault(key.rpartition("/")[0], []).append(np.shape(array))
    for name, shapes in groups.items():
        if (bands,) in shapes or any(len(shape) > 2 for shape in shapes):
            raise ValueError(
                f"it has the layer {shortened(name, 60)!r}, and does not say whether it stands "
                "before the network; load the .keras file of the whole model, which does"
            )
    if not groups:
        return Around()
    most = re.search(r"^global_max_pooling2d(_\d+)?$", names, re.MULTILINE)
    linear = [name for name, shapes in groups.items() if sorted(map(len, shapes)) in ([2], [1, 2])]
    if len(groups) == len(linear) == 1 and not most:
        return Around(linear[0])
    named = shortened(", ".join([*([most[0]] if most else []), *sorted(groups)]), 150)
    return Around(no_head=f"the head is not one linear map, but has the layers {named}")


def _flat(model: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The layers of a model, those of models in it in their place."""
    config = model.get("config") if isinstance(model, dict) else None
    layers = config.get("layers") if isinstance(config, dict) else config
    for layer in layers if isinstance(layers, list) and depth < _DEEPEST else ():
        if not isinstance(layer, dict) or not isinstance(layer.get("config"), dict):
            continue
        inner = list(_flat(layer, depth + 1))
        yield from inner or [layer]


_DEEPEST, _MOST_PIXELS = 8, 1 << 16


def _name(layer: dict[str, Any]) -> str:
    return str(layer["config"].get("name") or layer.get("name") or "")


def _class(layer: dict[str, Any]) -> str:
    return str(layer.get("class_name", "")).rpartition(">")[2]


def _said(layer: dict[str, Any]) -> str:
    return f"{shortened(_name(layer), 40)!r} ({shortened(_class(layer), 40)})"


def _check_body(layers: list[dict[str, Any]]) -> None:
    """Refuses strides, dilations, activations and layers that a ResNet of Keras has not."""
    preactivation = any(_name(layer) == "post_bn" for layer in layers)
    halving = r"conv[2-5]_block\d+_2_conv" if preactivation else r"conv[3-5]_block1_[01]_conv"
    for layer in layers:
        config, name = layer["config"], _name(layer)
        wrong = ""
        pool = _class(layer) == "MaxPooling2D" and set(np.ravel(config.get("pool_size"))) == {1}
        if not (_LAYER.fullmatch(name) or pool or _IDLE.fullmatch(_class(layer))):
            wrong = f"a {shortened(_class(layer), 40)} must not stand inside the network"
        if _class(layer) == "Activation" and config.get("activation") != "relu":
            wrong = (
                f"activation must be 'relu', got {shortened(repr(config.get('activation')), 40)}"
            )
        if _class(layer) == "Conv2D":
            strides, dilation = (
                np.ravel(config.get(field, 1)).tolist() for field in ("strides", "dilation_rate")
            )
            if set(dilation) != {1}:
                wrong = f"dilation_rate must be 1, got {shortened(str(dilation), 40)}"
            elif set(strides) != {1} and not re.fullmatch(f"conv1_conv|{halving}", name):
                wrong = f"strides must be 1, got {shortened(str(strides), 40)}"
        if wrong:
            raise ValueError(f"its layer {shortened(name, 60)!r} is another one: {wrong}")


def _behind(layers: list[dict[str, Any]], own_head: bool) -> tuple[str, str, list[str]]:
    """The head among the layers from the last of the network on: its name, what is wrong, notes."""
    dense: list[str] = []
    others, notes = [], []
    pooled, last = own_head, "linear"
    for layer in layers:
        kind = _class(layer)
        activation = layer["config"].get("activation", "linear")
        if _LAYER.fullmatch(_name(layer)) and _name(layer) not in ("avg_pool", "max_pool"):
            continue
        if kind == "GlobalAveragePooling2D" and not dense:
            pooled = True
        elif kind == "Dense" and pooled and activation in ("linear", "softmax", "sigmoid"):
            dense.append(_name(layer))
            last = activation
        elif kind in ("Activation", "Softmax") and dense:
            last = "softmax" if kind == "Softmax" else activation
        elif not (_IDLE.fullmatch(kind) or (kind == "Flatten" and pooled)):
            others.append(_said(layer))
    if others or len(dense) + own_head > 1:
        named = shortened(", ".join([*others, *dense, *["predictions"] * own_head]), 150)
        return "", f"the head is not one linear map, but has the layers {named}", []
    if dense and last == "sigmoid":
        notes.append("the head ends in a sigmoid: its outputs are independent, not one of several")
    elif dense and last not in ("linear", "softmax"):
        return "", f"the head ends in {shortened(repr(last), 40)}, which no label is", []
    return (dense[0] if dense else ""), "", notes


_SCALES = {
    **dict.fromkeys(("TrueDivide", "Divide", "math.truediv", "math.divide"), "/"),
    **dict.fromkeys(("Multiply", "math.multiply"), "*"),
    **dict.fromkeys(("Subtract", "math.subtract"), "-"),
    **dict.fromkeys(("Add", "math.add", "nn.bias_add"), "+"),
}
"""Operations on pixels and a constant, in Keras 3 and in TensorFlow."""


def _before(
    layers: list[dict[str, Any]], bands: int, beside: Mapping[str, np.ndarray], found: Around
) -> Around:
    """Adds what the layers before the network do to pixels from 0 to 255."""
    scale, offset, size = np.ones(bands), np.zeros(bands), 0
    turned, acts, notes, idle = False, False, list(found.notes), []
    picked: list[Any] = []
    for layer in layers:
        kind, config = _class(layer), layer["config"]
        if kind == "TFOpLambda":
            kind = str(config.get("function"))
        if kind == "InputLayer":
            shape = config.get("batch_shape") or config.get("batch_input_shape") or ()
            sides = {n for n in list(shape)[1:3] if type(n) is int and 0 < n < _MOST_PIXELS}
            size = sides.pop() if len(sides) == 1 and not size else size
            continue
        if len(set(_sources(layer.get("inbound_nodes")))) > 1 and kind != "Stack":
            raise ValueError(f"the layer {_said(layer)} before the network has several inputs")
        if _IDLE.fullmatch(kind):
            idle.append(_name(layer))
            continue
        if kind in ("Resizing", "CenterCrop"):
            height, width = config.get("height"), config.get("width")
            if type(height) is not int or height != width or not 0 < height < _MOST_PIXELS:
                raise ValueError(
                    f"the layer {_said(layer)} must make squares, got "
                    f"{shortened(f'{height} x {width}', 40)}"
                )
            size = height
            if kind == "Resizing" and not config.get("crop_to_aspect_ratio"):
                notes.append("the model's warp to a square is replaced by a center crop")
            continue
        acts = True
        if kind in _SCALES:
            number = _constant(layer, bands)
            if kind in ("math.truediv", "math.divide") or _SCALES[kind] == "/":
                scale, offset = scale / number, offset / number
            elif _SCALES[kind] == "*":
                scale, offset = scale * number, offset * number
            else:
                offset = offset - number if _SCALES[kind] == "-" else offset + number
        elif kind == "Rescaling":
            by, plus = (_numbers(config.get(n), bands) for n in ("scale", "offset"))
            scale, offset = scale * by, offset * by + plus
        elif kind == "Normalization" and not config.get("invert"):
            mean, variance = (
                _numbers(_variable(layer, n, beside), bands) for n in ("mean", "variance")
            )
            deviation = np.maximum(np.sqrt(variance), 1e-7)
            scale, offset = scale / deviation, (offset - mean) / deviation
        elif kind == "GetItem":
            picked.append(_arguments(layer)[-1:])
            continue
        elif kind == "Stack" and bands == 3 and [_index(each) for each in picked] == [2, 1, 0]:
            turned, picked = not turned, []
            scale, offset = scale[::-1], offset[::-1]
        else:
            raise ValueError(
                f"the layer {_said(layer)} before the network must be Rescaling or Normalization, "
                "arithmetic with constants, or augmentation; save the network behind it alone "
                "(save_weights), and give it the preprocessing of your images"
            )
    if picked:
        raise ValueError("the model picks channels of its input, which is not supported")
    if idle:
        notes.append(f"augmentation in the model was left out: {shortened(', '.join(idle), 100)}")
    if not acts:
        return dataclasses.replace(found, notes=tuple(notes))
    if not (np.isfinite(scale).all() and (scale > 0).all() and np.isfinite(offset).all()):
        raise ValueError("the layers before the network must scale pixels by more than 0")
    if turned:
        scale, offset = scale[::-1], offset[::-1]
    preprocessing = Preprocessing(
        tuple(-offset / scale / 255), tuple(1 / scale / 255), size or 224, size or 224
    )
    return dataclasses.replace(
        found, preprocessing=preprocessing, reversed=turned, notes=tuple(notes)
    )


def _sources(nodes: Any) -> Iterator[str]:
    """The names of the layers whose outputs a layer takes, in either form of Keras' files."""
    if isinstance(nodes, dict):
        history = nodes.get("keras_history")
        if isinstance(history, list) and history:
            yield str(history[0])
            return
        nodes = [value for key, value in nodes.items() if key != "kwargs"]
    if isinstance(nodes, list):
        if len(nodes) > 2 and isinstance(nodes[0], str) and type(nodes[1]) is int:
            yield nodes[0]
            return
        for node in nodes:
            yield from _sources(node)


def _arguments(layer: dict[str, Any]) -> list[Any]:
    """What a layer of Keras 3 is called with."""
    nodes = layer.get("inbound_nodes")
    first = nodes[0] if isinstance(nodes, list) and nodes else None
    args = first.get("args") if isinstance(first, dict) else None
    return args if isinstance(args, list) else []


def _index(given: list[Any]) -> int | None:
    """The channel that is picked by ``x[..., n]``."""
    where = given[0] if given else None
    if not isinstance(where, list) or len(where) != 2 or type(where[1]) is not int:
        return None
    return where[1]


def _constant(layer: dict[str, Any], bands: int) -> np.ndarray:
    """The number, or one per channel, that an operation takes beside pixels."""
    args = _arguments(layer)
    if len(args) == 2:
        return _numbers(args[1], bands)
    nodes = layer.get("inbound_nodes")
    if isinstance(nodes, list) and nodes and isinstance(nodes[0], list):
        last = nodes[0][-1]
        if isinstance(last, dict):
            return _numbers(last.get("y", last.get("bias")), bands)
    raise ValueError(f"the layer {_said(layer)} before the network has no constant")


def _numbers(value: Any, bands: int) -> np.ndarray:
    if isinstance(value, dict):  # a tensor or an array
        config = value.get("config")
        value = config.get("value") if isinstance(config, dict) else None
    try:
        flat = np.ravel(np.asarray(value, np.float64))
    except (TypeError, ValueError):
        flat = np.zeros(0)
    if flat.size not in (1, bands):
        raise ValueError(
            f"the layers before the network must have one number, or {bands}, got "
            f"{shortened(repr(value), 60)}"
        )
    return np.broadcast_to(flat, (bands,))


def _variable(layer: dict[str, Any], name: str, beside: Mapping[str, np.ndarray]) -> Any:
    """The mean or variance of a Normalization: given, or measured and stored."""
    given = layer["config"].get(name)
    if given is not None:
        return given
    number = ("mean", "variance").index(name)
    stored = (beside.get(f"{_name(layer)}/{key}") for key in (name, number))
    return next((array for array in stored if array is not None), None)


def head(
    beside: Mapping[str, np.ndarray], name: str, features: int
) -> tuple[np.ndarray, np.ndarray] | str:
    """Kernel and bias of the linear layer of this name, or why it is no head.

    >>> kernel, bias = head({"dense/kernel": np.ones((8, 3))}, "dense", 8)
    >>> kernel.shape, bias.tolist()
    ((8, 3), [0.0, 0.0, 0.0])
    """
    stored = {key.rpartition("/")[2]: a for key, a in beside.items() if key.startswith(f"{name}/")}
    kernel = stored.get("kernel", stored.get("0"))
    bias = stored.get("bias", stored.get("1"))
    if kernel is None or kernel.ndim != 2 or kernel.shape[0] != features:
        got = "none" if kernel is None else list(kernel.shape)
        return f"the kernel of {name!r} must be [{features}, classes], got {got}"
    if bias is None:
        bias = np.zeros(kernel.shape[1], np.float32)
    if bias.shape != kernel.shape[1:]:
        return f"the bias of {name!r} must be [{kernel.shape[1]}], got {list(bias.shape)}"
    return kernel, bias
