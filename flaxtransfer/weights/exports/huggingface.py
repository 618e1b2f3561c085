"""Export to a folder for ``AutoModelForImageClassification.from_pretrained``."""

import dataclasses
import json
from typing import Any

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.paths import flatten
from flaxtransfer.weights.exports.prepare import canonicalize
from flaxtransfer.weights.naming import huggingface, key_map
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.readers import safetensors_file

__all__ = ["NAMES", "files"]


NAMES = ("model.safetensors", "config.json", "preprocessor_config.json")

_PROBLEMS = {"multi_label": "multi_label_classification", "regression": "regression"}
"""What transformers calls the tasks, where it is not one class per image."""


def files(checkpoint: Pretrained) -> tuple[dict[str, bytes], Pretrained]:
    """The files of the folder by name, and the checkpoint that they hold.

    Raises:
        ValueError: a network that transformers' ResNet cannot represent.
    """
    checkpoint = canonicalize(checkpoint, exporting="Hugging Face's ResNet")
    config = checkpoint.config
    _check(config)
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
        "model.safetensors": safetensors_file.write_safetensors(arrays, {"format": "pt"}),
        "config.json": _json(settings),
        "preprocessor_config.json": _json(_processor(checkpoint.preprocessing)),
    }, checkpoint


def _check(config: ResNetConfig) -> None:
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
