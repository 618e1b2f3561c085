"""Attention over channels: each channel of a map is scaled by a number between 0 and 1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxtransfer.architectures import ResNetConfig, eca_size, squeezed

__all__ = ["attention"]


class Dense1x1(nn.Module):
    """A dense layer with a bias, whose kernel is that of a 1x1 convolution as in torch."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # `initialise` draws the kernel.
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
        return jnp.dot(x, kernel[0, 0], precision=lax.Precision.HIGHEST) + bias


class SqueezeExcite(nn.Module):
    """Two dense layers on the means of all channels."""

    ratio: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        means = nn.relu(Dense1x1(squeezed(channels, self.ratio), name="fc1")(x.mean((1, 2))))
        return x * nn.sigmoid(Dense1x1(channels, name="fc2")(means))[:, None, None]


class EfficientAttention(nn.Module):
    """One short filter along the means of all channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        filtered = Filter(eca_size(x.shape[-1]), name="conv")(x.mean((1, 2)))
        return x * nn.sigmoid(filtered)[:, None, None]


class Filter(nn.Module):
    """A filter along the channels, beyond which there is 0."""

    size: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.zeros, (self.size, 1, 1), jnp.float32)
        kernel = kernel.astype(x.dtype)
        padded = jnp.pad(x, ((0, 0), (self.size // 2, self.size // 2)))
        taps = [padded[:, i : i + x.shape[1]] * kernel[i, 0, 0] for i in range(self.size)]
        return sum(taps[1:], start=taps[0])


def attention(config: ResNetConfig, name: str) -> nn.Module | None:
    """The module that a config asks for; None without one."""
    if config.attention == "se":
        return SqueezeExcite(config.se_ratio, name=name)
    return EfficientAttention(name=name) if config.attention == "eca" else None
