"""Hugging Face's ``ResNetForImageClassification``: keys in torch and in Flax, image processors.

Its configuration can ask for networks with the same names and shapes but other strides, which the
weights do not show. A stride in the first convolution of bottlenecks is supported; a stride in the
first stage is refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import shortened
from flaxtransfer.weights.naming.key_map import CONV, DENSE, Rule, Table, batch_norm
from flaxtransfer.weights.preprocessing import (
    INTERPOLATIONS,
    Preprocessing,
    are_numbers,
    is_number,
    listed,
    refuse_fields,
    whole,
)

__all__ = [
    "FLAX",
    "RESAMPLE",
    "TABLE",
    "in_flax",
    "other_graph",
    "preprocessing",
    "with_strides",
]


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


def _flax_norm(key: str, path: str) -> Table:
    return tuple(
        Rule(f"{collection}/{key}/{leaf}", f"{collection}/{path}/{leaf}")
        for collection, leaves in (("params", ("scale", "bias")), ("batch_stats", ("mean", "var")))
        for leaf in leaves
    )


_FLAX_BLOCK = "resnet/encoder/stages/{s-1}/layers/{b}"

FLAX: Table = (
    Rule("params/resnet/embedder/embedder/convolution/kernel", "params/conv1/kernel"),
    *_flax_norm("resnet/embedder/embedder/normalization", "bn1"),
    Rule(
        f"params/{_FLAX_BLOCK}/layer/{{k-1}}/convolution/kernel",
        "params/layer{s}/{b}/conv{k}/kernel",
    ),
    *_flax_norm(_FLAX_BLOCK + "/layer/{k-1}/normalization", "layer{s}/{b}/bn{k}"),
    Rule(
        f"params/{_FLAX_BLOCK}/shortcut/convolution/kernel",
        "params/layer{s}/{b}/downsample/0/kernel",
    ),
    *_flax_norm(_FLAX_BLOCK + "/shortcut/normalization", "layer{s}/{b}/downsample/1"),
    Rule("params/classifier/1/kernel", "params/fc/kernel"),
    Rule("params/classifier/1/bias", "params/fc/bias"),
)
"""The keys of transformers' former Flax networks; kernels have our axis order."""


def in_flax(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays with uniform keys: basic blocks name their layers ``layer_0`` and ``layer_1``.

    >>> list(in_flax({"params/resnet/encoder/stages/0/layers/1/layer/layer_0/x": 0})[0])
    ['params/resnet/encoder/stages/0/layers/1/layer/0/x']
    """
    return {key.replace("/layer/layer_", "/layer/"): a for key, a in arrays.items()}, []


_GRAPH = {
    "model_type": "resnet",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
}


def other_graph(config: Mapping[str, Any]) -> list[str]:
    """The settings in a ``config.json`` that are not supported.

    >>> other_graph({"model_type": "resnet", "downsample_in_first_stage": True})
    ['downsample_in_first_stage must be False, got True']
    """
    stated = _backbone(config)
    return [
        f"{name} must be {supported!r}, got {shortened(repr(stated[name]), 60)}"
        for name, supported in _GRAPH.items()
        if stated.get(name, supported) != supported
    ]


def _backbone(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the ResNet: those of the backbone in a model of detection, for example."""
    inner = config.get("backbone_config")
    return inner if isinstance(inner, Mapping) else config


def with_strides(seen: ResNetConfig, config: Mapping[str, Any]) -> ResNetConfig:
    """The configuration with the strides in a ``config.json``.

    >>> bottlenecks = ResNetConfig("bottleneck", (3, 4, 6, 3))
    >>> with_strides(bottlenecks, {"downsample_in_bottleneck": True}).stride_in
    '1x1'
    """
    if seen.block == "bottleneck" and _backbone(config).get("downsample_in_bottleneck"):
        return dataclasses.replace(seen, stride_in="1x1")
    return seen


# Pillow's numbers for its filters, which processors store.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# From this side on, a ConvNext processor warps the image to a square without a crop.
_CONVNEXT_WARPS = 384


@dataclasses.dataclass(frozen=True)
class _Processor:
    """What an image processor of Hugging Face does where its file does not say it.

    Args:
        square: whether a size that is one number stands for both sides.
        crop: whether the center is cropped.
        resample: Pillow's number of the filter.
    """

    square: bool
    crop: bool
    resample: int = 3


_PROCESSORS = {
    "convnext": _Processor(square=False, crop=False),
    "bit": _Processor(square=False, crop=True),
    "clip": _Processor(square=False, crop=True),
    "mobilenetv1": _Processor(square=False, crop=True, resample=2),
    "mobilenetv2": _Processor(square=False, crop=True, resample=2),
    "vit": _Processor(square=True, crop=False, resample=2),
    "deit": _Processor(square=True, crop=True),
    "beit": _Processor(square=True, crop=False),
}
"""By the name of the class, without its ending."""

_PIXELS = {
    *("size", "image_mean", "image_std", "crop_size", "crop_pct", "rescale_factor", "resample"),
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square"),
}
"""Fields of an image processor that are honored."""
_NO_PIXELS = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map"),
    *("do_convert_rgb", "do_reduce_labels", "data_format", "input_data_format", "num_channels"),
    *("return_tensors", "device", "disable_grouping", "transformers_version", "include_top"),
    "_valid_processor_keys",
}
"""Fields that change no pixel of an RGB image."""


def preprocessing(config: Mapping[str, Any]) -> tuple[Preprocessing, list[str]] | None:
    """The preprocessing in Hugging Face's ``preprocessor_config.json``, and notes; None if absent.

    Raises:
        ValueError: fields that ask for pixels other than ours; all of them in one line.

    >>> preprocessing({"image_mean": [0.5], "image_std": [0.5], "crop_pct": 0.875,
    ...     "size": {"shortest_edge": 224}, "resample": 3})[0].resize
    256
    """
    if "image_mean" not in config and "size" not in config:
        return None
    lacking = [n for n in ("size", "image_mean", "image_std") if config.get(n) is None]
    if lacking:
        raise ValueError(f"preprocessor_config.json next to the weights lacks {', '.join(lacking)}")
    fields = {name: value for name, value in config.items() if value is not None}
    name, notes = _processor_name(fields)
    usual, convnext = _PROCESSORS.get(name, _PROCESSORS["bit"]), name == "convnext"
    side, squash = _side(fields["size"], fields.get("default_to_square", usual.square))
    cropped = bool(fields.get("do_center_crop", usual.crop))
    size = _side(fields.get("crop_size", side if convnext else 224), True)[0] if cropped else side
    resize, crop_pct = side, fields.get("crop_pct", 224 / 256)
    good_pct = not convnext or (is_number(crop_pct) and 0 < crop_pct <= 1)
    if convnext:
        squash = side >= _CONVNEXT_WARPS
        resize = side if squash or not good_pct else int(side / crop_pct)
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    resample = fields.get("resample", usual.resample)
    interpolation = RESAMPLE.get(resample, "") if isinstance(resample, int) else resample
    good_side = bool(side) and not (convnext and _is_square(fields["size"]))
    std = listed(fields["image_std"])
    checks = (
        ("image_processor_type", name in _PROCESSORS, f"that of {', '.join(_PROCESSORS)}"),
        ("do_resize", fields.get("do_resize", True) is True, "true"),
        ("size", good_side, "a shortest_edge" + (", or a square" if not convnext else "")),
        ("do_center_crop", cropped or squash or convnext, "true where size is no square"),
        # ConvNext has cropped before; a second crop would round twice.
        ("crop_size", 0 < size <= side and (not convnext or size == side), "a square within size"),
        ("crop_pct", good_pct, "above 0 and at most 1"),
        ("rescale_factor", is_number(factor) and factor > 0, "above 0"),
        ("resample", interpolation in INTERPOLATIONS, f"one of {RESAMPLE}"),
        ("image_mean", are_numbers(fields["image_mean"]), "one number per channel"),
        ("image_std", are_numbers(std) and min(std) > 0, "one number above 0 per channel"),
        *(
            (field, not value, "false or absent")
            for field, value in fields.items()
            if field not in _PIXELS | _NO_PIXELS
            and (field.startswith("do_") or field in ("rescale_offset", "offset", "size_divisor"))
        ),
    )
    refuse_fields(fields, checks, "preprocessor_config.json")
    unused = sorted(
        field
        for field, value in fields.items()
        if (field not in _PIXELS | _NO_PIXELS or (field == "crop_pct" and not convnext))
        and value is not False
    )
    if unused:
        notes.append(
            f"fields of preprocessor_config.json were not used: {shortened(', '.join(unused), 150)}"
        )
    mean = listed(fields["image_mean"])
    if not fields.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    # Our pixels are 0 to 1.
    scale = factor * 255
    return Preprocessing(
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
        size=size,
        resize=resize,
        interpolation=interpolation,
        crop_mode="squash" if squash else "center",
        processor="huggingface",
    ), notes


def _processor_name(fields: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The row of ``_PROCESSORS`` for a file; the nearest one, with a note, if it names none."""
    stated = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if stated is not None:
        return re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(stated)).lower(), []
    cropped = "crop_size" in fields and fields.get("do_center_crop")
    name = "bit" if cropped else "vit" if _is_square(fields["size"]) else "convnext"
    text = "preprocessor_config.json names no image_processor_type; that of"
    return name, [f"{text} {name} is assumed"]


def _side(size: Any, square: bool) -> tuple[int, bool]:
    """The side of a ``size`` in any of its forms, and whether both sides have it; 0 if unclear."""
    if isinstance(size, Mapping):
        size = {name: value for name, value in size.items() if value is not None}
        if set(size) == {"shortest_edge"}:
            return whole(size["shortest_edge"]), False
        if set(size) == {"height", "width"} and size["height"] == size["width"]:
            return whole(size["height"]), True
        return 0, False
    if isinstance(size, list | tuple):
        return (whole(size[0]), True) if size and size[0] == size[-1] else (0, False)
    return whole(size), square


def _is_square(size: Any) -> bool:
    return _side(size, False)[1]
