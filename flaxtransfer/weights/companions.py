"""What belongs to the weights of a file, from wherever it is recorded."""

import dataclasses

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.weights import (
    header,
    huggingface,
    sidecar,
    torchgeo,
    torchvision,
    torchxrayvision,
)
from flaxtransfer.weights.architecture import leaf_shapes
from flaxtransfer.weights.formats import FORMATS
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing
from flaxtransfer.weights.tensors import Tensors

__all__ = ["Companions", "companions"]


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
    own = header.read(file.metadata)
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
    if names is None and torchxrayvision.is_published(file.path.name):
        names = torchxrayvision.CLASS_NAMES
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
    if torchxrayvision.is_published(file.path.name):
        return torchxrayvision.PREPROCESSING, [
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
