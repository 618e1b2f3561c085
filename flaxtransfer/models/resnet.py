"""ResNets as torchvision defines them, at any width and depth."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flaxtransfer.models.blocks import ResNet
from flaxtransfer.models.convolution import conv


@dataclass(frozen=True)
class ResNetConfig:
    block: Literal["basic", "bottleneck"] = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    base_width: int = 64
    groups: int = 1
    classes: int = 1000
    in_channels: int = 3

    @property
    def name(self) -> str:
        per = 2 if self.block == "basic" else 3
        text = f"resnet{per * sum(self.depths) + 2}"
        return text if self.width == 64 else f"{text}w{self.width}"


RESNETS = {
    "resnet18": ResNetConfig("basic", (2, 2, 2, 2)),
    "resnet34": ResNetConfig("basic", (3, 4, 6, 3)),
    "resnet50": ResNetConfig("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetConfig("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetConfig("bottleneck", (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class Model:
    config: ResNetConfig
    dtype: Any = None
    zero_head: bool = False
    zero_init_residual: bool = False
    convolution: Any = conv

    @property
    def segments(self) -> tuple[str, ...]:
        return ("stem", *(f"layer{i + 1}" for i in range(len(self.config.depths))), "pool", "head")

    def _module(self, norm, segments):
        c = self.config
        return ResNet(
            self.dtype, self.convolution, norm, c.block, c.depths, c.width, c.base_width, c.groups,
            c.classes, self.zero_head, self.zero_init_residual, segments,
        )

    def init(self, rng, image_shape=(224, 224, 3)):
        module = self._module("running", self.segments)
        return dict(jax.jit(module.init)(rng, jnp.zeros((1, *image_shape))))

    def abstract(self):
        return jax.eval_shape(lambda: self.init(jax.random.key(0), (32, 32, self.config.in_channels)))

    def apply(self, variables, images, *, norm="running", start=None, stop=None):
        first = 0 if start is None else self.segments.index(start)
        last = len(self.segments) if stop is None else self.segments.index(stop)
        module = self._module(norm, self.segments[first:last])
        if norm == "running":
            return module.apply(variables, images), variables["batch_stats"]
        y, new = module.apply(variables, images, mutable=["batch_stats"])
        return y, new["batch_stats"]


def resnet(name, *, classes=None, dtype=None, zero_head=False, zero_init_residual=False, convolution=conv):
    config = RESNETS[name] if isinstance(name, str) else name
    if classes is not None:
        config = replace(config, classes=classes)
    return Model(config, dtype, zero_head, zero_init_residual, convolution)
