"""Weight formats: one table row per naming, and the properties that a table cannot state."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import shortened
from flaxtransfer.weights.naming import huggingface, keras, key_map, native, timm, torchvision
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["FAMILIES", "FORMATS", "Family", "Format", "detect_naming", "family_text"]


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
    "torchvision": Format(lambda keys: torchvision.TABLE, prepare=timm.narrowed, variants=True),
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
}


def detect_naming(arrays: Arrays) -> str:
    """The format that matches most keys; the first of equal ones."""
    return max(FORMATS, key=lambda name: _matches(FORMATS[name], arrays))


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
        r"^roi_heads\.|^rpn\.|^head\.(classification|regression)_head\.|bbox_(embed|pred)|"
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
    Family("a RegNet", "regnet", r"^s1\.b1\.conv1\.|^regnet\.|^trunk_output\.block1\."),
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
    Family("an HRNet", "hrnet", r"^stage4\.0\.branches\."),
    Family("a ShuffleNet", "shufflenet", r"^stage2\.0\.branch1\."),
    Family("an Inception network", "inception|googlenet|xception", r"^Mixed_5b\.|^inception3a\."),
)
"""In the order in which they are tried: the first that fits is the answer."""

_INSIDE = re.compile(r"(.+[./])(layer1[./]0[./]conv1[./](weight|kernel))")


def family_text(arrays: Arrays, settings: Mapping[str, Any]) -> str:
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
