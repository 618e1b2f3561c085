"""Load pre-trained weights strictly: every key used or excused, every leaf filled, or an error.

``load`` locates and reads a file, maps its keys to our paths, infers the network and collects the
metadata (preprocessing, class names) from the header, the files next to it, or its published name.
"""

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flaxtransfer.files import bucket_address, parse_json
from flaxtransfer.models.config import BASE_FIELDS, ResNetConfig
from flaxtransfer.models.model import leaf_shapes
from flaxtransfer.models.registry import ARCHITECTURES, named
from flaxtransfer.paths import shortened, suggest, unflatten
from flaxtransfer.task import SINGLE_LABEL, Task
from flaxtransfer.weights import locations, pretrained, sidecar
from flaxtransfer.weights.infer import (
    UNSEEN,
    assumptions,
    infer,
    statistics_problem,
    unfit,
    with_placeholders,
    with_unseen,
)
from flaxtransfer.weights.naming import (
    huggingface,
    keras,
    keras_model,
    key_map,
    onnx,
    published,
    timm,
)
from flaxtransfer.weights.naming.formats import FORMATS, detect_naming, with_head
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.readers import array_files, detect
from flaxtransfer.weights.readers.detect import Tensors
from flaxtransfer.weights.readers.torch_file import NAMES, names_of, tells_names

__all__ = ["Metadata", "collect_metadata", "described", "load", "locate"]


def load(
    source: str | os.PathLike[str],
    *,
    model: str | ResNetConfig | None = None,
    format: str | None = None,
    sensor: str | None = None,
    key: str | None = None,
    statistics: Literal["measure"] | None = None,
) -> Pretrained:
    """Loads a pre-trained ResNet from a file, strictly.

    The naming and the network are detected from the keys and shapes. The preprocessing comes from
    the file's header, from ``config.json`` or ``preprocessor_config.json`` next to it, or from the
    name that torchvision, torchgeo or torchxrayvision gave the file; otherwise ImageNet's first
    recipe is assumed. The ``notes`` of the result state which. No code in the file is run. A file
    without a head, the result of self-supervised training, gets one output that is always 0, to be
    replaced by a new head.

    Args:
        source: a file of safetensors, of ``torch.save`` (torch is not needed), of flax's msgpack,
            BiT's ``.npz``, an ONNX graph of a ResNet, or Keras' ``.h5`` or ``.keras`` (needs the
            extra ``keras``); its content decides, not its name. Or the index of several files, a
            folder with one of these (of several checkpoints the best or the newest by name), or a
            folder that orbax wrote with ``{"params": ..., "batch_stats": ...}``, such as a step of
            a run. Or an address:
            ``hf://organization/name[@revision][:file]``, which is downloaded to the hub's cache
            with the JSON files next to it; ``https://.../name-<first digits of sha256>.pth``, which
            is verified by its name; ``gs://bucket/path`` of a file or folder (extra ``gcs``), which
            is fetched to the cache. Or "builtin", or "builtin:<name>".
        model: the expected network, a name such as "resnet50" or a configuration, except for the
            number of classes and image channels. Names are in ``models.ARCHITECTURES`` and those
            that ``ResNetConfig.name`` composes, with widths and endings. It also states what no
            leaf shows: anti-aliasing, the stem's pool, and which convolution has the stride, as in
            "resnet50_v1". By default timm's ``config.json`` next to the file states the
            architecture.
        format: a name in ``formats.FORMATS``: "torchvision" (also timm's plain ResNets), "timm",
            "timm-v2" (its pre-activation networks), "huggingface", "huggingface-flax", "bit",
            "keras" (Keras Applications, either version), "keras-hub", "flaxtransfer" (our own
            paths), or "onnx" (of graphs, whose names are not used); None detects it.
        sensor: the sensor whose bands the stem takes, a name in ``published.SENSORS`` such as
            "sentinel2_all" or "landsat_tm_toa", for weights whose file name does not state it. The
            number of bands must fit. It provides names, wavelengths and scale of the bands.
        key: the place of the network in the file, such as "teacher" or "state_dict/student", where
            it holds several. By default, averages are taken before plain weights.
        statistics: "measure" for a file whose BatchNorms have no running statistics, which is
            refused otherwise: they start as mean 0 and variance 1, and are of no use before
            ``training.recalibrate`` has measured them on your images.

    Returns:
        A ``Pretrained`` with float32 numpy arrays, which may be views of the bytes that were read
        and then cannot be written to. Its ``sha256`` is that of these bytes; it is computed beside
        their use, and waited for where it is first read, or here, where the name of the file or its
        run states what it has to be.

    Raises:
        FileNotFoundError: the file does not exist; the text names the nearest one.
        OSError: an address from which nothing, or not everything, could be downloaded.
        ImportError: the file needs h5py.
        ValueError: a file that is damaged, unsafe or of another kind; keys that are missing,
            unexpected or of another shape, all in one text; numbers that are not finite; a
            network other than ``model``; or weights of a run that were changed since it wrote them.

    >>> load("resnet50.onnx")
    Traceback (most recent call last):
    FileNotFoundError: no file 'resnet50.onnx' in ...
    """
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"unknown format {format!r}{suggest(format, FORMATS)}; known: {', '.join(FORMATS)}"
        )
    if sensor is not None:
        published.note(sensor)  # a wrong name is refused before a download
    if statistics not in (None, "measure"):
        raise ValueError(f"`statistics` must be None or 'measure', got {statistics!r}")
    name, path, arrived = locate(source)
    file = detect.read_tensors(path, key)
    file = dataclasses.replace(file, settings=sidecar.beside(file))
    placed = 0
    if statistics == "measure":
        filled, placed = with_placeholders(file.arrays)
        file = dataclasses.replace(file, arrays=filled)
    chosen = format or detect_naming(file.arrays)
    try:
        outside = keras_model.around(file.metadata, file.arrays, file.beside)
        arrays, done = (
            FORMATS[chosen].prepare(file.arrays)
            if outside is None
            else keras.prepared(file.arrays, outside.reversed)
        )
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    table = FORMATS[chosen].table(arrays)
    if chosen == "timm-v2":
        table = timm.v2_table_of(arrays, _pools_shortcuts(model, file))
    shapes = _shapes(table, arrays)
    stated = _stated(file)
    if stated is None and not any(leaf.startswith("params/layer") for leaf in shapes):
        raise unfit(file, _no_resnet(file, format))
    _check_graph(file, chosen)
    if problem := statistics_problem(model, shapes, chosen, file):
        raise unfit(file, problem)
    try:
        found = _with_stated(infer(shapes), stated)
        head = with_head(table, arrays, file.beside, found.features, file.place, outside)
        before = {key: array.shape for key, array in arrays.items()}
        arrays, headless = dict(head.arrays), bool(head.missing)
        if {key: array.shape for key, array in arrays.items()} != before:
            shapes = _shapes(table, arrays)
            found = _with_stated(infer(shapes), stated)
        seen = FORMATS[chosen].implied(found) if stated is None else found
        graph = onnx.stated(file.metadata)
        seen = seen if graph is None else graph.of(seen)
    except ValueError as error:
        problem = f"{file.path} holds leaves that do not form a network: {error}"
        raise unfit(file, problem) from None
    if headless:
        seen = dataclasses.replace(seen, classes=1)
    config = _network(model, seen, file, chosen)
    other = [name for name in UNSEEN if getattr(config, name) != getattr(seen, name)]
    if graph is not None and other:
        raise ValueError(
            f"{file.path} holds {seen.name}, not {config.name}: {_graph_says(seen, other)}"
        )
    wanted = leaf_shapes(config)
    zeros = {leaf: shape for leaf, shape in wanted.items() if leaf.startswith("params/fc/")}
    try:
        leaves = key_map.to_leaves(
            table,
            arrays,
            {leaf: wanted[leaf] for leaf in wanted if not headless or leaf not in zeros},
            what=f"{file.path} does not fit {config.name} under {chosen}'s names",
        )
    except ValueError as error:
        raise unfit(file, str(error)) from None
    leaves, notes = _as_float32(leaves, file.path)
    missing = (graph.no_head if graph is not None else "") or head.missing
    if part := sidecar.part_text(file.beside, sidecar.beside(file)):
        notes.append(part)
    if headless:
        leaves |= {leaf: np.zeros(shape, np.float32) for leaf, shape in zeros.items()}
        notes.append(f"{missing}: one output that is always 0 replaces it")
    if placed:
        notes.append(
            f"{placed} norms have no running statistics: measure them with training.recalibrate"
        )
    metadata = collect_metadata(
        file,
        config,
        chosen,
        headless=headless,
        sensor=sensor,
        source=name,
        own=None if outside is None else outside.preprocessing,
    )
    hidden = [name for name in UNSEEN if getattr(metadata.config, name) != getattr(config, name)]
    if model is not None and hidden:
        raise ValueError(f"{file.path} holds {metadata.config.name}, not {config.name}")
    return Pretrained(
        variables={"params": {}, "batch_stats": {}, **unflatten(leaves)},
        config=metadata.config,
        preprocessing=metadata.preprocessing,
        source=name,
        format=chosen,
        sha256=file.digest,
        class_names=metadata.class_names,
        task=metadata.task,
        notes=(
            *(*arrived, *file.notes, *head.notes, *done, *notes, *metadata.notes),
            *(outside.notes if outside else ()),
            *assumptions(file, metadata.config, chosen, model, name),
        ),
        no_head=missing or metadata.no_head,
    )


def _stated(file: Tensors) -> ResNetConfig | None:
    """The network that a file says itself, where its leaves do not show it whole; None otherwise.

    Another file without layer4 is a damaged one, which has to be said.
    """
    header = pretrained.read_header(file.metadata)
    if header is not None:
        known = header.config
        return known if len(known.depths) < 4 or known.head_reads else None
    return timm.own(sidecar.beside(file))


def _with_stated(seen: ResNetConfig, stated: ResNetConfig | None) -> ResNetConfig:
    """What a file says itself, with the head and channels of its leaves; else what they show."""
    return seen if stated is None else _like(stated, seen)


def locate(source: str | os.PathLike[str]) -> tuple[str, Path, list[str]]:
    """The source for a person to read, the file, and notes on where it was found."""
    text = os.fspath(source)
    if not text:
        raise ValueError("source must not be empty: give a file, a folder, an address or 'builtin'")
    if text == locations.BUILTIN_PREFIX or text.startswith(locations.BUILTIN_PREFIX + ":"):
        return (*locations.locate_builtin(text), [])
    if text.startswith(locations.HUB_PREFIX):
        return locations.fetch_from_hub(text)
    if text.startswith(("https://", "http://")):
        return locations.fetch_from_web(text)
    if (address := bucket_address(text)) is not None:
        return locations.fetch_from_bucket(address)
    if "://" in text:
        raise ValueError(
            f"{text}: unknown kind of address; known: "
            f"{locations.HUB_PREFIX}organization/name, https:// and gs://bucket/path"
        )
    return text, Path(text), []


def _graph_says(seen: ResNetConfig, names: list[str]) -> str:
    return "; ".join(f"its graph has {name} {getattr(seen, name)!r}" for name in names)


def _shapes(table: key_map.Table, arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves whose keys the table knows."""
    return dict(
        found
        for key, array in arrays.items()
        if (found := key_map.leaf_of(table, key, array.shape)) is not None
    )


def _no_resnet(file: detect.Tensors, asked: str | None) -> str:
    likely = detect_naming(file.arrays)
    hint = f"; format={likely!r} fits better" if asked and likely != asked else ""
    settings = sidecar.beside(file)
    stated = settings.get("architecture") or settings.get("model_type")
    return (
        f"{file.path} has no ResNet with the keys of {asked or ' or '.join(FORMATS)}{hint}; "
        f"its {len(file.arrays)} keys are like "
        f"{shortened(', '.join(list(file.arrays)[:3]), 150)}"
        + (f"; config.json next to it states {shortened(str(stated), 40)!r}" if stated else "")
    )


def _pools_shortcuts(model: str | ResNetConfig | None, file: Tensors) -> bool | None:
    """Whether the caller, the header or the files next to it say that shortcuts are pooled."""
    if isinstance(model, str):
        model = named(model, "`model` (--model)")
    header = pretrained.read_header(file.metadata) if model is None else None
    said = model if header is None else header.config
    return (
        timm.pools_shortcuts(sidecar.beside(file)) if said is None else said.shortcut == "average"
    )


def _check_graph(file: Tensors, format: str, seen: ResNetConfig | None = None) -> None:
    """Refuses a file whose ``config.json`` asks for another graph than that of our networks."""
    settings = sidecar.beside(file)
    problems: list[str] = []
    if format.startswith("huggingface") or settings.get("model_type") == "resnet":
        problems = huggingface.other_graph(settings)
    elif "pretrained_cfg" in settings:
        problems = timm.other_graph(settings, seen)
    elif isinstance(arguments := settings.get("backbone_kwargs"), dict):
        problems = timm.other_graph({"model_args": arguments})
    if settings.get("dilation") is True:
        problems = [*problems, "dilation must be false, got True"]
    if problems:
        beside = shortened(str(file.path.with_name("config.json")), 150)
        text = f"{beside} describes another network: {'; '.join(problems)}"
        # Another type of model is better called by its family.
        foreign = any(problem.startswith("model_type") for problem in problems)
        raise unfit(file, text) if foreign else ValueError(shortened(text, 600))


def _network(
    model: str | ResNetConfig | None, seen: ResNetConfig, file: detect.Tensors, format: str
) -> ResNetConfig:
    """The network of the leaves, with the fields that no leaf shows.

    Args:
        model: the network that the caller expects; None uses the files next to the weights.
        seen: the network inferred from the leaves.
        file: the weights' file.
        format: its naming.
    """
    path, beside = file.path, file.path.with_name("config.json")
    if array_files.MODEL in file.metadata:
        fields = parse_json(file.metadata[array_files.MODEL].encode(), str(path))
        try:
            own = ResNetConfig.from_json(fields)
        except (TypeError, ValueError) as error:
            reason = shortened(str(error), 300)
            raise ValueError(
                f"config.json of the run of {path} must describe its network: {reason}"
            ) from error
        if leaf_shapes(own) != leaf_shapes(seen):
            raise ValueError(
                f"{path} holds {seen.name} ({described(seen)}), but its run trains {own.name}"
            )
        # Without an expected model, the run states what no leaf shows.
        if model is None:
            return own
    settings = sidecar.beside(file)
    _check_graph(file, format, seen)
    if format == "keras" and array_files.CONFIG in file.metadata:
        text = file.metadata[array_files.CONFIG].encode()
        seen, odd = keras_model.stated(parse_json(text, f"the graph in {path}"), seen)
        if odd:
            raise unfit(file, f"{path} states another network: {'; '.join(odd)}")
    if format.startswith("huggingface") or settings.get("model_type") == "resnet":
        seen = huggingface.with_strides(seen, settings)
    elif "pretrained_cfg" in settings:
        seen = timm.with_arguments(seen, settings)
    if model is None:
        architecture, altered = sidecar.timm_architecture(settings)
        if architecture not in ARCHITECTURES:
            return seen
        said, asked = ARCHITECTURES[architecture], f"{architecture}, as {beside.name} states"
        said = with_unseen(said, seen)
        if altered:
            return timm.with_arguments(with_unseen(seen, said), settings)
    elif isinstance(model, ResNetConfig):
        said, asked = model, f"{model.name} ({described(model)})"
    else:
        known = seen if model == seen.name else named(model, "`model` (--model)")
        # What these files imply, to be Big Transfer's, is a guess where nobody says anything.
        guessed = format == "timm-v2" and "pretrained_cfg" not in settings
        said, asked = known if guessed else with_unseen(known, seen), model
    if leaf_shapes(_like(said, seen)) != leaf_shapes(seen):
        raise ValueError(f"{path} holds {seen.name} ({described(seen)}), not {asked}")
    return _like(said, seen)


def _like(config: ResNetConfig, seen: ResNetConfig) -> ResNetConfig:
    """The configuration with the file's head and image channels."""
    own = {name: getattr(seen, name) for name in ("classes", "in_channels", "adapter")}
    return dataclasses.replace(config, **own)


def described(config: ResNetConfig) -> str:
    """The fields of a network that make it another one, for a person."""
    common = {*BASE_FIELDS, "adapter"}
    parts = {name: value for name, value in config.to_json().items() if name not in common}
    return (
        f"{config.block} blocks {config.depths}, width {config.width}, "
        f"base width {config.base_width}, groups {config.groups}"
        + "".join(f", {name} {value}" for name, value in parts.items())
    )


def _as_float32(
    leaves: Mapping[str, np.ndarray], path: Path
) -> tuple[dict[str, np.ndarray], list[str]]:
    # numpy composes the name of a dtype anew each time.
    kinds_of = {dtype: dtype.name for dtype in {array.dtype for array in leaves.values()}}
    stored = {leaf: kinds_of[array.dtype] for leaf, array in leaves.items()}
    foreign = {
        leaf: kind
        for leaf, kind in stored.items()
        if kind not in ("float16", "bfloat16", "float32", "float64")
    }
    if foreign:
        got = shortened(", ".join(f"{leaf}: {kind}" for leaf, kind in foreign.items()), 300)
        raise ValueError(f"{path} must hold floating-point weights, got {got}")
    with np.errstate(over="ignore"):
        # Arrays of the file stay where they are, transposed or not: whoever uses one copies it.
        converted = {leaf: np.asarray(array, np.float32) for leaf, array in leaves.items()}
    problems = [
        f"{leaf}: {_count(array)} of {array.size}"
        for leaf, array in converted.items()
        if not np.isfinite(array).all()
    ]
    if problems:
        raise ValueError(
            f"{path} holds NaN or infinite numbers (as float32) in {len(problems)} leaves: "
            f"{shortened('; '.join(problems), 300)}"
        )
    negative = [
        leaf for leaf, array in converted.items() if leaf.endswith("/var") and (array < 0).any()
    ]
    if negative:
        raise ValueError(
            f"{path} must have running variances >= 0, got negative ones in: "
            f"{shortened(', '.join(negative), 300)}"
        )
    kinds = Counter(kind for kind in stored.values() if kind != "float32")
    return converted, [
        f"{n} leaves were converted from {kind} to float32" for kind, n in kinds.items()
    ]


def _count(array: np.ndarray) -> int:
    return int(array.size - np.isfinite(array).sum())


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The metadata of a weight file: preprocessing, class names, notes and the network.

    A header can state more about the network than its leaves show, such as the span of an
    adapter's curves.
    """

    config: ResNetConfig
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    task: Task = SINGLE_LABEL
    no_head: str = ""


def collect_metadata(
    file: Tensors,
    config: ResNetConfig,
    format: str,
    *,
    headless: bool = False,
    sensor: str | None = None,
    source: str = "",
    own: Preprocessing | None = None,
) -> Metadata:
    """Collects the metadata of a weight file from the most trustworthy record.

    The order is: the caller, the header, the files next to it, its published name, ImageNet.

    Args:
        file: the weight file.
        config: the network that it holds.
        format: the naming of the file.
        headless: whether the file has no head, and class names do not apply.
        sensor: a name in ``published.SENSORS``; None if the caller gives none.
        source: where the file came from; its name may be a published one.
        own: what layers of the model itself do to images; None if there are none.

    Raises:
        ValueError: a record that contradicts the weights or cannot be read.
    """
    asked = None if sensor is None else _of_sensor(sensor, config, file)
    header = pretrained.read_header(file.metadata)
    if header is not None:
        # Some of a network shows in no leaf: the span of an adapter's curves, anti-aliasing.
        if leaf_shapes(header.config) != leaf_shapes(config):
            held, stated = (
                ", ".join(
                    f"{name}={value!r}"
                    for name, value in vars(of).items()
                    if value != getattr(other, name)
                )
                for of, other in ((config, header.config), (header.config, config))
            )
            raise ValueError(
                f"{file.path} holds {shortened(held, 200)}, but its header states "
                f"{shortened(stated, 200)}"
            )
        recorded = (header.preprocessing, ["preprocessing: from the file's header"])
        preprocessing, notes = asked or recorded
        if header.no_head:
            notes = [*notes, f"{header.no_head}: one output that is always 0 replaces it"]
        rest = (tuple(notes), header.task, header.no_head)
        return Metadata(header.config, preprocessing, header.class_names, *rest)
    beside = file.path.with_name("config.json")
    settings = sidecar.beside(file)
    if format.startswith("huggingface"):
        names = sidecar.hf_class_names(settings)
    else:
        names = sidecar.timm_class_names(settings)
    if names is None and published.is_of_radiographs(file.path.name):
        names = published.RADIOGRAPH_CLASSES
    told: list[str] = []
    if names is None:
        names, told = _class_names(file, config.classes)
    if headless:
        names, told = None, []
    if names is not None and len(names) != config.classes:
        raise ValueError(
            f"{beside} names {len(names)} classes, but the head of {file.path} has {config.classes}"
        )
    inside = None if own is None else (own, ["preprocessing: from layers of the model"])
    found, notes = asked or inside or _preprocessing(file, settings, config, source)
    usual = FORMATS[format].preprocessing(config)
    if found is None and usual is not None and len(usual.mean) == config.bands:
        found, notes = usual, [f"preprocessing: not recorded, that of {format} is assumed"]
    preprocessing, notes = _fitted(found, notes, config, file)
    task = SINGLE_LABEL if headless else sidecar.stated_task(settings)
    if task is not SINGLE_LABEL:
        told = [*told, f"task: {task.name}, as {beside.name} says"]
    return Metadata(config, preprocessing, names, (*notes, *told), task)


def _class_names(file: Tensors, classes: int) -> tuple[tuple[str, ...] | None, list[str]]:
    """The class names that a file carries, where they fit the head, and a note."""
    found: dict[str, list[str]] = json.loads(file.metadata.get(NAMES, "{}"))
    for key, text in file.metadata.items():
        with contextlib.suppress(ValueError):
            if not tells_names(key):
                continue
            if names := names_of(key, parse_json(text.encode(), key)):
                found[key] = names
    fitting = {place: names for place, names in found.items() if len(names) == classes}
    places = shortened(", ".join(map(repr, fitting or found)), 150)
    if len({tuple(names) for names in fitting.values()}) > 1:
        return None, [f"class names: those under {places} differ, and none are taken"]
    for names in fitting.values():
        return tuple(names), [f"class names: those under {places}"]
    counts = " or ".join(map(str, sorted({len(names) for names in found.values()})))
    return None, [
        f"class names: not those under {places}, which are {counts} for {classes} outputs"
    ] if found else []


def _of_sensor(sensor: str, config: ResNetConfig, file: Tensors) -> tuple[Preprocessing, list[str]]:
    try:
        found = published.of_sensor(sensor, config.bands)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from None
    return found, [f"preprocessing: that of {sensor}, as requested; {published.note(sensor)}"]


def _preprocessing(
    file: Tensors, settings: Mapping[str, Any], config: ResNetConfig, source: str
) -> tuple[Preprocessing | None, list[str]]:
    graph = onnx.stated(file.metadata)
    if graph is not None and graph.mean:
        usual = graph.sized(IMAGENET)
        found = dataclasses.replace(usual, mean=tuple(graph.mean), std=tuple(graph.std))
        return found, ["preprocessing: mean and std from the graph; size and resize are assumed"]
    timm = sidecar.timm_preprocessing(settings)
    if timm is not None:
        return timm[0], ["preprocessing: from config.json next to the file", *timm[1]]
    processor = file.path.with_name("preprocessor_config.json")
    other = huggingface.preprocessing(sidecar.read_json(processor))
    if other is not None:
        return other[0], [f"preprocessing: from {processor.name} next to the file", *other[1]]
    if published.is_of_radiographs(file.path.name):
        return published.RADIOGRAPHS, [
            "preprocessing: that of torchxrayvision's file of this name; the outputs are "
            "independent findings, with one sigmoid each instead of a softmax"
        ]
    sensor = published.by_torchgeo(file.path.name, source)
    if sensor is not None:
        try:
            of_sensor = published.of_sensor(sensor, config.bands)
        except ValueError as error:
            raise ValueError(
                f"{file.path} has the name of torchgeo's weights, but other bands: {error}; give "
                "sensor=, or rename the file"
            ) from None
        return of_sensor, [f"preprocessing: that of torchgeo's {sensor}; {published.note(sensor)}"]
    known = published.by_torchvision(file.path.name, file.digest)
    if known is not None:
        return known, ["preprocessing: that of the file that torchvision publishes under this name"]
    return None, []


def _sensors(channels: int) -> str:
    fitting = [name for name, found in published.SENSORS.items() if len(found.bands) == channels]
    return f"; sensor= supports {', '.join(fitting)}" if fitting else ""


def _fitted(
    preprocessing: Preprocessing | None, notes: list[str], config: ResNetConfig, file: Tensors
) -> tuple[Preprocessing, list[str]]:
    """One mean and std for each channel of the network."""
    channels, graph = config.bands, onnx.stated(file.metadata)
    usual = IMAGENET if graph is None else graph.sized(IMAGENET)
    if preprocessing is None and channels == len(IMAGENET.mean):
        return usual, ["preprocessing: not recorded, ImageNet's is assumed"]
    if preprocessing is None:
        # Guessed statistics of unknown bands would be a silent error.
        assumed = dataclasses.replace(usual, mean=(0.0,) * channels, std=(1.0,) * channels)
        return assumed, [
            f"preprocessing: not recorded for {channels} channels, which stay in 0..1"
            + _sensors(channels)
        ]
    if len(preprocessing.mean) == 1:
        preprocessing = dataclasses.replace(
            preprocessing, mean=preprocessing.mean * channels, std=preprocessing.std * channels
        )
    if len(preprocessing.mean) != channels:
        raise ValueError(
            f"the preprocessing next to {file.path} must have {channels} channels, as the network, "
            f"got {len(preprocessing.mean)}"
        )
    return preprocessing, notes
