"""The layers and residual blocks of a ResNet, under torchvision's names."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Convolution = Callable[..., jax.Array]


class Conv(nn.Module):
    """A bias-free convolution with explicit padding."""

    features: int
    size: int
    stride: int
    groups: int
    dtype: Any
    convolution: Convolution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            (self.size, self.size, x.shape[-1] // self.groups, self.features),
            jnp.float32,
        )
        dtype = self.dtype or kernel.dtype
        edge = (self.size - 1) // 2
        return self.convolution(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=(self.stride, self.stride),
            padding=((edge, edge), (edge, edge)),
            groups=self.groups,
        )


class Layered(nn.Module):
    """What the modules of this file share: how to make a convolution and a BatchNorm."""

    dtype: Any
    convolution: Convolution
    norm: Any

    def conv(self, name, features, size, stride=1, groups=1):
        return Conv(features, size, stride, groups, self.dtype, self.convolution, name=name)

    def bn(self, name, zero=False):
        path = "/".join((*self.path, name))
        batch = self.norm == "batch" or (self.norm != "running" and path in self.norm)
        return nn.BatchNorm(
            use_running_average=not batch,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            use_fast_variance=False,
            scale_init=nn.initializers.zeros if zero else nn.initializers.ones,
            name=name,
        )


class Downsample(Layered):
    features: int = 0
    stride: int = 1

    @nn.compact
    def __call__(self, x):
        return self.bn("1")(self.conv("0", self.features, 1, self.stride)(x))


class Basic(Layered):
    planes: int = 64
    stride: int = 1
    zero: bool = False

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.bn("bn1")(self.conv("conv1", self.planes, 3, self.stride)(x)))
        y = self.bn("bn2", self.zero)(self.conv("conv2", self.planes, 3)(y))
        if self.stride != 1 or x.shape[-1] != self.planes:
            x = Downsample(self.dtype, self.convolution, self.norm, self.planes, self.stride, name="downsample")(x)
        return nn.relu(x + y)


class Bottleneck(Layered):
    planes: int = 64
    stride: int = 1
    base_width: int = 64
    groups: int = 1
    zero: bool = False

    @nn.compact
    def __call__(self, x):
        inner = int(self.planes * self.base_width / 64) * self.groups
        y = nn.relu(self.bn("bn1")(self.conv("conv1", inner, 1)(x)))
        y = nn.relu(self.bn("bn2")(self.conv("conv2", inner, 3, self.stride, self.groups)(y)))
        y = self.bn("bn3", self.zero)(self.conv("conv3", self.planes * 4, 1)(y))
        if self.stride != 1 or x.shape[-1] != self.planes * 4:
            x = Downsample(self.dtype, self.convolution, self.norm, self.planes * 4, self.stride, name="downsample")(x)
        return nn.relu(x + y)


class Stage(Layered):
    block: str = "basic"
    depth: int = 2
    planes: int = 64
    stride: int = 1
    base_width: int = 64
    groups: int = 1
    zero: bool = False

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            if self.block == "basic":
                x = Basic(self.dtype, self.convolution, self.norm, self.planes, stride, self.zero, name=str(i))(x)
            else:
                x = Bottleneck(self.dtype, self.convolution, self.norm, self.planes, stride, self.base_width, self.groups, self.zero, name=str(i))(x)
        return x


class ResNet(Layered):
    block: str = "basic"
    depths: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    base_width: int = 64
    groups: int = 1
    classes: int = 1000
    zero_head: bool = False
    zero: bool = False
    segments: Sequence[str] = ()

    @nn.compact
    def __call__(self, x):
        for name in self.segments:
            if name == "stem":
                x = nn.relu(self.bn("bn1")(self.conv("conv1", self.width, 7, 2)(x)))
                x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
            elif name.startswith("layer"):
                n = int(name[5:]) - 1
                x = Stage(
                    self.dtype, self.convolution, self.norm, self.block, self.depths[n],
                    self.width * 2**n, 1 if n == 0 else 2, self.base_width, self.groups, self.zero,
                    name=name,
                )(x)
            elif name == "pool":
                x = x.mean((1, 2))
            else:
                head = nn.Dense(
                    self.classes, dtype=self.dtype, name="fc",
                    kernel_init=nn.initializers.zeros if self.zero_head
                    else nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
                )
                x = head(x)
                x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return x
