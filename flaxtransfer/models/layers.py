"""Convolutions and normalisations as the modules that networks are made of.

Every module takes the BatchNorm policy as an argument of its call and hands it down; each
BatchNorm is asked for by its path ("layer4/0/bn1").
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxtransfer.architectures import GROUPS, ResNetConfig
from flaxtransfer.batchnorm import Norm, mode

__all__ = ["MOMENTUM", "Conv", "Convolution", "Layers"]

MOMENTUM = 0.9
"""Share of the old running statistics that an update keeps; torch writes it as 0.1."""

Convolution = Callable[..., jax.Array]
"""A function with the signature of `flaxtransfer.models.convolution.conv`."""


class Conv(nn.Module):
    """A square convolution, padded by half the kernel on all sides.

    Args:
      features: channels of the output.
      size: side of the kernel in px.
      stride: in px.
      groups: of channels.
      dtype: of the computation; None takes that of the kernel.
      convolution: the function that does it.
      standardised: what is added to the variance of each filter, if filters are standardised.
      bias: whether there is one.
    """

    features: int
    size: int
    stride: int
    groups: int
    dtype: Any
    convolution: Convolution
    standardised: float | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        # `initialise` draws the kernels of the whole network in one go.
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        dtype = self.dtype or kernel.dtype
        if self.standardised is not None:
            kernel = standardise(kernel, self.standardised)
        half = self.size // 2
        y = self.convolution(
            x.astype(dtype),
            kernel.astype(dtype),
            strides=(self.stride, self.stride),
            padding=((half, half), (half, half)),
            groups=self.groups,
        )
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(dtype)
        return y


def standardise(kernel: jax.Array, epsilon: float) -> jax.Array:
    """Each filter with mean 0 and variance 1.

    Args:
      kernel: ``[height, width, in, out]``.
      epsilon: is added to the variance of each of the ``out`` filters.

    >>> standardise(jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1), 1e-10).ravel().tolist()
    [-1.0, 1.0]

    References:
      S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
      Standardization", 2019.
    """
    centred = kernel - kernel.mean((0, 1, 2))
    return centred * jax.lax.rsqrt((centred**2).mean((0, 1, 2)) + epsilon)


class Layers(nn.Module):
    """A module that is made of convolutions and normalisations.

    Args:
      dtype: of the computation; None takes that of the kernels.
      convolution: the function that convolves.
      config: of the network.
    """

    dtype: Any
    convolution: Convolution
    config: ResNetConfig

    def convolve(
        self,
        name: str,
        x: jax.Array,
        features: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
    ) -> jax.Array:
        """`x` after the convolution called `name`."""
        how = (self.dtype, self.convolution, self.config.standardised, bias)
        return Conv(features, size, stride, groups, *how, name=name)(x)

    def normalise(self, name: str, x: jax.Array, norm: Norm) -> jax.Array:
        """`x` after the BatchNorm called `name`, in the mode that the policy gives it.

        Where the network has GroupNorms, ``gn1`` stands in the place of ``bn1``, for no policy of
        BatchNorms applies to it.
        """
        if self.config.norm == "group":
            name = f"gn{name.removeprefix('bn')}"
            epsilon = self.config.epsilon
            return nn.GroupNorm(
                GROUPS, epsilon=epsilon, dtype=x.dtype, use_fast_variance=False, name=name
            )(x)
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
            epsilon=self.config.epsilon,
            dtype=x.dtype,
            # The fast form takes the difference of two large numbers and loses most of the digits
            # of the variance in float32.
            use_fast_variance=False,
            name=name,
        )
        return layer(x)
