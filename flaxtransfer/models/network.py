"""A ResNet as a Linen module that runs any slice of its segments."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxtransfer.architectures import ResNetConfig
from flaxtransfer.bands import Adapter
from flaxtransfer.batchnorm import Norm
from flaxtransfer.models import adapters
from flaxtransfer.models.blocks import BLOCKS, Layers
from flaxtransfer.models.pooling import max_pool

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


class Stage(Layers):
    """The blocks of one resolution; the first one has the stride."""

    config: ResNetConfig
    number: int

    @nn.compact
    def __call__(self, x: jax.Array, norm: Norm) -> jax.Array:
        config = self.config
        for index in range(config.depths[self.number - 1]):
            block = BLOCKS[config.block](
                self.dtype,
                self.convolution,
                planes=config.width * 2 ** (self.number - 1),
                stride=2 if index == 0 and self.number > 1 else 1,
                base_width=config.base_width,
                groups=config.groups,
                name=str(index),
            )
            x = block(x, norm)
        return x


class Network(Layers):
    """The whole network; pooling and head compute in float32 whatever the dtype before them."""

    config: ResNetConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: Norm, segments: tuple[str, ...] | None = None
    ) -> jax.Array:
        for segment in segments_of(self.config) if segments is None else segments:
            if segment == "adapter" and self.config.adapter is not None:
                x = InputAdapter(self.config.adapter, name="adapter")(x)
            elif segment == "stem":
                x = self.convolve("conv1", x, self.config.width, 7, 2)
                x = max_pool(nn.relu(self.normalise("bn1", x, norm)))
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


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
