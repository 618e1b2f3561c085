"""Keras models around a ResNet, as files state them.

A user's model has layers before the network (``Rescaling``, ``Normalization``, augmentation) and
behind it. ``around`` says what they do: the preprocessing that they are, and which layer is the
head. ``stated`` compares the network itself with what its weights' names imply. Nothing is run.

References: F. Chollet et al., "Keras", 2015-, ``keras/src/models/functional.py``.
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from flaxtransfer.files import parse_json
from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import shortened
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.readers.array_files import CONFIG, LAYERS

__all__ = ["Around", "around", "head", "split", "stated"]


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
        ValueError: a layer before the network that is more than a scale and an offset.
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
    last = max(n for n in inside if _name(layers[n]) not in _BEHIND)
    before, after = layers[: inside[0]], layers[last + 1 :]
    dense, no_head, notes = _behind(after)
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
        behind = any(len(shape) == 2 and shape[0] != bands for shape in shapes)
        if ((bands,) in shapes and not behind) or any(len(shape) > 2 for shape in shapes):
            raise ValueError(
                f"it has the layer {shortened(name, 60)!r}, and does not say whether it stands "
                "before the network; load the .keras file of the whole model, which does"
            )
    most = re.search(r"^global_max_pooling2d(_\d+)?$", names, re.MULTILINE)
    if not groups and not most:
        return Around()
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


_OF_BLOCKS = (
    "Conv2D",
    "BatchNormalization",
    "Activation",
    "ReLU",
    "Add",
    "MaxPooling2D",
    "ZeroPadding2D",
)


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
    layers = [(_class(layer), layer["config"] | {"name": _name(layer)}) for layer in _flat(graph)]
    names = [fields["name"] for _, fields in layers]
    if "conv1_conv" not in names:
        return config, []
    body = [n for n, name in enumerate(names) if re.match(r"conv\d|pool1|post_", name)]
    inside = layers[names.index("conv1_conv") : body[-1] + 1]
    problems = [text for kind, fields in inside for text in _problem(kind, fields)]
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
    return config, problems


def _problem(kind: str, fields: Mapping[str, Any]) -> list[str]:
    """What a layer of the network's body does that ours do not."""
    name = shortened(fields["name"], 60)
    if kind == "Conv2D" and _most(fields, "dilation_rate") > 1:
        return [f"{name} must have a dilation_rate of 1, got {_most(fields, 'dilation_rate')}"]
    asked = fields.get("activation", "linear")
    if asked != ("relu" if kind == "Activation" else "linear"):
        return [f"{name} must have the activation 'relu', got {shortened(repr(asked), 60)}"]
    slopes = ("max_value", "negative_slope", "threshold")
    if kind == "ReLU" and (own := {n: fields[n] for n in slopes if fields.get(n)}):
        return [f"{name} must be a plain ReLU, got {shortened(repr(own), 60)}"]
    if kind in (*_OF_BLOCKS, "ZeroPadding2D") or _IDLE.fullmatch(kind):
        return []
    return [f"{name}, a {shortened(kind, 60)}, must not stand inside the network"]


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


_BEHIND = ("avg_pool", "max_pool", "predictions")
"""What ``keras.applications`` calls the layers behind the body; a user's may have these names."""


def _behind(layers: list[dict[str, Any]]) -> tuple[str, str, list[str]]:
    """The head among the layers behind the body: its name, what is wrong with it, and notes.

    The name is empty for the network's own head, which is among its arrays, and for none.
    """
    dense: list[str] = []
    others, notes = [], []
    pooled, last = False, "linear"
    for layer in layers:
        kind = _class(layer)
        activation = layer["config"].get("activation", "linear")
        if kind == "GlobalAveragePooling2D" and not dense:
            pooled = True
        elif kind == "Dense" and pooled and activation in ("linear", "softmax", "sigmoid"):
            dense.append(_name(layer))
            last = activation
        elif kind in ("Activation", "Softmax") and dense:
            last = "softmax" if kind == "Softmax" else activation
        elif not (_IDLE.fullmatch(kind) or (kind == "Flatten" and pooled)):
            others.append(_said(layer))
    if others or len(dense) > 1:
        named = shortened(", ".join([*others, *dense]), 150)
        return "", f"the head is not one linear map, but has the layers {named}", []
    if dense and last == "sigmoid":
        notes.append("the head ends in a sigmoid: its outputs are independent, not one of several")
    elif dense and last not in ("linear", "softmax"):
        return "", f"the head ends in {shortened(repr(last), 40)}, which no label is", []
    return ("" if dense in ([], ["predictions"]) else dense[0]), "", notes


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
