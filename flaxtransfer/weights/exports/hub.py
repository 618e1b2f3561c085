"""Export to folders for timm and for transformers, each with its own ``config.json``.

``timm.create_model("local-dir:...", pretrained=True)`` and
``AutoModelForImageClassification.from_pretrained`` open them.

Reference: R. Wightman, "PyTorch Image Models", 2019-, ``timm/models/_hub.py``.
"""

import dataclasses
import json
import math
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES
from flaxtransfer.paths import flatten
from flaxtransfer.weights.exports.prepare import (
    OUTPUTS,
    canonicalize,
    with_own_standardization,
    without_stem_bias,
)
from flaxtransfer.weights.naming import huggingface, key_map, timm
from flaxtransfer.weights.naming.timm import table_for
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.readers import array_files

__all__ = ["HUGGINGFACE_FILES", "TIMM_FILES", "huggingface_files", "timm_files"]


TIMM_FILES = ("model.safetensors", "config.json")


def timm_files(checkpoint: Pretrained) -> tuple[dict[str, bytes], Pretrained]:
    """The files of the folder by name, and the checkpoint that they hold.

    Raises:
        ValueError: a network that timm lacks, or a resize that timm cannot express.
    """
    checkpoint = without_stem_bias(canonicalize(checkpoint, exporting="timm"))
    # Only Big Transfer's own networks standardize weights there.
    bit = any(_same(known, checkpoint.config) for known in ARCHITECTURES.values())
    checkpoint = with_own_standardization(checkpoint, timm.V2_EPSILON if bit else None)
    config = checkpoint.config
    base, arguments = _network(config)
    table, leaves = table_for(config), flatten(checkpoint.variables)
    arrays = key_map.to_keys(table, leaves)
    stem = config.stem_channels[-1]
    if not config.preactivation and config.stem == "plain" and stem != timm.STEM_WIDTH:
        arrays = timm.widened(arrays, config)
        silent = timm.STEM_WIDTH - stem
        note = f"timm's stem has {timm.STEM_WIDTH} channels, of which {silent} are silent"
        checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, note))
    preprocessing = checkpoint.preprocessing
    labels = {"label_names": list(checkpoint.class_names)} if checkpoint.class_names else {}
    single = checkpoint.task.name == "single_label"
    task = checkpoint.task.name
    outputs = {} if single else {"task": task, "outputs": OUTPUTS[task]}
    first, last = (
        next(iter(key_map.to_keys(table, {leaf: leaves[leaf]}))).removesuffix(".weight")
        for leaf in (f"params/{config.first_kernel}", "params/fc/kernel")
    )
    settings = {
        "architecture": base,
        "num_classes": config.classes,
        "num_features": config.features,
        **labels,
        **outputs,
        "pretrained_cfg": {
            "num_classes": config.classes,
            "input_size": [config.in_channels, preprocessing.size, preprocessing.size],
            "pool_size": [math.ceil(preprocessing.size / 32)] * 2,
            "crop_pct": _crop(preprocessing),
            "crop_mode": preprocessing.crop_mode,
            "interpolation": preprocessing.interpolation,
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "first_conv": first,
            "classifier": last,
            "fixed_input_size": False,
            **labels,
        },
        "model_args": arguments,
    }
    return {
        "model.safetensors": array_files.write_safetensors(arrays, {"format": "pt"}),
        "config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }, checkpoint


def _crop(preprocessing: Preprocessing) -> float:
    """Timm's ``crop_pct``, such that it resizes to exactly our size."""
    share = preprocessing.size / preprocessing.resize
    for candidate in (share, math.nextafter(share, 0), math.nextafter(share, 1)):
        if math.floor(preprocessing.size / candidate) == preprocessing.resize:
            return candidate
    raise ValueError(
        f"timm has no crop_pct for size {preprocessing.size} and resize {preprocessing.resize}"
    )


def _network(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """The name of timm's nearest architecture, and the arguments that differ from it.

    Raises:
        ValueError: a network that timm cannot build.
    """
    problem = _alien(config) or (_alien_v2(config) if config.preactivation else "")
    like = [name for name, known in ARCHITECTURES.items() if _same(known, config)]
    if not problem and not like:
        # The fields that only the name of an architecture sets.
        fields = ("block", "anti_alias", "attention", "se_ratio", "norm", "standardized")
        parts = (f"{name}={getattr(config, name)!r}" for name in fields if _unusual(config, name))
        problem = f"with {', '.join(parts)}"
    if problem:
        near = vars(_nearest(config))
        other = [f"{name}={value!r}" for name, value in near.items() if value != vars(config)[name]]
        hint = f"; the nearest has {', '.join(other)}" if other else ""
        raise ValueError(f"timm has no network {problem}, which {config.name} has{hint}; {_OTHERS}")
    arguments = {name: _arguments(ARCHITECTURES[name], config) for name in like}
    base = min(like, key=lambda name: len(arguments[name]))
    return base, arguments[base]


def _nearest(config: ResNetConfig) -> ResNetConfig:
    """The nearest network that timm builds; the same for fewer stages, of which it has none.

    >>> _nearest(ResNetConfig("bottleneck", stride_in="1x1", stem_pool="ceil")).name
    'resnet26'
    """
    if len(config.depths) < 4:
        return config
    plain = ResNetConfig()
    near = dataclasses.replace(
        config,
        **{name: getattr(plain, name) for name in ("stride_in", "stride_at", "stem_bias")},
        stem_pool="max" if config.stem_pool == "ceil" else config.stem_pool,
    )
    if near.preactivation:
        near = _divisible(near)
    elif near.stem == "plain" and timm.stem_problem(near):
        near = dataclasses.replace(near, stem_width=timm.STEM_WIDTH)
    # Only names set the ratio of the hidden channels.
    ratios = sorted(
        {each.se_ratio for each in ARCHITECTURES.values()},
        key=lambda ratio: abs(math.log(ratio / near.se_ratio)),
    )
    others = [dataclasses.replace(near, se_ratio=ratio) for ratio in (near.se_ratio, *ratios)]
    built = (o for o in others if any(_same(known, o) for known in ARCHITECTURES.values()))
    return next(built, near)


def _divisible(config: ResNetConfig) -> ResNetConfig:
    """The nearest pre-activation network whose channels are those of timm's."""

    def near(number: int) -> list[int]:
        return sorted(range(8, 513, 8), key=lambda other: abs(math.log(other / number)))

    if config.stem_channels[-1] % 8:
        config = dataclasses.replace(config, stem_width=near(config.stem_width or config.width)[0])
    sizes = [(width, base) for width in near(config.width)[:3] for base in near(config.base_width)]
    found = (
        dataclasses.replace(config, width=width, base_width=base)
        for width, base in [(config.width, config.base_width), *sizes]
    )
    return next((other for other in found if not _alien_v2(other)), config)


_OTHERS = "use --to onnx or stablehlo, or huggingface for plain stems and blocks"


def _unusual(config: ResNetConfig, name: str) -> bool:
    return name == "block" or getattr(config, name) != getattr(ResNetConfig(), name)


def _alien(config: ResNetConfig) -> str:
    """What of a network no argument and no name of timm's sets; "" for nothing."""
    plain = ResNetConfig()
    if len(config.depths) < 4:
        return f"of {len(config.depths)} stages"
    words = {
        "stride_in": "the stride in the first convolution",
        "stride_at": "the stride in the last block",
        "stem_bias": "a bias in the stem that no running mean absorbs",
    }
    found = (
        f"with {name}={getattr(config, name)!r} ({text})"
        for name, text in words.items()
        if getattr(config, name) != getattr(plain, name)
    )
    if config.stem_pool == "ceil":
        return "with stem_pool='ceil' (a stem pool that is not padded)"
    return next(found, "")


def _alien_v2(config: ResNetConfig) -> str:
    """What of a pre-activation network timm cannot build; "" for nothing."""
    channels = _all_arguments(config)
    numbers = [channels["stem_chs"], *channels["channels"], *map(config.inner, (1, 2, 3, 4))]
    if any(number % 8 for number in numbers):
        return (
            "with stem_width, width or base_width that give pre-activation blocks channels that "
            f"are no multiples of 8 ({numbers})"
        )
    ratio = channels["bottle_ratio"]
    middle = [round(ratio * outer / 8) * 8 for outer in channels["channels"]]
    if config.block == "bottleneck" and middle != [config.inner(stage) for stage in (1, 2, 3, 4)]:
        return (
            f"with base_width={config.base_width} (pre-activation blocks whose middle has "
            f"{numbers[5:]} channels)"
        )
    return ""


def _same(known: ResNetConfig, config: ResNetConfig) -> bool:
    """Whether arguments can make a network of a named architecture."""
    if (known.preactivation, bool(known.standardized)) != (
        config.preactivation,
        bool(config.standardized),
    ):
        return False
    if not config.preactivation:
        ratio = config.attention == "se" and config.se_ratio != ResNetConfig().se_ratio
        wanted = (config.attention, config.se_ratio)
        return (known.block, known.anti_alias) == (config.block, config.anti_alias) and (
            not ratio or (known.attention, known.se_ratio) == wanted
        )
    if not known.standardized:
        return True
    if (config.stem, config.stem_pool, config.shortcut) != ("plain", "zero-padded", "convolution"):
        return False
    # Their arguments are multiplied by the factor in the name.
    factor = known.width // 64
    return (
        known.name.split("_")[1] in _BITS
        and (known.block, known.depths) == (config.block, config.depths)
        and config.width % factor == 0
        and config.stem_channels[0] % factor == 0
    )


_BITS = {"50x1", "50x3", "101x1", "101x3", "152x2", "152x4"}
"""The networks of Big Transfer in timm."""


def _arguments(known: ResNetConfig, config: ResNetConfig) -> dict[str, Any]:
    """The arguments of timm's network that differ from a named architecture."""
    own, theirs = _all_arguments(config), _all_arguments(known)
    changed = {name: value for name, value in own.items() if value != theirs[name]}
    if "block_args" in changed:
        attention, _ = changed["block_args"]
        changed["block_args"] = {"attn_layer": attention} if attention else {}
    factor = known.width // 64 if known.standardized else 1
    if "stem_chs" in changed:
        changed["stem_chs"] //= factor
    if "channels" in changed:
        changed["channels"] = [channels // factor for channels in changed["channels"]]
    return changed


def _all_arguments(config: ResNetConfig) -> dict[str, Any]:
    widths = [config.width * 2**stage for stage in range(4)]
    deep = config.stem != "plain"
    shared = {
        "layers": list(config.depths),
        "avg_down": config.shortcut == "average",
        "norm_layer": "groupnorm" if config.norm == "group" else "batchnorm2d",
    }
    if config.preactivation:
        padded = "fixed" if config.stem_pool == "zero-padded" else ""
        kind = config.stem if deep else ""
        outer = [width * config.expansion for width in widths]
        return {
            **shared,
            "channels": outer,
            "stem_chs": config.stem_channels[-1],
            "stem_type": "_".join(filter(None, (kind, padded))),
            "basic": config.block == "basic",
            "bottle_ratio": config.inner(1) / outer[0],
        }
    return {
        **shared,
        "channels": widths,
        "cardinality": config.groups,
        "base_width": config.base_width,
        "stem_type": {"plain": "", "deep": "deep", "tiered": "deep_tiered"}[config.stem],
        "stem_width": config.stem_width if deep else 64,
        "replace_stem_pool": config.stem_pool == "convolution",
        "down_kernel_size": config.shortcut_kernel,
        "block_reduce_first": config.reduce_first,
        # timm's strings have the usual ratio of the hidden channels.
        "block_args": (config.attention, config.se_ratio if config.attention == "se" else None),
    }


HUGGINGFACE_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")

_PROBLEMS = {"multi_label": "multi_label_classification", "regression": "regression"}
"""What transformers calls the tasks, where it is not one class per image."""


def huggingface_files(checkpoint: Pretrained) -> tuple[dict[str, bytes], Pretrained]:
    """The files of the folder by name, and the checkpoint that they hold.

    Raises:
        ValueError: a network that transformers' ResNet cannot represent.
    """
    checkpoint = canonicalize(checkpoint, exporting="Hugging Face's ResNet")
    config = checkpoint.config
    _check_huggingface(config)
    arrays = key_map.to_keys(huggingface.TABLE, flatten(checkpoint.variables))
    # transformers requires all names, including the batch counters of BatchNorms.
    arrays |= {
        key.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64)
        for key in arrays
        if key.endswith(".running_mean")
    }
    names = checkpoint.class_names or [f"LABEL_{number}" for number in range(config.classes)]
    settings = {
        "architectures": ["ResNetForImageClassification"],
        "model_type": "resnet",
        "num_channels": config.in_channels,
        "embedding_size": config.stem_channels[-1],
        "hidden_sizes": [config.width * 2**stage * config.expansion for stage in range(4)],
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": config.stride_in == "1x1",
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "dtype": "float32",
    }
    if checkpoint.task.name in _PROBLEMS:
        settings["problem_type"] = _PROBLEMS[checkpoint.task.name]
    return {
        "model.safetensors": array_files.write_safetensors(arrays, {"format": "pt"}),
        "config.json": _json(settings),
        "preprocessor_config.json": _json(_processor(checkpoint.preprocessing)),
    }, checkpoint


def _check_huggingface(config: ResNetConfig) -> None:
    plain = ResNetConfig()
    if len(config.depths) < 4:
        raise ValueError(
            f"transformers' ResNet has 4 stages, and {config.name} {len(config.depths)}; use --to "
            "onnx or stablehlo"
        )
    own = {"block", "depths", "width", "classes", "in_channels", "stride_in"}
    own |= {"stem_width"} if config.stem == "plain" else set()
    foreign = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in own and getattr(config, field.name) != getattr(plain, field.name)
    }
    if foreign:
        words = ", ".join(f"{name} {value}" for name, value in foreign.items())
        raise ValueError(
            f"transformers' ResNet does not support {words} of {config.name}; use --to timm, onnx "
            "or stablehlo"
        )


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    # BiT's processor equals a `Preprocessing`. ConvNext's, which the published ResNets use, warps
    # images from 384 px on.
    numbers = {name: number for number, name in huggingface.RESAMPLE.items()}
    resize = preprocessing.resize
    squash = preprocessing.crop_mode == "squash"
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"height": resize, "width": resize} if squash else {"shortest_edge": resize},
        "resample": numbers[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": preprocessing.size, "width": preprocessing.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_convert_rgb": len(preprocessing.mean) == 3,
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
