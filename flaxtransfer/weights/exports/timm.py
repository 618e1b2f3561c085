"""Export to a folder for ``timm.create_model("local-dir:...", pretrained=True)``.

Reference: R. Wightman, "PyTorch Image Models", 2019-, ``timm/models/_hub.py``.
"""

import dataclasses
import json
import math
from typing import Any

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import ARCHITECTURES
from flaxtransfer.paths import flatten
from flaxtransfer.weights.exports.prepare import canonicalize, with_own_standardization
from flaxtransfer.weights.naming import key_map, timm
from flaxtransfer.weights.naming.timm import table_for
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.readers import safetensors_file

__all__ = ["NAMES", "files"]


NAMES = ("model.safetensors", "config.json")


def files(checkpoint: Pretrained) -> tuple[dict[str, bytes], Pretrained]:
    """The files of the folder by name, and the checkpoint that they hold.

    Raises:
        ValueError: a network that timm lacks, or a resize that timm cannot express.
    """
    checkpoint = with_own_standardization(
        canonicalize(checkpoint, exporting="timm"), timm.V2_EPSILON
    )
    config = checkpoint.config
    base, arguments = _network(config)
    table, leaves = table_for(config), flatten(checkpoint.variables)
    arrays = key_map.to_keys(table, leaves)
    if not config.preactivation and config.stem == "plain" and config.width != timm.STEM_WIDTH:
        arrays = timm.widened(arrays, config)
        silent = timm.STEM_WIDTH - config.width
        note = f"timm's stem has {timm.STEM_WIDTH} channels, of which {silent} are silent"
        checkpoint = dataclasses.replace(checkpoint, notes=(*checkpoint.notes, note))
    preprocessing = checkpoint.preprocessing
    labels = {"label_names": list(checkpoint.class_names)} if checkpoint.class_names else {}
    first, last = (
        next(iter(key_map.to_keys(table, {leaf: leaves[leaf]}))).removesuffix(".weight")
        for leaf in (f"params/{config.first_kernel}", "params/fc/kernel")
    )
    settings = {
        "architecture": base,
        "num_classes": config.classes,
        "num_features": config.features,
        **labels,
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
        "model.safetensors": safetensors_file.write_safetensors(arrays, {"format": "pt"}),
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


# Fields that JSON arguments cannot set, so the name of an architecture must imply them.
_IMPLIED_BY_NAME = (
    "block",
    "attention",
    "se_ratio",
    "anti_alias",
    "norm",
    "preactivation",
    "standardized",
    "stem_pool",
)


def _network(config: ResNetConfig) -> tuple[str, dict[str, Any]]:
    """The name of timm's nearest architecture, and the arguments that differ from it."""
    alien = {
        "stride_in": "the stride in the first convolution",
        "stride_at": "the stride in the last block",
        "stem_bias": "a bias in the stem",
    }
    for field, words in alien.items():
        if getattr(config, field) != getattr(ResNetConfig(), field):
            raise ValueError(
                f"timm has no network with {words}, which {config.name} has; use --to onnx or "
                "stablehlo" + (", or huggingface" if field == "stride_in" else "")
            )
    like = [name for name, known in ARCHITECTURES.items() if _same(known, config)]
    if not like:
        raise ValueError(f"timm has no network like {config.name}; use --to onnx or stablehlo")
    arguments = {name: _arguments(ARCHITECTURES[name], config) for name in like}
    base = min(like, key=lambda name: len(arguments[name]))
    if config.standardized and arguments[base]:
        raise ValueError(
            f"of Big Transfer timm only has {', '.join(like)}, not {config.name}; use --to onnx or "
            "stablehlo"
        )
    if config.preactivation and (config.groups, config.base_width) != (1, 64):
        raise ValueError("timm's pre-activation networks have neither groups nor base_width")
    return base, arguments[base]


def _same(known: ResNetConfig, config: ResNetConfig) -> bool:
    def parts(of: ResNetConfig) -> list[Any]:
        return [
            bool(of.standardized) if name == "standardized" else getattr(of, name)
            for name in _IMPLIED_BY_NAME
        ]

    # The networks of Big Transfer in timm.
    bits = {"50x1", "50x3", "101x1", "101x3", "152x2", "152x4"}
    absent = known.standardized and known.name.split("_")[1] not in bits
    return not absent and parts(known) == parts(config)


def _arguments(known: ResNetConfig, config: ResNetConfig) -> dict[str, Any]:
    """The arguments of timm's network that differ from a named architecture."""
    own, theirs = _all_arguments(config), _all_arguments(known)
    return {name: value for name, value in own.items() if value != theirs[name]}


def _all_arguments(config: ResNetConfig) -> dict[str, Any]:
    stems = {"plain": "", "deep": "deep", "tiered": "deep_tiered"}
    widths = [config.width * 2**stage for stage in range(4)]
    pooled = config.shortcut == "average"
    if config.preactivation:
        stem = {"deep": "deep", "tiered": "tiered"}.get(config.stem, "")
        return {
            "layers": list(config.depths),
            "channels": [width * config.expansion for width in widths],
            "stem_chs": config.stem_channels[-1],
            "stem_type": stem,
            "avg_down": pooled,
        }
    return {
        "layers": list(config.depths),
        "channels": widths,
        "cardinality": config.groups,
        "base_width": config.base_width,
        "stem_type": stems[config.stem],
        "stem_width": config.stem_width or 64,
        "avg_down": pooled,
        "down_kernel_size": config.shortcut_kernel,
        "block_reduce_first": config.reduce_first,
    }
