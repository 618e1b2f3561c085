"""A ResNet as a Linen module that runs any slice of its segments."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.bands import Adapter
from flaxtransfer.batchnorm import Norm
from flaxtransfer.models import adapters
from flaxtransfer.models.blocks import block_of
from flaxtransfer.models.layers import Layers
from flaxtransfer.models.pooling import average_pool, blur_pool, max_pool

__all__ = ["Network", "segments_of"]

_SEGMENTS = ("stem", "layer1", "layer2", "layer3", "layer4", "pool", "head")


def segments_of(config: ResNetConfig) -> tuple[str, ...]:
    """Names of the segments, from the input to the output."""
    return _SEGMENTS if config.adapter is None else ("adapter", *_SEGMENTS)


class InputAdapter(nn.Module):
    """From n bands to the three channels of the stem, in the dtype of the images."""

    adapter: Adapter

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shapes = adapters.shapes(self.adapter)
        # `initialise` and `transfer` fill them.
        params = {
            name: self.param(name, nn.initializers.zeros, shape, jnp.float32)
            for name, shape in shapes.items()
        }
        return adapters.apply(self.adapter, params, x)


class DeepStem(Layers):
    """Three 3x3 convolutions in the place of a 7x7; the last one's norm follows it outside.

    The convolutions are numbered as in torch, where norms and activations count.
    """

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        first, second, third = self.config.stem_channels
        x = nn.relu(self.normalise("bn1", self.convolve("0", x, first, 3, 2), norm))
        x = nn.relu(self.normalise("bn4", self.convolve("3", x, second, 3), norm))
        return self.convolve("6", x, third, 3)


class Pool(Layers):
    """A convolution with stride 2 in the place of the stem's max-pool."""

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        x = self.convolve("0", x, x.shape[-1], 3, 2)
        return nn.relu(self.normalise("bn1", x, norm))


class Stage(Layers):
    """The blocks of one resolution; the last of pre-activations are normalised once more."""

    number: int

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        config = self.config
        kind = block_of(config)
        for index in range(config.depths[self.number - 1]):
            parts = (self.dtype, self.convolution, config, self.number, index)
            x = kind(*parts, name=str(index))(x, norm)
        if config.preactivation and self.number == len(config.depths):
            x = nn.relu(self.normalise("bn1", x, norm))
        return x


class Network(Layers):
    """The whole network; pooling and head compute in float32 whatever the dtype before them."""

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: Norm, segments: tuple[str, ...] | None = None
    ) -> jax.Array:
        for segment in segments_of(self.config) if segments is None else segments:
            if segment == "adapter" and self.config.adapter is not None:
                x = InputAdapter(self.config.adapter, name="adapter")(x)
            elif segment == "stem":
                x = self._stem(x, norm)
            elif segment == "pool":
                x = _wide(x).mean((1, 2))
            elif segment == "head":
                # `initialise` fills the kernel.
                head = nn.Dense(self.config.classes, kernel_init=nn.initializers.zeros, name="fc")
                x = head(_wide(x))
            else:
                number = int(segment.removeprefix("layer"))
                stage = Stage(self.dtype, self.convolution, self.config, number, name=segment)
                x = stage(x, norm)
        return x

    def _stem(self, x: jax.Array, norm: Norm) -> jax.Array:
        config, parts = self.config, (self.dtype, self.convolution, self.config)
        if config.stem == "plain":
            x = self.convolve("conv1", x, config.width, 7, 2, bias=config.stem_bias)
        else:
            x = DeepStem(*parts, name="conv1")(x, norm)
        if not config.preactivation:
            x = nn.relu(self.normalise("bn1", x, norm))
        if config.stem_pool == "zero-padded":
            return max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), padding=0)
        if config.stem_pool == "convolution":
            return Pool(*parts, name="maxpool")(x, norm)
        if config.anti_alias == "average":
            return average_pool(x)
        return blur_pool(max_pool(x, stride=1)) if config.anti_alias == "blur" else max_pool(x)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
