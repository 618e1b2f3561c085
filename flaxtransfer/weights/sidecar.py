"""Sidecar files: preprocessing, class names and architecture in the JSON files next to weights.

timm stores everything in ``config.json``. Hugging Face stores the graph and the labels there, and
the preprocessing in ``preprocessor_config.json``. Other JSON files with these names are ignored.
``family_text`` names a file that is no ResNet, from these files or from its keys.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer import files
from flaxtransfer.paths import shortened
from flaxtransfer.weights.preprocessing import (
    CROP_MODES,
    IMAGENET,
    INTERPOLATIONS,
    Preprocessing,
)
from flaxtransfer.weights.pretrained import HEADER_KEY
from flaxtransfer.weights.readers.detect import Tensors

__all__ = [
    "FAMILIES",
    "RESAMPLE",
    "Family",
    "beside",
    "family_text",
    "hf_class_names",
    "hf_preprocessing",
    "read_json",
    "timm_architecture",
    "timm_class_names",
    "timm_preprocessing",
]


# Pillow's numbers for its filters, which Hugging Face stores.
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# From this side on, a ConvNext processor warps the image to a square without a crop.
_CONVNEXT_WARPS = 384
_TIMM = {
    "input_size": [3, 224, 224],
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": list(IMAGENET.mean),
    "std": list(IMAGENET.std),
}
"""timm's defaults."""
# Arguments of timm's networks that do not change the backbone in evaluation.
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "drop_block_rate"}


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file; empty if there is no file.

    Raises:
        ValueError: the file does not hold a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = files.read_json(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} is damaged: ")
        raise ValueError(
            f"{path}, next to the weights, is not valid JSON ({reason}); repair or remove it"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}, next to the weights, must hold a JSON object; remove it")
    return content


def beside(file: Tensors) -> dict[str, Any]:
    """The ``config.json`` next to a file; empty for ours, whose header states everything."""
    own = HEADER_KEY in file.metadata
    return {} if own else read_json(file.path.with_name("config.json"))


def timm_preprocessing(config: Mapping[str, Any]) -> tuple[Preprocessing, list[str]] | None:
    """The preprocessing in timm's ``config.json``, and notes; None for other files.

    It is that of ``timm.data.resolve_model_data_config``, with timm's defaults for absent fields.

    Raises:
        ValueError: fields that ask for pixels other than ours; all of them in one line.

    >>> timm_preprocessing({"pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.95,
    ...     "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}})[0].resize
    235
    """
    stated = config.get("pretrained_cfg")
    names = ("mean", "std", "input_size", "interpolation", "crop_pct")
    if not isinstance(stated, Mapping) or all(stated.get(name) is None for name in names):
        return None
    fields = _TIMM | {name: value for name, value in stated.items() if value is not None}
    size, crop = fields["input_size"], fields["crop_pct"]
    square = isinstance(size, list | tuple) and len(size) == 3 and size[1] == size[2]
    side, std = _pixels(size[1]) if square else 0, _listed(fields["std"])
    checks = (
        ("input_size", bool(side), "[channels, side, side] of a square"),
        ("crop_pct", _number(crop) and 0 < crop <= 1, "above 0 and at most 1"),
        ("crop_mode", fields["crop_mode"] in CROP_MODES, " or ".join(CROP_MODES)),
        ("interpolation", fields["interpolation"] in INTERPOLATIONS, ", ".join(INTERPOLATIONS)),
        ("mean", _channels(fields["mean"]), "one number per channel"),
        ("std", _channels(std) and min(std) > 0, "one number above 0 per channel"),
    )
    _refuse(fields, checks, "config.json")
    notes = []
    if absent := [name for name in names if stated.get(name) is None]:
        notes.append(f"timm's default {', '.join(absent)}, as config.json states none")
    if test := [name for name in ("test_input_size", "test_crop_pct") if fields.get(name)]:
        told = " and ".join(f"{name} {fields[name]}" for name in test)
        notes.append(f"timm's {told} are for evaluation on request (use_test_size) and unused")
    return Preprocessing(
        _listed(fields["mean"]),
        std,
        size=side,
        resize=math.floor(side / crop),
        interpolation=fields["interpolation"],
        crop_mode=fields["crop_mode"],
    ), notes


def timm_architecture(config: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The architecture in timm's ``config.json`` (None for other files), and whether arguments
    change its shape.

    >>> timm_architecture({"architecture": "resnet50", "pretrained_cfg": {}, "model_args":
    ...     {"num_classes": 3, "layers": [1, 1, 1, 1]}})
    ('resnet50', True)
    """
    if "pretrained_cfg" not in config:
        return None, False
    altered = set(config.get("model_args") or {}) - _HARMLESS
    return config.get("architecture"), bool(altered)


def timm_class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The label names in timm's ``config.json``, in the order of the outputs; None if absent."""
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    return tuple(map(str, names)) if names else None


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


def hf_preprocessing(config: Mapping[str, Any]) -> tuple[Preprocessing, list[str]] | None:
    """The preprocessing in Hugging Face's ``preprocessor_config.json``, and notes; None if absent.

    Raises:
        ValueError: fields that ask for pixels other than ours; all of them in one line.

    >>> hf_preprocessing({"image_mean": [0.5], "image_std": [0.5], "crop_pct": 0.875,
    ...     "size": {"shortest_edge": 224}, "resample": 3})[0].resize
    256
    """
    if "image_mean" not in config and "size" not in config:
        return None
    _require(config, ("size", "image_mean", "image_std"), "preprocessor_config.json")
    fields = {name: value for name, value in config.items() if value is not None}
    name, notes = _processor_name(fields)
    usual, convnext = _PROCESSORS.get(name, _PROCESSORS["bit"]), name == "convnext"
    side, squash = _side(fields["size"], fields.get("default_to_square", usual.square))
    cropped = bool(fields.get("do_center_crop", usual.crop))
    size = _side(fields.get("crop_size", side if convnext else 224), True)[0] if cropped else side
    resize, crop_pct = side, fields.get("crop_pct", 224 / 256)
    good_pct = not convnext or (_number(crop_pct) and 0 < crop_pct <= 1)
    if convnext:
        squash = side >= _CONVNEXT_WARPS
        resize = side if squash or not good_pct else int(side / crop_pct)
    factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
    resample = fields.get("resample", usual.resample)
    interpolation = RESAMPLE.get(resample, "") if isinstance(resample, int) else resample
    good_side = bool(side) and not (convnext and _is_square(fields["size"]))
    std = _listed(fields["image_std"])
    checks = (
        ("image_processor_type", name in _PROCESSORS, f"that of {', '.join(_PROCESSORS)}"),
        ("do_resize", fields.get("do_resize", True) is True, "true"),
        ("size", good_side, "a shortest_edge" + (", or a square" if not convnext else "")),
        ("do_center_crop", cropped or squash or convnext, "true where size is no square"),
        # ConvNext has cropped before; a second crop would round twice.
        ("crop_size", 0 < size <= side and (not convnext or size == side), "a square within size"),
        ("crop_pct", good_pct, "above 0 and at most 1"),
        ("rescale_factor", _number(factor) and factor > 0, "above 0"),
        ("resample", interpolation in INTERPOLATIONS, f"one of {RESAMPLE}"),
        ("image_mean", _channels(fields["image_mean"]), "one number per channel"),
        ("image_std", _channels(std) and min(std) > 0, "one number above 0 per channel"),
        *(
            (field, not value, "false or absent")
            for field, value in fields.items()
            if field not in _PIXELS | _NO_PIXELS
            and (field.startswith("do_") or field in ("rescale_offset", "offset", "size_divisor"))
        ),
    )
    _refuse(fields, checks, "preprocessor_config.json")
    unused = sorted(
        field
        for field, value in fields.items()
        if (field not in _PIXELS | _NO_PIXELS or (field == "crop_pct" and not convnext))
        and value is not False
    )
    if unused:
        notes.append(f"fields of preprocessor_config.json were not used: {_brief(unused)}")
    mean = _listed(fields["image_mean"])
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


def _refuse(fields: Mapping[str, Any], checks: Iterable[tuple[str, bool, str]], file: str) -> None:
    """Raises ValueError for the fields whose check failed.

    Args:
        fields: of the record, by name.
        checks: name of a field, whether it is good, and what it must be.
        file: name of the file.
    """
    problems = [
        f"{name} must be {wanted}, got {shortened(repr(fields.get(name)), 60)}"
        for name, good, wanted in checks
        if not good
    ]
    if problems:
        raise ValueError(
            f"{file} next to the weights asks for pixels that are not supported: "
            f"{shortened('; '.join(problems), 380)}; edit or remove it, and check the result's "
            "preprocessing"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return _number(value) and value == int(value) and value >= 1


def _listed(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _channels(value: Any) -> bool:
    return bool(_listed(value)) and all(map(_number, _listed(value)))


def _brief(names: Iterable[str]) -> str:
    return shortened(", ".join(names), 150)


def hf_class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in Hugging Face's ``id2label``; None if absent or only "LABEL_0", ....

    >>> hf_class_names({"id2label": {"1": "dog", "0": "cat"}})
    ('cat', 'dog')
    """
    labels = config.get("id2label")
    if not isinstance(labels, Mapping) or not labels:
        return None
    try:
        ordered = {int(number): str(name) for number, name in labels.items()}
    except ValueError as error:
        raise ValueError(f"id2label in config.json must have integer keys: {error}") from None
    if sorted(ordered) != list(range(len(ordered))):
        raise ValueError(
            f"id2label in config.json must have the keys 0 to {len(ordered) - 1}, got "
            f"{sorted(ordered)}"
        )
    if all(name == f"LABEL_{number}" for number, name in ordered.items()):
        return None
    return tuple(ordered[number] for number in range(len(ordered)))


def _side(size: Any, square: bool) -> tuple[int, bool]:
    """The side of a ``size`` in any of its forms, and whether both sides have it; 0 if unclear."""
    if isinstance(size, Mapping):
        size = {name: value for name, value in size.items() if value is not None}
        if set(size) == {"shortest_edge"}:
            return _pixels(size["shortest_edge"]), False
        if set(size) == {"height", "width"} and size["height"] == size["width"]:
            return _pixels(size["height"]), True
        return 0, False
    if isinstance(size, list | tuple):
        return (_pixels(size[0]), True) if size and size[0] == size[-1] else (0, False)
    return _pixels(size), square


def _pixels(value: Any) -> int:
    return int(value) if _whole(value) else 0


def _is_square(size: Any) -> bool:
    return _side(size, False)[1]


def _require(fields: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f"{what} next to the weights lacks {', '.join(missing)}")


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks that cannot be loaded, to be named in an error.

    Args:
        name: for a person, with its article.
        stated: pattern of timm's architecture or Hugging Face's model_type.
        keys: pattern of a key; "^" and "$" are the ends of a key.
    """

    name: str
    stated: str
    keys: str


FAMILIES: tuple[Family, ...] = (
    Family(
        "a detection model",
        "detr|rcnn|retinanet|yolo|detection",
        r"^roi_heads\.|\bbackbone\.bottom_up\.|^rpn\.|^head\.(classification|regression)_head\.|bbox_(embed|pred)|"
        r"^(model\.)?decoder\.layers\.\d+\.encoder_attn\.|^(model\.)+\d+\.cv1\.",
    ),
    Family("a SqueezeNet", "squeezenet", r"\.squeeze\.weight$"),
    Family("a VGG or AlexNet", "vgg|alexnet", r"^features\.0\.(weight|bias)$"),
    Family(
        "a segmentation model",
        "segformer|deeplab|fcn_|unet|upernet|mask2?former",
        r"^aux_classifier\.|^classifier\.4\.weight$|^segmentation_head\.|^decode_head\.|"
        r"\d\.patch_embeddings\.proj\.weight$",
    ),
    Family("a CLIP model", "clip", r"^text_model\.|^visual\.|^text_projection"),
    Family(
        "a DINOv3 network, a vision transformer or ConvNeXt",
        "dinov3",
        r"storage_tokens$|^rope_embed\.periods$|^(model\.)?layer\.\d+\.layer_scale1|"
        r"\A(?![\s\S]*pos_embed)(?=[\s\S]*gamma_1$)[\s\S]*^reg_token$",
    ),
    Family(
        "a DINOv2 network, a vision transformer",
        "dinov2",
        r"^blocks\.\d+\.ls1\.gamma$|\.layer_scale1\.lambda1$",
    ),
    Family("a BEiT network, a vision transformer", "beit", r"^beit\.|^blocks\.0\.gamma_1$"),
    Family("a MaxViT network", "maxvit|maxxvit|coatnet", r"\.attn_block\.attn\."),
    Family(
        "a Swin transformer",
        "swin",
        r"^swin(v2)?\.|relative_position_bias_table$|\.attn\.cpb_mlp\.",
    ),
    Family("an MLP-Mixer", "mixer", r"\.mlp_tokens\."),
    Family(
        "a ViT, a vision transformer",
        "vit|deit|eva|sam_|siglip",
        r"(cls|class)_token$|blocks\.\d+\.attn\.qkv\.|^(vit|deit)\.",
    ),
    Family(
        "a ConvNeXt network",
        "convnext",
        r"^convnext(v2)?\.|stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\.|"
        r"^features\.\d+\.\d+\.layer_scale$",
    ),
    Family(
        "a RegNet",
        "regnet",
        r"^s1\.b1\.conv1\.|^regnet\.|^trunk_output\.block1\.|\.layer\.2\.attention\.\d\.",
    ),
    Family("a DenseNet", "densenet", r"denseblock1\."),
    Family("a GhostNet", "ghostnet", r"\.ghost1\."),
    Family(
        "a MobileNet",
        "mobilenet|mnasnet",
        r"^mobilenet_v\d\.|^conv_head\.bias$|^features\.1\.(conv|block)\.0\.0\.|"
        r"^layers\.\d+\.\d+\.layers\.",
    ),
    Family(
        "an EfficientNet",
        "efficientnet",
        r"^efficientnet\.|^features\.1\.0\.block\.0\.0\.|^blocks\.0\.\d\.(se\.|conv\.weight$)",
    ),
    Family("a MobileNet", "mobilenet", r"^conv_stem\.weight$"),
    Family("an SKResNet", "^skres", r"layer1\.0\.conv\d\.paths\."),
    Family("a Res2Net", "^res2ne[xt]", r"layer1\.0\.convs\.0\."),
    Family("a ResNeSt", "^resnest", r"^layer1\.0\.conv2\.(radix|fc1|conv\.weight)"),
    Family(
        "a squeeze-and-excitation ResNet of timm's legacy names",
        "^legacy_se",
        r"^layer0\.conv1\.",
    ),
    Family("an NF-ResNet", "^nf_|^nfnet|^dm_nf", r"stem\.conv\d?\.gain$"),
    Family(
        "a network of timm's byobnet (CLIP, GC, bottleneck attention)",
        "^(gc|bat|ha|bo|lambda_)resne|_clip",
        r"\.conv1_1x1\.conv\.weight$",
    ),
    Family(
        "a ResNet of flax's examples, whose convolutions pad otherwise (SAME)",
        r"(?!)",
        r"(^|/)conv_init/kernel$|(^|/)(Bottleneck)?ResNetBlock_\d+/",
    ),
    Family(
        "a ResNet of haiku, whose convolutions pad otherwise (SAME)",
        r"(?!)",
        r"(^|/)~/initial_conv/w$|/~/block_group_0/~/block_0/",
    ),
    Family("an HRNet", "hrnet", r"^stage4\.0\.branches\."),
    Family("a ShuffleNet", "shufflenet", r"^stage2\.0\.branch1\."),
    Family("an Inception network", "inception|googlenet|xception", r"^Mixed_5b\.|^inception3a\."),
)
"""In the order in which they are tried: the first that fits is the answer."""

_INSIDE = re.compile(r"(.+[./])(layer1[./]0[./]conv1[./](weight|kernel))")


def family_text(arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str:
    """What a file holds that is no ResNet of ours, what can be loaded, and the nearest thing.

    Args:
        arrays: of the file, by key.
        settings: the ``config.json`` next to it; empty if there is none.

    Returns:
        The rest of a sentence that starts with the file; "" if nothing is recognized.

    >>> family_text({"blocks.0.attn.qkv.weight": np.ones((3, 1))}, {})[:46]
    'holds a ViT, a vision transformer (as its keys'
    """
    stated = settings.get("architecture") or settings.get("model_type")
    name = evidence = ""
    if isinstance(stated, str) and stated:
        found = (row.name for row in FAMILIES if re.search(row.stated, stated.lower()))
        name = next(found, "")
        evidence = f"config.json next to it states {shortened(stated, 40)!r}"
    first = next((key for key, a in arrays.items() if "layer1" in key and np.ndim(a) == 5), "")
    if not name and first:
        name, evidence = "a three-dimensional ResNet", f"{first} has five axes"
    if not name:
        name, evidence = _family_of_keys("\n".join(map(str, arrays)))
    if not name:
        return ""
    inside = next(filter(None, map(_INSIDE.fullmatch, map(str, arrays))), None)
    nearest = (
        f"its part under {shortened(inside[1], 60)!r} is a ResNet: save those keys alone"
        if inside is not None and not first
        else "take a ResNet of that size, such as hf://timm/resnet50.a1_in1k"
    )
    return (
        f"holds {name} ({evidence}), which cannot be loaded; ResNets, ResNeXts, wide, SE, ECA, RS, "
        "pre-activation and BiT networks of torchvision, timm, Hugging Face and Keras can; "
        f"{nearest}"
    )


def _family_of_keys(keys: str) -> tuple[str, str]:
    for row in FAMILIES:
        found = re.search(row.keys, keys, re.MULTILINE)
        if found is not None:
            line = keys[: found.end()].count("\n")
            return row.name, f"as its keys are like {shortened(keys.split(chr(10))[line], 60)}"
    return "", ""
