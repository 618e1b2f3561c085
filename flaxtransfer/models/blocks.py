"""The residual blocks of a ResNet, under torchvision's and timm's names."""

import flax.linen as nn
import jax

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.batchnorm import Norm
from flaxtransfer.models.attention import attention
from flaxtransfer.models.layers import Layers
from flaxtransfer.models.pooling import anti_aliased, average_pool

__all__ = ["block_of"]


class Downsample(Layers):
    """What brings the shortcut to the shape of its block.

    Its parts are numbered as in torch: an average-pool before the convolution is number 0. In a
    network of pre-activations it has no norm.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        pooled = self.config.shortcut == "average"
        if pooled:
            if self.stride != 1:
                x = average_pool(x, padded=True)
            x = self.convolve("1", x, self.features, 1)
        else:
            size = self.config.shortcut_kernel if self.stride != 1 else 1
            x = self.convolve("0", x, self.features, size, self.stride)
        return x if self.config.preactivation else self.normalise(str(1 + pooled), x, norm)


class Block(Layers):
    """What all blocks have in common.

    Args:
      stage: 1 to 4.
      index: in the stage, from 0.
    """

    stage: int
    index: int

    @property
    def stride(self) -> int:
        """Of the block."""
        return self.config.stride(self.stage, self.index)

    @property
    def planes(self) -> int:
        """Output channels before expansion."""
        return self.config.width * 2 ** (self.stage - 1)

    @property
    def convolved(self) -> int:
        """The stride that convolutions have; an anti-aliased block lowers resolution after one."""
        return 1 if self.config.anti_alias else self.stride

    def lower(self, x: jax.Array) -> jax.Array:
        """`x` at the block's resolution, where no convolution has the stride."""
        alias = self.config.anti_alias
        return anti_aliased(x, alias) if alias and self.stride != 1 else x

    def join(self, x: jax.Array, y: jax.Array, norm: Norm) -> jax.Array:
        """The block's input, fitted to its output `y`, plus `y`."""
        if (scaled := attention(self.config, "se")) is not None:
            y = scaled(y)
        if self.config.has_shortcut(self.stage, self.index):
            x = self.downsample(x, norm)
        if x.shape != y.shape:
            raise ValueError(
                f"at {'/'.join(self.path)} the shortcut has {x.shape[1]}x{x.shape[2]} positions, "
                f"and the block {y.shape[1]}x{y.shape[2]}: average anti-aliasing takes images "
                "whose sides are multiples of 32"
            )
        return nn.relu(x + y)

    def downsample(self, x: jax.Array, norm: Norm) -> jax.Array:
        """`x` in the shape of the block's output."""
        features = self.planes * self.config.expansion
        parts = (self.dtype, self.convolution, self.config, features, self.stride)
        return Downsample(*parts, name="downsample")(x, norm)


class Basic(Block):
    """Two 3x3 convolutions; the first one has the stride."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        y = self.convolve("conv1", x, self.planes // self.config.reduce_first, 3, self.convolved)
        y = self.lower(nn.relu(self.normalise("bn1", y, norm)))
        y = self.convolve("conv2", y, self.planes, 3)
        y = self.normalise("bn2", y, norm)
        return self.join(x, y, norm)


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, one of the first two with the stride."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        config = self.config
        inner = config.inner(self.stage)
        first, second = (self.stride, 1) if config.stride_in == "1x1" else (1, self.convolved)
        y = self.convolve("conv1", x, inner // config.reduce_first, 1, first)
        y = nn.relu(self.normalise("bn1", y, norm))
        y = self.convolve("conv2", y, inner, 3, second, config.groups)
        y = self.lower(nn.relu(self.normalise("bn2", y, norm)))
        y = self.convolve("conv3", y, 4 * self.planes, 1)
        y = self.normalise("bn3", y, norm)
        return self.join(x, y, norm)


class Preactivated(Block):
    """Norm and activation stand before each convolution, and the sum is passed on as it is."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        inner, stride = self.config.inner(self.stage), self.stride
        first = inner // self.config.reduce_first
        if self.config.block == "basic":
            layers = [(first, 3, stride, 1), (self.planes, 3, 1, 1)]
        else:
            layers = [
                (first, 1, 1, 1),
                (inner, 3, stride, self.config.groups),
                (4 * self.planes, 1, 1, 1),
            ]
        y = nn.relu(self.normalise("bn1", x, norm))
        if self.config.has_shortcut(self.stage, self.index):
            x = self.downsample(y, norm)
        elif stride != 1:
            x = x[:, ::stride, ::stride]
        for number, layer in enumerate(layers, start=1):
            if number > 1:
                y = nn.relu(self.normalise(f"bn{number}", y, norm))
            y = self.convolve(f"conv{number}", y, *layer)
        return x + y


def block_of(config: ResNetConfig) -> type[Block]:
    """The kind of block that a network is made of."""
    if config.preactivation:
        return Preactivated
    return Basic if config.block == "basic" else Bottleneck
