"""Files that torchvision, timm and transformers wrote give the logits that those gave.

The logits come from the peers themselves: `tests/golden/make_golden.py`.
"""

import dataclasses

import jax
import numpy as np
import pytest

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.models.registry import resnet
from flaxtransfer.weights import IMAGENET, load

BICUBIC = dataclasses.replace(IMAGENET, interpolation="bicubic")
LABELS = ("anther", "bract", "calyx")

# folder: the network, its file's naming, its preprocessing, its class names
EXPECTED = {
    "torchvision_basic": (
        ResNetConfig("basic", (1, 2, 1, 1), 4, classes=7),
        "torchvision",
        IMAGENET,
        None,
    ),
    "torchvision_bottleneck": (
        ResNetConfig("bottleneck", (2, 1, 1, 1), 4, classes=5),
        "torchvision",
        IMAGENET,
        None,
    ),
    "torchvision_grouped": (
        ResNetConfig("bottleneck", (1, 1, 1, 1), 4, 32, 4, classes=6, in_channels=2),
        "torchvision",
        dataclasses.replace(IMAGENET, mean=(0.0, 0.0), std=(1.0, 1.0)),
        None,
    ),
    # crop_pct 0.95 of 224 px, as timm's a1 recipe has it: floor(224 / 0.95) = 235.
    "timm": (
        ResNetConfig("bottleneck", (1, 1, 1, 1), 4, classes=8),
        "torchvision",
        dataclasses.replace(BICUBIC, resize=235),
        None,
    ),
    "huggingface_basic": (
        ResNetConfig("basic", (1, 1, 2, 1), 4, classes=3),
        "huggingface",
        dataclasses.replace(BICUBIC, processor="huggingface"),
        LABELS,
    ),
    "huggingface_bottleneck": (
        ResNetConfig("bottleneck", (1, 2, 1, 1), 4, classes=3),
        "huggingface",
        dataclasses.replace(BICUBIC, processor="huggingface"),
        LABELS,
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_gives_the_logits_of_the_library_that_wrote_it(golden, name):
    checkpoint = load(golden / name / "model.safetensors")
    peer = np.load(golden / name / "logits.npz")
    ours, _ = jax.jit(resnet(checkpoint.config).apply)(checkpoint.variables, peer["images"])
    assert np.abs(ours - peer["logits"]).max() <= 5e-6 * np.abs(peer["logits"]).max()


@pytest.mark.parametrize("name", EXPECTED)
def test_says_what_the_file_is(golden, name):
    checkpoint = load(golden / name / "model.safetensors")
    config, format, preprocessing, class_names = EXPECTED[name]
    assert checkpoint.config == config
    assert checkpoint.format == format
    assert checkpoint.preprocessing == preprocessing
    assert checkpoint.class_names == class_names
    assert checkpoint.config.name in repr(checkpoint)
    assert format in repr(checkpoint)


def test_the_logits_would_tell_exchanged_statistics(golden):
    # The golden comparison has power only if a wrong statistic shows.
    checkpoint = load(golden / "torchvision_basic" / "model.safetensors")
    peer = np.load(golden / "torchvision_basic" / "logits.npz")
    statistics = checkpoint.variables["batch_stats"]["layer3"]["0"]["bn2"]
    statistics["mean"], statistics["var"] = statistics["var"], statistics["mean"] ** 2
    ours, _ = jax.jit(resnet(checkpoint.config).apply)(checkpoint.variables, peer["images"])
    assert np.abs(ours - peer["logits"]).max() > 1e-3 * np.abs(peer["logits"]).max()


def test_a_folder_stands_for_the_file_in_it(golden):
    folder = load(golden / "timm")
    file = load(golden / "timm" / "model.safetensors")
    assert (folder.sha256, folder.preprocessing) == (file.sha256, file.preprocessing)
