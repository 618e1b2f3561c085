"""Convolution, normalization and pooling layers.

Convolutions and normalizations as the modules that networks are made of.

Every module takes the BatchNorm policy as an argument of its call and hands it down; each
BatchNorm is asked for by its path ("layer4/0/bn1").

What lowers resolution without a convolution; max-pooling has a gradient that is fast on CPU.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxtransfer.batchnorm import Norm, mode
from flaxtransfer.models.config import GROUPS, ResNetConfig

__all__ = [
    "MOMENTUM",
    "Conv",
    "Convolution",
    "Layers",
    "anti_aliased",
    "average_pool",
    "blur_pool",
    "max_pool",
]


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
      standardized: what is added to the variance of each filter, if filters are standardized.
      bias: whether there is one.
    """

    features: int
    size: int
    stride: int
    groups: int
    dtype: Any
    convolution: Convolution
    standardized: float | None = None
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        # `initialize` draws the kernels of the whole network in one go.
        kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
        dtype = self.dtype or kernel.dtype
        if self.standardized is not None:
            kernel = standardize(kernel, self.standardized)
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


def standardize(kernel: jax.Array, epsilon: float) -> jax.Array:
    """Each filter with mean 0 and variance 1.

    Args:
      kernel: ``[height, width, in, out]``.
      epsilon: is added to the variance of each of the ``out`` filters.

    >>> standardize(jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1), 1e-10).ravel().tolist()
    [-1.0, 1.0]

    References:
      S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
      Standardization", 2019.
    """
    centered = kernel - kernel.mean((0, 1, 2))
    return centered * jax.lax.rsqrt((centered**2).mean((0, 1, 2)) + epsilon)


class Layers(nn.Module):
    """A module that is made of convolutions and normalizations.

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
        how = (self.dtype, self.convolution, self.config.standardized, bias)
        return Conv(features, size, stride, groups, *how, name=name)(x)

    def normalize(self, name: str, x: jax.Array, norm: Norm) -> jax.Array:
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
                f"{path} normalizes by the batch, which needs at least 2 values in each channel; "
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


def max_pool(x: jax.Array, *, window: int = 3, stride: int = 2, padding: int = 1) -> jax.Array:
    """The largest value of each window of each channel; outside the image there is -inf.

    On GPU and TPU this is `jax.lax.reduce_window`. The gradient of that is a scatter, which XLA's
    CPU compiler does value by value in one thread. There the position of the maximum is found
    forward, and the gradient is added up window position by window position, which takes a tenth
    of the time. Of equal values the first, row by row, gets the gradient, as in torch; NaN is the
    largest value of all.

    Args:
      x: images `[batch, height, width, channels]`, of a floating dtype.
      window: side of the square window in px.
      stride: px between windows.
      padding: px of -inf on each side.

    Returns:
      `[batch, out height, out width, channels]` of the same dtype.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if jax.default_backend() != "cpu":
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), edges
        )
    padded = jnp.pad(x, edges, constant_values=-jnp.inf)
    height, width = ((size - window) // stride * stride for size in padded.shape[1:3])
    seen = [
        padded[:, i : i + height + 1 : stride, j : j + width + 1 : stride]
        for i, j in itertools.product(range(window), repeat=2)
    ]
    return lax.select_n(_first_largest([lax.stop_gradient(values) for values in seen]), *seen)


def _first_largest(candidates: list[jax.Array]) -> jax.Array:
    """Which of the arrays holds the first largest value, element by element."""
    best, index = candidates[0], jnp.zeros(candidates[0].shape, jnp.int32)
    for number, values in enumerate(candidates[1:], start=1):
        better = (values > best) | jnp.isnan(values)
        best, index = jnp.where(better, values, best), jnp.where(better, number, index)
    return index


def average_pool(x: jax.Array, *, padded: bool = False) -> jax.Array:
    """The mean of each 2x2 window, with stride 2.

    Args:
      x: images `[batch, height, width, channels]`.
      padded: what becomes of an odd last row or column: it is a window of its own, of what there
        is in it (True), or is left out (False).

    Returns:
      `[batch, out height, out width, channels]` of the same dtype.

    >>> average_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), padded=True)[0, :, :, 0].tolist()
    [[2.0, 3.5], [6.5, 8.0]]
    """
    height, width = x.shape[1:3]
    if padded:
        # A copy of the last row or column has the mean of the part that lies inside.
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    else:
        x = x[:, : height // 2 * 2, : width // 2 * 2]
    rows = (x[:, 0::2] + x[:, 1::2]) / 2
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) / 2


def blur_pool(x: jax.Array) -> jax.Array:
    """The 3x3 binomial filter with stride 2, edges reflected.

    Args:
      x: images `[batch, height, width, channels]`, 2 px high and wide at least.

    >>> blur_pool(jnp.ones((1, 4, 4, 1)))[0, :, :, 0].tolist()
    [[1.0, 1.0], [1.0, 1.0]]

    References:
      R. Zhang, "Making Convolutional Networks Shift-Invariant Again", 2019.
    """
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    height, width = x.shape[1:3]
    rows = [padded[:, i : i + height : 2] for i in range(3)]
    blurred = rows[0] / 4 + rows[1] / 2 + rows[2] / 4
    columns = [blurred[:, :, i : i + width : 2] for i in range(3)]
    return columns[0] / 4 + columns[1] / 2 + columns[2] / 4


def anti_aliased(x: jax.Array, kind: str) -> jax.Array:
    """Half the resolution, by "average" or "blur"."""
    return average_pool(x) if kind == "average" else blur_pool(x)
