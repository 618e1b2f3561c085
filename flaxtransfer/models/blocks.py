"""The two residual blocks of a ResNet, under torchvision's and timm's names."""

import flax.linen as nn
import jax

from flaxtransfer.batchnorm import Norm
from flaxtransfer.models.attention import attention
from flaxtransfer.models.layers import Layers
from flaxtransfer.models.pooling import anti_aliased, average_pool

__all__ = ["BLOCKS", "Basic", "Bottleneck"]


class Downsample(Layers):
    """What brings the shortcut to the shape of its block.

    Its parts are numbered as in torch: an average-pool before the convolution is number 0.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        if self.config.shortcut == "average":
            if self.stride != 1:
                x = average_pool(x, padded=True)
            return self.normalise("2", self.convolve("1", x, self.features, 1), norm)
        size = self.config.shortcut_kernel if self.stride != 1 else 1
        return self.normalise("1", self.convolve("0", x, self.features, size, self.stride), norm)


class Block(Layers):
    """What both blocks have in common.

    Args:
      stage: 1 to 4.
      stride: of the block.
    """

    stage: int
    stride: int

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
        features = y.shape[-1]
        if self.stride != 1 or x.shape[-1] != features:
            shortcut = Downsample(
                self.dtype, self.convolution, self.config, features, self.stride, name="downsample"
            )
            x = shortcut(x, norm)
        return nn.relu(x + y)


class Basic(Block):
    """Two 3x3 convolutions; the first one has the stride."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        planes = self.config.width * 2 ** (self.stage - 1)
        y = self.convolve("conv1", x, planes // self.config.reduce_first, 3, self.convolved)
        y = self.lower(nn.relu(self.normalise("bn1", y, norm)))
        y = self.convolve("conv2", y, planes, 3)
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
        y = self.convolve("conv3", y, config.width * 2 ** (self.stage + 1), 1)
        y = self.normalise("bn3", y, norm)
        return self.join(x, y, norm)


BLOCKS: dict[str, type[Block]] = {"basic": Basic, "bottleneck": Bottleneck}
