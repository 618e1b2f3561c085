"""Export to folders for timm and for transformers, each with its own ``config.json``.

``timm.create_model("local-dir:...", pretrained=True)`` and
``AutoModelForImageClassification.from_pretrained`` open them.

Reference: R. Wightman, "PyTorch Image Models", 2019-, ``timm/models/_hub.py``.
"""

import dataclasses
import importlib.resources
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


TIMM_FILES = ("model.safetensors", "config.json", *(f"{name}.py" for name in timm.OWN.values()))


def timm_files(checkpoint: Pretrained) -> tuple[dict[str, bytes], Pretrained]:
    """The files of the folder by name, and the checkpoint that they hold.

    Where timm's arguments do not suffice, a short Python file in the folder builds the network from
    timm's own blocks, under a name that timm does not know without it.

    Raises:
        ValueError: an adapter with tone curves, or a resize that timm cannot express.
    """
    checkpoint = without_stem_bias(canonicalize(checkpoint, exporting="timm"))
    lacking = _lacking(checkpoint.config)
    if not lacking and checkpoint.config.standardized:
        # Big Transfer's own networks, which standardize weights there.
        checkpoint = with_own_standardization(checkpoint, timm.V2_EPSILON)
    config = checkpoint.config
    base, arguments = _own_network(config) if lacking else _network(config)
    table, leaves = table_for(config), flatten(checkpoint.variables)
    arrays = key_map.to_keys(table, leaves)
    stem, notes, code = config.stem_channels[-1], [], {}
    if lacking:
        code = {f"{base}.py": _code(base)}
        values = {**vars(config), "stem_width": config.stem_width or config.width}
        told = ", ".join(f"{name}={values[name]!r}" for name in lacking)
        notes = [
            f"timm has no arguments for {told}: run `import {base}`, of {base}.py in the folder, "
            "before timm.create_model, which knows no such network otherwise"
        ]
    elif not config.preactivation and config.stem == "plain" and stem != timm.STEM_WIDTH:
        arrays = timm.widened(arrays, config)
        silent = timm.STEM_WIDTH - stem
        notes = [f"timm's stem has {timm.STEM_WIDTH} channels, of which {silent} are silent"]
    checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, *notes))
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
        **code,
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


def _lacking(config: ResNetConfig) -> list[str]:
    """The fields of a network for which timm has neither a name nor an argument.

    >>> _lacking(ResNetConfig("bottleneck", stride_in="1x1", stem_pool="ceil"))
    ['stride_in', 'stem_pool']
    """
    plain = ResNetConfig()
    fixed = ("stride_in", "stride_at", "stem_bias")
    found = [name for name in fixed if getattr(config, name) != getattr(plain, name)]
    if config.stem_pool == "ceil":
        found.append("stem_pool")
    if len(config.depths) < 4:
        found.append("depths")
    if config.preactivation:
        found += _rounded(config)
    elif not timm.takes_stem(config):
        found.append("stem_width")
    return found or ([] if _named(config) else _without_name(config))


def _named(config: ResNetConfig) -> bool:
    """Whether the arguments of some named architecture make a network."""
    return any(_same(known, config) for known in ARCHITECTURES.values())


def _without_name(config: ResNetConfig) -> list[str]:
    """The fields that only names set, and that no name has beside the others.

    >>> _without_name(ResNetConfig("bottleneck", attention="se", se_ratio=0.5))
    ['se_ratio']
    """
    plain = ResNetConfig()
    fields = ("standardized", "se_ratio", "anti_alias", "attention")
    odd = {name: getattr(plain, name) for name in fields}
    odd = {name: usual for name, usual in odd.items() if getattr(config, name) != usual}
    alone = [n for n, usual in odd.items() if _named(dataclasses.replace(config, **{n: usual}))]
    return alone[:1] or list(odd)


def _rounded(config: ResNetConfig) -> list[str]:
    """The fields of a pre-activation network whose channels timm rounds to multiples of 8."""
    found = ["stem_width"] if config.stem_channels[-1] % 8 or config.stem_channels[0] % 8 else []
    if config.width % 8:
        return [*found, "width"]
    uneven = any(config.inner(stage) % 8 for stage in range(1, 1 + len(config.depths)))
    return [*found, "base_width"] if uneven else found


def _network(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """The name of timm's nearest architecture, and the arguments that differ from it."""
    like = [name for name, known in ARCHITECTURES.items() if _same(known, config)]
    arguments = {name: _arguments(ARCHITECTURES[name], config) for name in like}
    base = min(like, key=lambda name: len(arguments[name]))
    return base, arguments[base]


def _own_network(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """The name that the file of ``_code`` gives a network, and the arguments of its function."""
    head = ("classes", "in_channels", "preactivation")
    fields = {name: value for name, value in config.to_json().items() if name not in head}
    return timm.OWN[config.preactivation], fields


def _code(name: str) -> bytes:
    """The Python file that teaches timm to build our networks under a name."""
    return (importlib.resources.files(__package__ or "") / f"{name}.py.txt").read_bytes()


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
