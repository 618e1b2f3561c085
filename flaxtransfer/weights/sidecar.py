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
from flaxtransfer.task import SINGLE_LABEL, TASKS, Task
from flaxtransfer.weights.naming.native import HEADER_KEY
from flaxtransfer.weights.preprocessing import (
    CROP_MODES,
    IMAGENET,
    INTERPOLATIONS,
    Preprocessing,
    are_numbers,
    is_number,
    listed,
    refuse_fields,
    whole,
)
from flaxtransfer.weights.readers.detect import Tensors

__all__ = [
    "FAMILIES",
    "Family",
    "beside",
    "family_text",
    "hf_class_names",
    "part_text",
    "read_json",
    "stated_task",
    "timm_architecture",
    "timm_class_names",
    "timm_preprocessing",
]


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


def beside(file: Tensors) -> Mapping[str, Any]:
    """The ``config.json`` next to a file; empty for ours, whose header states everything."""
    if file.settings is not None:
        return file.settings
    own = HEADER_KEY in file.metadata
    return {} if own else _in_one_form(read_json(file.path.with_name("config.json")))


def _in_one_form(config: dict[str, Any]) -> dict[str, Any]:
    """Timm's ``config.json`` in today's form: older ones are flat, and Hugging Face's wrapper
    leaves out what timm's defaults say.

    >>> flat = {"architecture": "resnet18", "mean": [0.5], "std": [0.5], "input_size": [3, 8, 8]}
    >>> list(_in_one_form(flat)), list(_in_one_form({"architecture": "of somebody's own"}))
    (['architecture', 'pretrained_cfg'], ['architecture'])
    """
    arguments = config.get("model_args")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(
            "model_args in config.json must be an object of arguments, got "
            f"{shortened(repr(arguments), 60)}"
        )
    if "pretrained_cfg" in config or "architecture" not in config:
        return config
    if config.get("model_type") == "timm_wrapper":
        return {**config, "pretrained_cfg": {}}
    if not config.keys() >= {"mean", "std", "input_size"}:
        return config
    fields = {name: value for name, value in config.items() if name != "architecture"}
    if "labels" in fields:
        fields["label_names"] = fields.pop("labels")
    given = {name: fields.pop(name) for name in ("model_args",) if name in fields}
    return {"architecture": config["architecture"], "pretrained_cfg": fields, **given}


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
    side, std = whole(size[1]) if square else 0, listed(fields["std"])
    checks = (
        ("input_size", bool(side), "[channels, side, side] of a square"),
        ("crop_pct", is_number(crop) and 0 < crop <= 1, "above 0 and at most 1"),
        ("crop_mode", fields["crop_mode"] in CROP_MODES, " or ".join(CROP_MODES)),
        ("interpolation", fields["interpolation"] in INTERPOLATIONS, ", ".join(INTERPOLATIONS)),
        ("mean", are_numbers(fields["mean"]), "one number per channel"),
        ("std", are_numbers(std) and min(std) > 0, "one number above 0 per channel"),
    )
    refuse_fields(fields, checks, "config.json")
    notes = []
    if absent := [name for name in names if stated.get(name) is None]:
        notes.append(f"timm's default {', '.join(absent)}, as config.json states none")
    if test := [name for name in ("test_input_size", "test_crop_pct") if fields.get(name)]:
        told = " and ".join(f"{name} {fields[name]}" for name in test)
        notes.append(f"timm's {told} are for evaluation on request (use_test_size) and unused")
    return Preprocessing(
        listed(fields["mean"]),
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
    name = config.get("architecture")
    return name if isinstance(name, str) else None, bool(altered)


def timm_class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The label names in timm's ``config.json``, in the order of the outputs; None if absent.

    Raises:
        ValueError: label names in another form than a list of text.
    """
    inner = config.get("pretrained_cfg")
    within = inner.get("label_names") if isinstance(inner, Mapping) else None
    names = config.get("label_names") or within
    return _named(names, "label_names") if names else None


_PROBLEMS = {"multi_label_classification": "multi_label", "regression": "regression"}
"""Tasks by what transformers calls them."""


def stated_task(config: Mapping[str, Any]) -> Task:
    """What the outputs of the head mean: one class per image, unless the file says otherwise.

    Transformers says it by ``problem_type``, our folders for timm by ``task``.

    >>> stated_task({"problem_type": "multi_label_classification"}).name
    'multi_label'
    >>> stated_task({}).name
    'single_label'
    """
    problem, own = config.get("problem_type"), config.get("task")
    named = _PROBLEMS.get(problem, own) if isinstance(problem, str) else own
    return TASKS.get(named, SINGLE_LABEL) if isinstance(named, str) else SINGLE_LABEL


def hf_class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in Hugging Face's ``id2label``, or else in its ``label2id``.

    Returns:
        In the order of the outputs; None if absent or only "LABEL_0", ....

    Raises:
        ValueError: numbers that are not those of the outputs.

    >>> hf_class_names({"id2label": {"1": "dog", "0": "cat"}})
    ('cat', 'dog')
    """
    labels, inverse = config.get("id2label"), config.get("label2id")
    if labels or not isinstance(inverse, Mapping):
        return _named(labels, "id2label") if labels else None
    numbers = {str(number): name for name, number in inverse.items()}
    if len(numbers) != len(inverse):
        raise ValueError("label2id in config.json must have one name for each number, got several")
    return _named(numbers, "label2id") if numbers else None


def _named(labels: Any, field: str) -> tuple[str, ...] | None:
    """Names by number, or in order; None where they say nothing.

    >>> _named({"0": "cat", "00": "dog"}, "id2label")
    Traceback (most recent call last):
    ValueError: id2label in config.json must name each number once, got 0, 00
    """
    if isinstance(labels, Mapping):
        try:
            ordered = {int(number): name for number, name in labels.items()}
        except ValueError as error:
            raise ValueError(f"{field} in config.json must have integer keys: {error}") from None
        if len(ordered) != len(labels):
            listing = shortened(", ".join(map(str, labels)), 100)
            raise ValueError(f"{field} in config.json must name each number once, got {listing}")
        absent = sorted({*range(len(ordered))} - ordered.keys())
        if absent:
            beyond = sorted(ordered.keys() - {*range(len(ordered))})
            raise ValueError(
                f"{field} in config.json must have the keys 0 to {len(ordered) - 1}, got "
                f"{shortened(', '.join(map(str, beyond)), 60)} instead of "
                f"{shortened(', '.join(map(str, absent)), 60)}"
            )
        names = [ordered[number] for number in range(len(ordered))]
    elif isinstance(labels, list | tuple):
        names = list(labels)
    else:
        raise ValueError(
            f"{field} in config.json must be names by number or a list, got "
            f"{shortened(repr(labels), 60)}"
        )
    strange = [name for name in names if not isinstance(name, str | int | float)]
    if strange:
        raise ValueError(
            f"{field} in config.json must hold names, got {shortened(repr(strange[0]), 60)}"
        )
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        return None
    return tuple(map(str, names))


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of networks that cannot be loaded, to be named in an error.

    Args:
        name: for a person, with its article.
        stated: pattern of timm's architecture or Hugging Face's model_type.
        keys: pattern of a key; "^" and "$" are the ends of a key.
        nearest: what to do instead.
    """

    name: str
    stated: str
    keys: str
    nearest: str = "take a ResNet of that size, such as hf://timm/resnet50.a1_in1k"


FAMILIES: tuple[Family, ...] = (
    Family(
        "a detection model",
        "detr|rcnn|retinanet|yolo|detection|^ssd|fcos",
        r"^roi_heads?\.|\bbackbone\.bottom_up\.|^rpn(_head)?\.|^bbox_head\.|^proposal_generator\.|^head\.(classification|regression)_head\.|bbox_(embed|pred)|"
        r"^(model\.)?decoder\.layers\.\d+\.encoder_attn\.|^(model\.)+\d+\.cv1\.",
    ),
    Family("a SqueezeNet", "squeezenet", r"\.squeeze\.weight$"),
    Family("a VGG or AlexNet", "vgg|alexnet", r"^features\.0\.(weight|bias)$"),
    Family(
        "a segmentation model",
        "segformer|deeplab|fcn_|unet|upernet|mask2?former",
        r"^aux_classifier\.|^classifier\.(4|low_classifier)\.weight$|^segmentation_head\.|"
        r"^(auxiliary|decode)_head\.|"
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
        "a DINOv2 network or another vision transformer with layer scale",
        "dinov2",
        r"^blocks\.\d+\.ls1\.gamma$|\.layer_scale1\.lambda1$",
    ),
    Family(
        "a BEiT or CaiT network, a vision transformer", "beit|cait", r"^beit\.|^blocks\.0\.gamma_1$"
    ),
    Family(
        "a MaxViT, CoAtNet or GCViT network",
        "maxvit|maxxvit|coatnet|gcvit",
        r"\.attn_block\.attn\.|\.MBconv\.|^stages\.\d\.blocks\.\d+\.attn\.rel_pos\.",
    ),
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
        r"^convnext(v2)?\.|\.layers\.\d+\.(pwconv\d|grn)\.|stages\.\d+\.(blocks\.)?\d+\.(conv_dw|dwconv)\.|"
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
    Family(
        "a BiT network under Hugging Face's names",
        "^bit$",
        r"^bit\.(embedder|encoder)\.",
        "take Google's own, such as hf://timm/resnetv2_50x1_bit.goog_in21k",
    ),
    Family("a DLA network", r"^dla\d", r"^level\d\.tree1\."),
    Family(
        "a ResNet under Detectron2's names, which do not say its strides and colors",
        r"(?!)",
        r"^res2\.0\.conv1\.norm\.",
        "take the file that it was made from, torchvision's or Microsoft's",
    ),
    Family("a DPN", r"^dpn\d", r"^features\.conv2_1\."),
    Family("a TResNet", "tresnet", r"^body\.(layer1\.0\.)?conv1\.(0|conv)\."),
    Family("a VoVNet", "vovnet", r"\.conv_mid\.0\."),
    Family("a MobileViT", "mobilevit", r"\.reduce_1x1\.|\.conv_kxk\."),
    Family("a ShuffleNet", "shufflenet", r"^stage2\.0\.branch1\."),
    Family(
        "an Inception or Xception network",
        "^inception_(v|resnet)|googlenet|xception",
        r"(?i)^mixed_5b\.|^inception3a\.|^blocks?\.?\d+\.(rep|stack)\.",
    ),
    Family(
        "a vision transformer or a relative of it",
        "former|^coat|^nest|twins|^pvt|focalnet|davit|hiera",
        r"(^|\.)patch_embed|\.(self_)?attn\.|\.layernorm_before\.|\.before_norm\.",
    ),
)
"""In the order in which they are tried: the first that fits is the answer."""

_WRAPPERS = re.compile(
    r"(?i)(?:(?:state_dict(_ema)?|(model|model_ema|ema|net|network|module|teacher|student)"
    r"(_state(_dict)?)?|base_model|backbone|(vision_|image_)?encoder|trunk|_orig_mod|state|params)"
    r"[./])*"
)
"""What programs put before the keys of a network."""


def _bare(name: str) -> str:
    """A key without what programs put before it.

    >>> _bare("state_dict/module.backbone.level2.tree1.conv1.weight"), _bare("models.0.weight")
    ('level2.tree1.conv1.weight', 'models.0.weight')
    """
    found = _WRAPPERS.match(name)
    return name[found.end() :] if found else name


_INSIDE = re.compile(r"(.+[./])(layer1[./]0[./]conv1[./](weight|kernel))")
_RESNET = re.compile(r"res_?ne|senet|timm_wrapper")


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
    found = _family(arrays, settings)
    if found is None:
        return ""
    row, evidence = found
    inside = next(filter(None, map(_INSIDE.fullmatch, map(str, arrays))), None)
    nearest = (
        f"its part under {shortened(inside[1], 60)!r} is a ResNet: save those keys alone"
        if inside is not None and row is not _VOLUMES
        else row.nearest
    )
    return (
        f"holds {row.name} ({evidence}), which cannot be loaded; ResNets, ResNeXts, wide, SE, ECA, "
        "RS, pre-activation and BiT networks of torchvision, timm, Hugging Face and Keras can; "
        f"{nearest}"
    )


def part_text(beside: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> str:
    """What a file is of which a part was loaded; "" if nothing is recognized.

    Args:
        beside: arrays around the network, by key.
        settings: the ``config.json`` next to the file.

    >>> part_text({"roi_heads.box_head.fc6.weight": np.ones(1)}, {})
    'the file holds a detection model (as its keys are like roi_heads.box_head.fc6.weight), ...'
    """
    stated = settings.get("architecture") or settings.get("model_type") or ""
    named = not beside and _RESNET.search(str(stated).lower())
    found = None if named else _family(beside, settings)
    if found is None:
        return ""
    row, evidence = found
    dilated = (
        "; most of these dilate their last stages, which is not applied here"
        if "segmentation" in row.name
        else ""
    )
    return f"the file holds {row.name} ({evidence}), of which the ResNet was taken{dilated}"


_VOLUMES = Family("a three-dimensional ResNet", "", "")


def _family(
    arrays: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> tuple[Family, str] | None:
    """The family of a file and how it shows: the config beside it, the axes, or the keys."""
    stated = settings.get("architecture") or settings.get("model_type")
    told = ""
    if isinstance(stated, str) and stated:
        told = f"config.json next to it states {shortened(stated, 40)!r}"
        for row in FAMILIES:
            if re.search(row.stated, stated.lower()):
                return row, told
    volumes = [key for key, array in arrays.items() if np.ndim(array) == 5]
    first = next((key for key in volumes if "layer1" in key), "")
    if first:
        return _VOLUMES, f"{shortened(first, 60)} has five axes"
    names = [str(name).replace("\n", " ") for name in arrays]
    # The patterns know where keys begin, which may be behind the names of wrappers.
    bare = list(map(_bare, names))
    for spelled in (names, bare) if bare != names else (names,):
        keys = "\n".join(spelled)
        for row in FAMILIES:
            found = re.search(row.keys, keys, re.MULTILINE)
            if found is not None:
                key = names[keys[: found.end()].count("\n")]
                evidence = f"as its keys are like {shortened(key, 60)}"
                unknown = told and not _RESNET.search(str(stated).lower())
                return row, f"{evidence}; {told}" if unknown else evidence
    if volumes:
        volume = dataclasses.replace(_VOLUMES, name="a three-dimensional network")
        return volume, f"{shortened(volumes[0], 60)} has five axes"
    return None
