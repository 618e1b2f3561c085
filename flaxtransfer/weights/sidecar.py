"""Sidecar files: preprocessing, class names and architecture in the JSON files next to weights.

timm stores everything in ``config.json``. Hugging Face stores the graph and the labels there, and
the preprocessing in ``preprocessor_config.json``. Other JSON files with these names are ignored.
``family_text`` names a file that is no ResNet, from these files or from its keys.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer import files
from flaxtransfer.paths import shortened
from flaxtransfer.weights.preprocessing import Preprocessing
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

    >>> timm_preprocessing({"pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 0.95,
    ...     "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}})[0].resize
    235
    """
    fields = config.get("pretrained_cfg")
    if not isinstance(fields, Mapping) or "mean" not in fields:
        return None
    _require(fields, ("input_size", "mean", "std"), "timm's pretrained_cfg")
    size = fields["input_size"][-1]
    notes = []
    if fields.get("crop_mode", "center") != "center":
        notes.append(f"timm's crop_mode {fields['crop_mode']!r} is replaced by a center crop")
    return Preprocessing(
        fields["mean"],
        fields["std"],
        size=size,
        resize=max(size, math.floor(size / fields.get("crop_pct", 0.875))),
        interpolation=fields.get("interpolation", "bicubic"),
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


def hf_preprocessing(config: Mapping[str, Any]) -> tuple[Preprocessing, list[str]] | None:
    """The preprocessing in Hugging Face's ``preprocessor_config.json``, and notes; None if absent.

    >>> hf_preprocessing({"image_mean": [0.5], "image_std": [0.5], "crop_pct": 0.875,
    ...     "size": {"shortest_edge": 224}, "resample": 3})[0]
    Preprocessing(mean=(0.5,), std=(0.5,), size=224, resize=256, interpolation='bicubic')
    """
    if "image_mean" not in config and "size" not in config:
        return None
    _require(config, ("size", "image_mean", "image_std"), "preprocessor_config.json")
    notes = []
    shortest = _side(config["size"])
    if config.get("do_center_crop") and "crop_size" in config:
        size, resize = _side(config["crop_size"]), shortest
    elif shortest < _CONVNEXT_WARPS:
        # Without crop_pct the processor uses this default.
        size = shortest
        resize = int(shortest / (config.get("crop_pct") or 224 / 256))
    else:
        size = resize = shortest
        notes.append("the image processor's warp to a square is replaced by a center crop")
    mean, std = config["image_mean"], config["image_std"]
    if not config.get("do_normalize", True):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    resample = config.get("resample", 3)
    return Preprocessing(
        mean, std, size=size, resize=resize, interpolation=RESAMPLE.get(resample, str(resample))
    ), notes


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


def _side(size: Any) -> int:
    """The side in pixels, in any of the forms of ``size``."""
    if isinstance(size, Mapping):
        for name in ("shortest_edge", "height"):
            if name in size:
                return int(size[name])
        raise ValueError(
            f"size in preprocessor_config.json must have shortest_edge or height, got {dict(size)}"
        )
    return int(size)


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
