"""Convolution, normalization and pooling layers.

``Layers`` is the base class of the modules of a network. Each module takes the BatchNorm policy as
an argument and passes it on; the policy decides by path ("layer4/0/bn1"). Max-pooling has a
gradient that is fast on CPU.
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
"""Fraction of the running statistics that an update keeps; torch states 1 - 0.9 = 0.1."""

Convolution = Callable[..., jax.Array]
"""A function with the signature of ``flaxtransfer.models.convolution.conv``."""


class Conv(nn.Module):
    """A square convolution, padded by half the kernel on all sides.

    Args:
        features: channels of the output.
        size: side of the kernel in px.
        stride: in px.
        groups: of channels.
        dtype: of the computation; None uses that of the kernel.
        convolution: the function that convolves.
        standardized: epsilon of weight standardization; None without weight standardization.
        bias: whether to add a bias.
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
        # `Model.init` draws the kernels of the whole network at once.
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
    """Weight standardization: each filter with mean 0 and variance 1.

    Args:
        kernel: ``[height, width, in, out]``.
        epsilon: added to the variance of each of the ``out`` filters.

    >>> standardize(jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1), 1e-10).ravel().tolist()
    [-1.0, 1.0]

    References:
        S. Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization", 2019.
    """
    centered = kernel - kernel.mean((0, 1, 2))
    return centered * jax.lax.rsqrt((centered**2).mean((0, 1, 2)) + epsilon)


class Layers(nn.Module):
    """Base class of modules with convolutions and normalizations.

    Args:
        dtype: of the computation; None uses that of the kernels.
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
        """Applies the convolution ``name``."""
        how = (self.dtype, self.convolution, self.config.standardized, bias)
        return Conv(features, size, stride, groups, *how, name=name)(x)

    def normalize(self, name: str, x: jax.Array, norm: Norm) -> jax.Array:
        """Applies the BatchNorm ``name`` in the mode that the policy selects.

        In a network with GroupNorm the layer is called ``gn1`` instead of ``bn1``, because no
        BatchNorm policy applies to it.
        """
        if self.config.norm == "group":
            name = f"gn{name.removeprefix('bn')}"
            epsilon = self.config.epsilon
            normalized: jax.Array = nn.GroupNorm(
                GROUPS, epsilon=epsilon, dtype=x.dtype, use_fast_variance=False, name=name
            )(x)
            return normalized
        path = "/".join((*self.path, name))
        by_batch = mode(norm, path) == "batch"
        values = x.size // x.shape[-1]
        if by_batch and values < 2:
            raise ValueError(
                f"{path} normalizes by the batch, which needs at least 2 values per channel; "
                f"maps of shape {x.shape} have {values}: use larger images, a larger batch, or "
                "norm='running'"
            )
        layer = nn.BatchNorm(
            use_running_average=not by_batch,
            momentum=MOMENTUM,
            epsilon=self.config.epsilon,
            dtype=x.dtype,
            # The fast form subtracts two large numbers and loses most digits of the variance in
            # float32.
            use_fast_variance=False,
            name=name,
        )
        result: jax.Array = layer(x)
        return result


def max_pool(x: jax.Array, *, window: int = 3, stride: int = 2, padding: int = 1) -> jax.Array:
    """Max-pooling, padded with -inf.

    On GPU and TPU this is ``jax.lax.reduce_window``. Its gradient is a scatter, which XLA's CPU
    compiler executes value by value in one thread. On CPU the position of the maximum is therefore
    found in the forward pass, and the gradient is summed per window position, which takes a tenth
    of the time. Of equal values the first one, row by row, gets the gradient, as in torch. NaN is
    larger than any number.

    Args:
        x: images ``[batch, height, width, channels]``, of a floating dtype.
        window: side of the square window in px.
        stride: px between windows.
        padding: px of -inf on each side.

    Returns:
        ``[batch, out height, out width, channels]`` of the same dtype.

    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
    [[5.0, 7.0], [13.0, 15.0]]
    """
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    if jax.default_backend() != "cpu":
        result: jax.Array = lax.reduce_window(
            x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), edges
        )
        return result
    padded = jnp.pad(x, edges, constant_values=-jnp.inf)
    height, width = ((size - window) // stride * stride for size in padded.shape[1:3])
    seen = [
        padded[:, i : i + height + 1 : stride, j : j + width + 1 : stride]
        for i, j in itertools.product(range(window), repeat=2)
    ]
    return lax.select_n(_first_largest([lax.stop_gradient(values) for values in seen]), *seen)


def _first_largest(candidates: list[jax.Array]) -> jax.Array:
    """The index of the array with the first largest value, element by element."""
    best, index = candidates[0], jnp.zeros(candidates[0].shape, jnp.int32)
    for number, values in enumerate(candidates[1:], start=1):
        better = (values > best) | jnp.isnan(values)
        best, index = jnp.where(better, values, best), jnp.where(better, number, index)
    return index


def average_pool(x: jax.Array, *, padded: bool = False) -> jax.Array:
    """2x2 average-pooling with stride 2.

    Args:
        x: images ``[batch, height, width, channels]``.
        padded: whether an odd last row or column is averaged by itself (True) or dropped (False).

    Returns:
        ``[batch, out height, out width, channels]`` of the same dtype.

    >>> average_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), padded=True)[0, :, :, 0].tolist()
    [[2.0, 3.5], [6.5, 8.0]]
    """
    height, width = x.shape[1:3]
    if padded:
        # A copy of the last row or column has the mean of the part inside the image.
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    else:
        x = x[:, : height // 2 * 2, : width // 2 * 2]
    rows = (x[:, 0::2] + x[:, 1::2]) / 2
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) / 2


def blur_pool(x: jax.Array) -> jax.Array:
    """Blur pooling: a 3x3 binomial filter with stride 2 and reflected edges.

    Args:
        x: images ``[batch, height, width, channels]``, at least 2 px high and wide.

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
    """Halves the resolution by "average" or "blur" pooling."""
    return average_pool(x) if kind == "average" else blur_pool(x)
