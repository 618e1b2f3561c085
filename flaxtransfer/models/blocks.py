"""The layers and the two residual blocks of a ResNet, under torchvision's names.

Every module takes the BatchNorm policy as an argument of its call and hands it down; each
BatchNorm is asked for by its path ("layer4/0/bn1").
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxtransfer.batchnorm import Norm, mode

__all__ = ["BLOCKS", "MOMENTUM", "Basic", "Bottleneck", "Conv", "Convolution", "Layers"]

MOMENTUM = 0.9
"""Share of the old running statistics that an update keeps; torch writes it as 0.1."""

Convolution = Callable[..., jax.Array]
"""A function with the signature of `flaxtransfer.models.convolution.conv`."""


class Conv(nn.Module):
    """A square convolution without bias, padded by half the kernel on all sides.

    Args:
      features: channels of the output.
      size: side of the kernel in px.
      stride: in px.
      groups: of channels.
      dtype: of the computation; None takes that of the kernel.
      convolution: the function that does it.
    """

    features: int
    size: int
    stride: int
    groups: int
    dtype: Any
    convolution: Convolution

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        # `initialise` draws the kernels of the whole network in one go.
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        dtype = self.dtype or kernel.dtype
        half = self.size // 2
        return self.convolution(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=(self.stride, self.stride),
            padding=((half, half), (half, half)),
            groups=self.groups,
        )


class Layers(nn.Module):
    """A module that is made of convolutions and BatchNorms.

    Args:
      dtype: of the computation; None takes that of the kernels.
      convolution: the function that convolves.
    """

    dtype: Any
    convolution: Convolution

    def convolve(
        self, name: str, x: jax.Array, features: int, size: int, stride: int = 1, groups: int = 1
    ) -> jax.Array:
        """`x` after the convolution called `name`."""
        layer = Conv(features, size, stride, groups, self.dtype, self.convolution, name=name)
        return layer(x)

    def normalise(self, name: str, x: jax.Array, norm: Norm) -> jax.Array:
        """`x` after the BatchNorm called `name`, in the mode that the policy gives it."""
        path = "/".join((*self.path, name))
        by_batch = mode(norm, path) == "batch"
        values = x.size // x.shape[-1]
        if by_batch and values < 2:
            raise ValueError(
                f"{path} normalises by the batch, which needs at least 2 values in each channel; "
                f"maps of shape {x.shape} have {values}: use larger images, a larger batch, or "
                "norm='running'"
            )
        layer = nn.BatchNorm(
            use_running_average=not by_batch,
            momentum=MOMENTUM,
            epsilon=1e-5,
            dtype=x.dtype,
            # The fast form takes the difference of two large numbers and loses most of the digits
            # of the variance in float32.
            use_fast_variance=False,
            name=name,
        )
        return layer(x)


class Downsample(Layers):
    """The 1x1 convolution that brings the shortcut to the shape of its block."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        return self.normalise("1", self.convolve("0", x, self.features, 1, self.stride), norm)


class Block(Layers):
    """What both blocks have in common.

    Args:
      planes: channels of the 3x3 convolutions, before `base_width` and `groups`.
      stride: of the block.
      base_width: scales the inner width of a bottleneck.
      groups: of the 3x3 convolution of a bottleneck.
    """

    planes: int
    stride: int
    base_width: int
    groups: int

    def join(self, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        """The block's input, fitted to its output `y`, plus `y`."""
        features = y.shape[-1]
        if self.stride != 1 or x.shape[-1] != features:
            shortcut = Downsample(
                self.dtype, self.convolution, features, self.stride, name="downsample"
            )
            x = shortcut(x, norm)
        return nn.relu(x + y)


class Basic(Block):
    """Two 3x3 convolutions; the first one has the stride."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        y = self.convolve("conv1", x, self.planes, 3, self.stride)
        y = nn.relu(self.normalise("bn1", y, norm))
        y = self.convolve("conv2", y, self.planes, 3)
        y = self.normalise("bn2", y, norm)
        return self.join(x, y, norm)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride ("v1.5"), not the first one."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        inner = int(self.planes * self.base_width / 64) * self.groups
        y = self.convolve("conv1", x, inner, 1)
        y = nn.relu(self.normalise("bn1", y, norm))
        y = self.convolve("conv2", y, inner, 3, self.stride, self.groups)
        y = nn.relu(self.normalise("bn2", y, norm))
        y = self.convolve("conv3", y, self.planes * 4, 1)
        y = self.normalise("bn3", y, norm)
        return self.join(x, y, norm)


BLOCKS: dict[str, type[Block]] = {"basic": Basic, "bottleneck": Bottleneck}
