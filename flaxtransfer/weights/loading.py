"""Load pre-trained weights strictly: every key used or excused, every leaf filled.

What belongs to the weights of a file, from wherever it is recorded.

From a file to a `Checkpoint`: every key used or excused, every leaf filled, or an error.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flaxtransfer.models.config import PLAIN, ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES
from flaxtransfer.paths import suggest, unflatten
from flaxtransfer.weights import locations, pretrained, sidecar
from flaxtransfer.weights.infer import UNSEEN, infer, leaf_shapes, with_unseen
from flaxtransfer.weights.naming import huggingface, key_map, torchgeo, torchvision
from flaxtransfer.weights.naming.formats import FORMATS, detect_naming
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.readers import detect, flax_file
from flaxtransfer.weights.readers.detect import Tensors

__all__ = ["Companions", "companions", "load"]


@dataclasses.dataclass(frozen=True)
class Companions:
    """Preprocessing and class names, where they come from, and the network, which a header may
    know more of than its leaves show: the span of an adapter's curves.
    """

    config: ResNetConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]


def companions(
    file: Tensors,
    config: ResNetConfig,
    format: str,
    *,
    headless: bool = False,
    sensor: str | None = None,
    source: str = "",
) -> Companions:
    """The most trustworthy record wins: what the caller says, the header, files beside, published
    name, ImageNet's default.

    Args:
        file: the weights' file.
        config: the network that it holds.
        format: the naming of the file.
        headless: whether the file has no head, to which names of classes could belong.
        sensor: a name in `torchgeo.SENSORS`; None where the caller says none.
        source: where the file came from, whose name may be a published one.

    Raises:
        ValueError: a record that contradicts the weights or cannot be read.
    """
    asked = None if sensor is None else _of_sensor(sensor, config, file)
    own = pretrained.read_header(file.metadata)
    if own is not None:
        # Some of a network shows in no leaf: the span of an adapter's curves, anti-aliasing.
        if leaf_shapes(own.config) != leaf_shapes(config):
            raise ValueError(
                f"{file.path} says in its header that it is {own.config} and holds {config}"
            )
        recorded = (own.preprocessing, ["preprocessing: from the file's header"])
        preprocessing, notes = asked or recorded
        return Companions(own.config, preprocessing, own.class_names, tuple(notes))
    beside = file.path.with_name("config.json")
    settings = sidecar.read_json(beside)
    if format.startswith("huggingface"):
        problems = huggingface.other_graph(settings)
        if problems:
            raise ValueError(f"{beside} describes another network: {'; '.join(problems)}")
        names = sidecar.hf_class_names(settings)
    else:
        names = sidecar.timm_class_names(settings)
    if names is None and torchvision.is_published(file.path.name):
        names = torchvision.CLASS_NAMES
    if headless:
        names = None
    if names is not None and len(names) != config.classes:
        raise ValueError(
            f"{beside} names {len(names)} classes and the head of {file.path} has {config.classes}"
        )
    found, notes = asked or _preprocessing(file, settings, config, source)
    usual = FORMATS[format].preprocessing(config)
    if found is None and usual is not None and len(usual.mean) == config.bands:
        found, notes = usual, [f"preprocessing: none is recorded, that of {format} is assumed"]
    preprocessing, notes = _fitted(found, notes, config, file)
    return Companions(config, preprocessing, names, tuple(notes))


def _of_sensor(sensor: str, config: ResNetConfig, file: Tensors) -> tuple[Preprocessing, list[str]]:
    try:
        found = torchgeo.check(sensor, config.bands)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return found, [f"preprocessing: that of {sensor}, as asked for; {torchgeo.note(sensor)}"]


def _preprocessing(
    file: Tensors, settings: dict, config: ResNetConfig, source: str
) -> tuple[Preprocessing | None, list[str]]:
    timm = sidecar.timm_preprocessing(settings)
    if timm is not None:
        return timm[0], ["preprocessing: from config.json beside the file", *timm[1]]
    processor = file.path.with_name("preprocessor_config.json")
    other = sidecar.hf_preprocessing(sidecar.read_json(processor))
    if other is not None:
        return other[0], [f"preprocessing: from {processor.name} beside the file", *other[1]]
    if torchvision.is_published(file.path.name):
        return torchvision.PREPROCESSING, [
            "preprocessing: that of torchxrayvision's file of this name; each output is a finding "
            "of its own, with a sigmoid and no softmax"
        ]
    sensor = torchgeo.published(file.path.name, source)
    if sensor is not None:
        try:
            of_sensor = torchgeo.check(sensor, config.bands)
        except ValueError as error:
            raise ValueError(
                f"{file.path} has the name of torchgeo's weights, and other bands: {error}; say "
                "which it is by sensor=, or rename the file"
            ) from None
        return of_sensor, [f"preprocessing: that of torchgeo's {sensor}; {torchgeo.note(sensor)}"]
    published = torchvision.published(file.path.name, file.sha256)
    if published is not None:
        return published, ["preprocessing: that of the file torchvision publishes by this name"]
    return None, []


def _sensors(channels: int) -> str:
    fitting = [name for name, found in torchgeo.SENSORS.items() if len(found.bands) == channels]
    return f"; sensor= knows {', '.join(fitting)}" if fitting else ""


def _fitted(
    preprocessing: Preprocessing | None, notes: list[str], config: ResNetConfig, file: Tensors
) -> tuple[Preprocessing, list[str]]:
    """One mean and std for each channel of the network."""
    channels = config.bands
    if preprocessing is None and channels == len(IMAGENET.mean):
        return IMAGENET, ["preprocessing: none is recorded, ImageNet's is assumed"]
    if preprocessing is None:
        # A guess at the statistics of bands that nobody described would be a silent error.
        assumed = dataclasses.replace(IMAGENET, mean=(0.0,) * channels, std=(1.0,) * channels)
        return assumed, [
            f"preprocessing: none is recorded for {channels} channels, which are left in 0..1"
            + _sensors(channels)
        ]
    if len(preprocessing.mean) == 1:
        preprocessing = dataclasses.replace(
            preprocessing, mean=preprocessing.mean * channels, std=preprocessing.std * channels
        )
    if len(preprocessing.mean) != channels:
        raise ValueError(
            f"the preprocessing beside {file.path} has {len(preprocessing.mean)} channels, and the "
            f"network {channels}"
        )
    return preprocessing, notes


# What keys of networks that are near a ResNet, and are none of ours, look like.
_RELATIVES = {
    r"features\.denseblock.*": "a DenseNet",
}


def load(
    source: str | os.PathLike[str],
    *,
    model: str | ResNetConfig | None = None,
    format: str | None = None,
    sensor: str | None = None,
) -> Pretrained:
    """A pre-trained ResNet from a file, complete or not at all.

    The naming, and from it the network, are read off the keys and shapes; the preprocessing comes
    from the file's header, from `config.json` or `preprocessor_config.json` beside it, or from
    the name that torchvision, torchgeo or torchxrayvision gave the file, and is ImageNet's first
    recipe otherwise; `notes` of the result say which. Nothing in the file is run. A file without
    a head, as self-supervised training leaves it, gets one output that is always 0, for a new
    head to take its place.

    Args:
        source: a file of safetensors, of `torch.save` (no torch is needed), of flax's msgpack,
            BiT's `.npz`, or Keras' `.h5` or `.keras` (needs the extra `keras`); its content says
            which, whatever it is called. Or a folder with one, or a folder that orbax wrote of
            {"params": ..., "batch_stats": ...}, which a step of a run is too;
            `hf://organization/name[@revision][:file]`, which fetches it and what lies beside it
            into the hub's cache; `https://.../name-<first digits of sha256>.pth`, which is
            checked by its name; or "builtin", or "builtin:<name>".
        model: what you expect it to be, "resnet50" or a config; classes and image channels are
            the file's own. Names in `catalog.ARCHITECTURES`. It also says what no leaf shows:
            anti-aliasing, and which convolution has the stride. Where it is left out, the
            architecture in timm's `config.json` beside the file says so.
        format: a name in `formats.FORMATS`: "torchvision" (timm's plain ResNets too), "timm",
            "timm-v2" (its networks of pre-activations), "huggingface", "huggingface-flax", "bit",
            "keras" (Keras Applications, either version), "keras-hub", or "flaxtransfer", our own
            paths; None reads it off.
        sensor: whose bands the stem takes, a name in `torchgeo.SENSORS` such as "sentinel2_all"
            or "landsat_tm_toa", for weights whose name does not say it; the number of bands has
            to fit. It brings names, wavelengths and scale of the bands.

    Returns:
        A `Checkpoint` of float32 numpy arrays.

    Raises:
        FileNotFoundError: no such file; the text names the nearest.
        OSError: an address from which nothing, or not all, could be fetched.
        ImportError: the file needs h5py.
        ValueError: a file that is damaged, unsafe or of another kind; keys that are missing,
            unexpected or of another shape, all in one text; numbers that are not finite; a
            network other than `model`.

    >>> load("resnet50.onnx")
    Traceback (most recent call last):
    FileNotFoundError: no file 'resnet50.onnx' in ...
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are: {', '.join(FORMATS)}")
    if sensor is not None:
        torchgeo.note(sensor)  # a typing error costs no download
    name, path, arrived = _locate(source)
    file = detect.read_tensors(path)
    chosen = format or detect_naming(file.arrays)
    try:
        arrays, done = FORMATS[chosen].prepare(file.arrays)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    table = FORMATS[chosen].table(arrays)
    shapes = dict(
        found
        for key, array in arrays.items()
        if (found := key_map.leaf_of(table, key, array.shape)) is not None
    )
    if not any(leaf.startswith("params/layer") for leaf in shapes):
        raise ValueError(_no_resnet(file, format))
    headless = not any(leaf.startswith("params/fc/") for leaf in shapes)
    try:
        seen = FORMATS[chosen].implied(infer(shapes))
    except ValueError as error:
        raise ValueError(f"{file.path} holds leaves that form no network: {error}") from None
    if headless:
        seen = dataclasses.replace(seen, classes=1)
    config = _network(model, seen, file)
    wanted = leaf_shapes(config)
    head = {leaf: shape for leaf, shape in wanted.items() if leaf.startswith("params/fc/")}
    try:
        leaves = key_map.to_leaves(
            table,
            arrays,
            {leaf: wanted[leaf] for leaf in wanted if not headless or leaf not in head},
            what=f"{file.path} does not fit {config.name} under {chosen}'s names",
        )
    except ValueError as error:
        raise ValueError(f"{error}{_relatives(file.arrays)}") from None
    leaves, notes = _as_float32(leaves, file.path)
    if headless:
        leaves |= {leaf: np.zeros(shape, np.float32) for leaf, shape in head.items()}
        notes.append("the file has no head: one output that is always 0 stands in its place")
    beside = companions(file, config, chosen, headless=headless, sensor=sensor, source=name)
    hidden = [name for name in UNSEEN if getattr(beside.config, name) != getattr(config, name)]
    if model is not None and hidden:
        raise ValueError(f"{file.path} holds {beside.config.name}, not {config.name}")
    return Pretrained(
        variables={"params": {}, "batch_stats": {}, **unflatten(leaves)},
        config=beside.config,
        preprocessing=beside.preprocessing,
        source=name,
        format=chosen,
        sha256=file.sha256,
        class_names=beside.class_names,
        notes=(*arrived, *file.notes, *done, *notes, *beside.notes),
    )


def _locate(source: str | os.PathLike[str]) -> tuple[str, Path, list[str]]:
    """The source as a person reads it, the file, and notes on how it was come by."""
    text = os.fspath(source)
    if not text:
        raise ValueError("the source is empty: give a file, a folder, an address or 'builtin'")
    if text == locations.BUILTIN_PREFIX or text.startswith(locations.BUILTIN_PREFIX + ":"):
        return (*locations.locate_builtin(text), [])
    if text.startswith(locations.HUB_PREFIX):
        return locations.fetch_from_hub(text)
    if text.startswith(("https://", "http://")):
        return locations.fetch_from_web(text)
    if "://" in text:
        raise ValueError(
            f"{text}: no such kind of address; there are "
            f"{locations.HUB_PREFIX}organization/name and https://"
        )
    return text, Path(text), []


def _no_resnet(file: detect.Tensors, asked: str | None) -> str:
    likely = detect_naming(file.arrays)
    hint = f"; format={likely!r} fits better" if asked and likely != asked else ""
    return (
        f"{file.path} holds no ResNet under the names of {asked or ' or '.join(FORMATS)}{hint}; "
        f"its {len(file.arrays)} keys are like {', '.join(list(file.arrays)[:3])}"
        f"{_relatives(file.arrays)}"
    )


def _network(
    model: str | ResNetConfig | None, seen: ResNetConfig, file: detect.Tensors
) -> ResNetConfig:
    """The network that the leaves show, with what shows in none of them.

    Args:
        model: what the caller expects; None leaves it to what lies beside the file.
        seen: the network by the leaves.
        file: the weights' file.
    """
    path, beside = file.path, file.path.with_name("config.json")
    if flax_file.MODEL in file.metadata:
        own = ResNetConfig.from_json(json.loads(file.metadata[flax_file.MODEL]))
        if leaf_shapes(own) != leaf_shapes(seen):
            raise ValueError(
                f"{path} holds {seen.name} ({_describe(seen)}), not its run's {own.name}"
            )
        # Where the caller expects nothing, the run knows what no leaf shows.
        if model is None:
            return own
    settings = sidecar.read_json(beside)
    # A file of ours says it all in its header.
    if pretrained.HEADER_KEY in file.metadata:
        settings = {}
    if settings.get("model_type") == "resnet":
        seen = huggingface.with_strides(seen, settings)
    if model is None:
        architecture, altered = sidecar.timm_architecture(settings)
        if architecture not in ARCHITECTURES:
            return seen
        said, asked = ARCHITECTURES[architecture], f"{architecture}, as {beside.name} says"
        said = with_unseen(said, seen)
        if altered:
            return with_unseen(seen, said)
    elif isinstance(model, ResNetConfig):
        said, asked = model, f"{model.name} ({_describe(model)})"
    else:
        said, asked = with_unseen(_by_name(model, seen), seen), model
    if leaf_shapes(_like(said, seen)) != leaf_shapes(seen):
        raise ValueError(f"{path} holds {seen.name} ({_describe(seen)}), not {asked}")
    return _like(said, seen)


def _by_name(name: str, seen: ResNetConfig) -> ResNetConfig:
    if name == seen.name:
        return seen
    scaled = re.fullmatch(r"(.+)w(\d+)", name)
    plain = scaled[1] if scaled else name
    if plain not in ARCHITECTURES:
        raise ValueError(
            f"no model {name!r}{suggest(name, ARCHITECTURES)}; there are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = ARCHITECTURES[plain]
    return dataclasses.replace(config, width=int(scaled[2])) if scaled else config


def _like(config: ResNetConfig, seen: ResNetConfig) -> ResNetConfig:
    """The config with the file's own head and image channels."""
    own = {name: getattr(seen, name) for name in ("classes", "in_channels", "adapter")}
    return dataclasses.replace(config, **own)


def _describe(config: ResNetConfig) -> str:
    parts = {
        name: value for name, value in config.to_json().items() if name not in (*PLAIN, "adapter")
    }
    return (
        f"{config.block} blocks {config.depths}, width {config.width}, "
        f"base width {config.base_width}, groups {config.groups}"
        + "".join(f", {name} {value}" for name, value in parts.items())
    )


def _as_float32(
    leaves: Mapping[str, np.ndarray], path: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    stored = {leaf: array.dtype.name for leaf, array in leaves.items()}
    foreign = {
        leaf: kind
        for leaf, kind in stored.items()
        if kind not in ("float16", "bfloat16", "float32", "float64")
    }
    if foreign:
        raise ValueError(f"{path} holds weights that are no floating-point numbers: {foreign}")
    with np.errstate(over="ignore"):
        converted = {
            leaf: np.ascontiguousarray(array, dtype=np.float32) for leaf, array in leaves.items()
        }
    problems = [
        f"{leaf}: {_count(array)} of {array.size}"
        for leaf, array in converted.items()
        if not np.isfinite(array).all()
    ]
    if problems:
        raise ValueError(
            f"{path} holds numbers that are NaN or infinite (as float32) in {len(problems)} "
            "leaves:\n  " + "\n  ".join(problems)
        )
    negative = [
        leaf for leaf, array in converted.items() if leaf.endswith("/var") and (array < 0).any()
    ]
    if negative:
        raise ValueError(f"{path} holds running variances below 0: {', '.join(negative)}")
    kinds = Counter(kind for kind in stored.values() if kind != "float32")
    return converted, [f"{n} leaves were {kind} and are float32 now" for kind, n in kinds.items()]


def _count(array: np.ndarray) -> int:
    return int(array.size - np.isfinite(array).sum())


def _relatives(keys: Mapping[str, np.ndarray]) -> str:
    found = [
        what
        for pattern, what in _RELATIVES.items()
        if any(re.fullmatch(pattern, key) for key in keys)
    ]
    return f"\n  the keys show {' and '.join(found)}, which is not supported" if found else ""
