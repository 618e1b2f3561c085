"""Files that only one program or library writes: ``PROGRAMS``, by what wrote them."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_files import (
    CLASSES,
    SIZE,
    Written,
    of_timm,
    of_torchvision,
    prefixed,
    randomize,
    saved,
    timm,
    torchvision,
    transformers,
)
from torch import nn

import flaxtransfer as ft

PROGRAMS: dict[str, Callable[[Path], Written]] = {}


def program(name: str) -> Callable[[Callable[[Path], Written]], Callable[[Path], Written]]:
    def register(function: Callable[[Path], Written]) -> Callable[[Path], Written]:
        PROGRAMS[name] = function
        return function

    return register


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomize(make(), seed)


def _timm_folder(name: str, expected: str = "logits", **options: Any) -> None:
    @program(f"timm save_for_hf: {name}{f', {options}' if options else ''}")
    def _(to: Path) -> Written:
        net = seeded(lambda: of_timm(name, **options))
        timm.models.save_for_hf(net, to, model_args=options or None)
        return Written(to, expected, net)


for _folder in ("resnet10t", "resnetaa34d", "resnetblur18", "seresnet18", "resnetv2_18"):
    _timm_folder(_folder)
_timm_folder("resnet18", "refused", act_layer="silu")
_timm_folder("resnet18", "refused", global_pool="max")
_timm_folder("resnet26", "refused", output_stride=8)
_timm_folder("resnet26", cardinality=32, base_width=4)


@program("timm resnetv2_50x1_bit cut to one block a stage, said by model=")
def _(to: Path) -> Written:
    layers = timm.layers
    net = seeded(
        lambda: timm.models.resnetv2.ResNetV2(
            [1, 1, 1, 1],
            num_classes=CLASSES,
            stem_type="fixed",
            conv_layer=functools.partial(layers.StdConv2d, eps=1e-8),
            norm_layer=functools.partial(layers.GroupNormAct, num_groups=32),
        )
    )
    config = ft.models.ResNetConfig(
        "bottleneck",
        (1, 1, 1, 1),
        classes=CLASSES,
        preactivation=True,
        norm="group",
        standardized=1e-8,
        stem_pool="zero-padded",
    )
    return Written(saved(to, net.state_dict()), network=net, options={"model": config})


@program("timm resnet50_gn cut to one block a stage, said by model=")
def _(to: Path) -> Written:
    net = seeded(lambda: of_timm("resnet50_gn", layers=[1, 1, 1, 1]))
    config = ft.models.ResNetConfig("bottleneck", (1, 1, 1, 1), norm="group", classes=CLASSES)
    return Written(saved(to, net.state_dict()), network=net, options={"model": config})


def _transformers_folder(expected: str = "logits", shards: bool = False, **options: Any) -> None:
    said = f", {options}" if options else ", in shards" if shards else ""

    @program(f"transformers save_pretrained{said}")
    def _(to: Path) -> Written:
        sizes = {"depths": [1, 1, 1, 1], "embedding_size": 16, "hidden_sizes": [32, 64, 128, 256]}
        config = transformers.ResNetConfig(num_labels=CLASSES, **(sizes | options))
        net = seeded(lambda: transformers.ResNetForImageClassification(config))
        net.save_pretrained(to, max_shard_size="1MB" if shards else "5GB")
        return Written(to, expected, net)


_transformers_folder()
_transformers_folder(shards=True)
_transformers_folder(layer_type="basic", hidden_sizes=[16, 32, 64, 128])
_transformers_folder(downsample_in_bottleneck=True)
_transformers_folder("refused", hidden_act="gelu")
_transformers_folder("any", downsample_in_first_stage=True)


@program("transformers ResNetModel, without a head")
def _(to: Path) -> Written:
    config = transformers.ResNetConfig(
        depths=[1, 1, 1, 1], embedding_size=16, hidden_sizes=[32, 64, 128, 256]
    )
    net = seeded(lambda: transformers.ResNetModel(config))
    net.save_pretrained(to)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.fc = net, nn.Identity()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.flatten(self.net(images).pooler_output, 1))

    return Written(to, "features", Pooled().eval())


def basic() -> nn.Module:
    return seeded(lambda: of_torchvision("BasicBlock"))


def bottleneck() -> nn.Module:
    return seeded(lambda: of_torchvision("Bottleneck"))


@program("Sequential(*children[:-1])")
def _(to: Path) -> Written:
    net = basic()
    return Written(
        saved(to, nn.Sequential(*list(net.children())[:-1]).state_dict()), "features", net
    )


@program("Sequential(*children[:-1]) under model.0. with a linear layer after it")
def _(to: Path) -> Written:
    net = bottleneck()
    body = nn.Sequential(*list(net.children())[:-1])
    around = nn.Sequential(body, nn.Flatten(), nn.Linear(2048, CLASSES))
    net.fc = around[2]
    return Written(
        saved(to, {"state_dict": {f"model.{k}": t for k, t in around.state_dict().items()}}),
        network=net,
    )


@program("fastai vision_learner, learn.save")
def _(to: Path) -> Written:
    from fastai.vision import learner

    net = basic()
    body = learner.create_body(net, pretrained=False)
    around = nn.Sequential(body, learner.create_head(512, CLASSES))
    around.eval()
    return Written(saved(to, {"model": around.state_dict(), "opt": {}}), "features", net)


@program("fastai learn.export")
def _(to: Path) -> Written:
    from fastai.vision import learner

    around = nn.Sequential(learner.create_body(basic(), pretrained=False), nn.Flatten())
    return Written(saved(to, around, "export.pkl"), "refused")


@program("mmpretrain, meta.CLASSES, backbone. and head.fc.")
def _(to: Path) -> Written:
    net = bottleneck()
    named = {
        f"head.{k}" if k.startswith("fc.") else f"backbone.{k}": t
        for k, t in net.state_dict().items()
    }
    meta = {"CLASSES": tuple("abcdefg"), "epoch": 3}
    return Written(saved(to, {"meta": meta, "state_dict": named}), network=net)


@program("MoCo v3, base_encoder")
def _(to: Path) -> Written:
    net = bottleneck()
    content = prefixed(net, "module.base_encoder.") | prefixed(
        seeded(lambda: of_torchvision("Bottleneck"), 1), "module.momentum_encoder."
    )
    return Written(saved(to, {"state_dict": content}), "features", net)


@program("DINO, teacher and student with projection heads")
def _(to: Path) -> Written:
    net = bottleneck()

    def of(network: nn.Module) -> dict[str, torch.Tensor]:
        return {
            f"backbone.{k}": t for k, t in network.state_dict().items() if not k.startswith("fc.")
        } | {
            "head.mlp.0.weight": torch.randn(64, 2048),
            "head.mlp.0.bias": torch.randn(64),
            "head.mlp.2.weight": torch.randn(32, 64),
            "head.mlp.2.bias": torch.randn(32),
            "head.last_layer.weight_g": torch.ones(100, 1),
            "head.last_layer.weight_v": torch.randn(100, 32),
        }

    student = seeded(lambda: of_torchvision("Bottleneck"), 1)
    content = {"teacher": of(net), "student": of(student), "epoch": 3}
    return Written(saved(to, content), "features", net)


@program("torchvision segmentation, fcn_resnet50: its backbone")
def _(to: Path) -> Written:
    net = seeded(
        lambda: torchvision.models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=3
        )
    )
    return Written(saved(to, net.state_dict()), "dilated")


@program("torchvision detection, fasterrcnn_resnet50_fpn: its backbone")
def _(to: Path) -> Written:
    net = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return Written(saved(to, net.state_dict()), "any")


@program("quantized to int8 for static inference")
def _(to: Path) -> Written:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torchvision.models.quantization.resnet18(weights=None, quantize=False).eval()
        net.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
        net.fuse_model(is_qat=False)
        prepared = torch.ao.quantization.prepare(net)
        prepared(torch.randn(1, 3, SIZE, SIZE))
        quantized = torch.ao.quantization.convert(prepared)
    return Written(saved(to, quantized.state_dict()), "refused")


@program("quantized dynamically, the head alone")
def _(to: Path) -> Written:
    net = basic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
    return Written(saved(to, quantized.state_dict()), "any", net)


def _keras(name: str, suffix: str, around: bool) -> None:
    layers = "Sequential(base, GAP, Dropout, Dense)" if around else "include_top"

    @program(f"Keras {name}, {layers}, {suffix}")
    def _(to: Path) -> Written:
        os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras asks for TensorFlow otherwise
        import keras

        make = getattr(keras.applications, name)
        if around:
            base = make(weights=None, include_top=False, input_shape=(SIZE, SIZE, 3))
            net = keras.Sequential(
                [
                    base,
                    keras.layers.GlobalAveragePooling2D(),
                    keras.layers.Dropout(0.2),
                    keras.layers.Dense(CLASSES),
                ]
            )
            net.build((None, SIZE, SIZE, 3))
        else:
            net = make(
                weights=None,
                classes=CLASSES,
                input_shape=(SIZE, SIZE, 3),
                classifier_activation=None,
            )
        path = to / f"net{suffix}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net.save_weights(path) if "weights" in suffix else net.save(path)

        class Peer(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                # `preprocess_input` of the first version makes BGR of RGB, as our stem does.
                given = images.flip(1) if name == "ResNet50" else images
                found = net(given.permute(0, 2, 3, 1).numpy(), training=False)
                return torch.from_numpy(np.asarray(found))

        return Written(path, network=Peer())


for _suffix in (".weights.h5", ".keras", ".h5"):
    _keras("ResNet50", _suffix, around=False)
    _keras("ResNet50", _suffix, around=True)
_keras("ResNet50V2", ".weights.h5", around=False)

OTHERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"timm {name}": functools.partial(timm.create_model, name, num_classes=CLASSES)
        for name in (
            "vit_tiny_patch16_224",
            "deit_tiny_patch16_224",
            "vit_small_patch14_dinov2",
            "swin_tiny_patch4_window7_224",
            "convnext_atto",
            "efficientnet_b0",
            "regnety_002",
            "densenet121",
            "mobilenetv3_small_050",
            "skresnet18",
            "res2net50_14w_8s",
            "resnest14d",
            "hrnet_w18_small",
            "dla34",
            "vgg11",
            "inception_v3",
            "mixer_s32_224",
            "nf_resnet26",
            "xception41",
            "dpn48b",
        )
    },
    "torchvision r3d_18": torchvision.models.video.r3d_18,
    "torchvision googlenet": lambda: torchvision.models.googlenet(init_weights=False),
    "torchvision squeezenet": torchvision.models.squeezenet1_0,
    "transformers CLIP": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1}
        )
    ),
}


def _other(name: str, make: Callable[[], nn.Module]) -> None:
    @program(f"another family: {name}")
    def _(to: Path) -> Written:
        return Written(saved(to, make().state_dict()), "refused")


for _name, _make in OTHERS.items():
    _other(_name, _make)
