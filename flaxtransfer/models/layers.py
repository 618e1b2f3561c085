"""Convolution, normalization and pooling layers.

``Layers`` is the base class of the modules of a network. Each module takes the BatchNorm policy as
an argument and passes it on; the policy decides by path ("layer4/0/bn1"). Max-pooling has a
gradient that is fast on CPU.

What is fast depends on the platform of the devices that a program is for, which ``for_platform``
says. On GPU and TPU ``conv`` is ``jax.lax.conv_general_dilated``. XLA's CPU compiler is slow in
three cases that every ResNet or ResNeXt contains:

* A 1x1 convolution is one matrix product over the channels, but XLA's convolution takes up to one
  and a half times as long forward and almost three times as long in the gradient of the kernel.
* If image or output has fewer positions than the kernel has taps, XLA exchanges the roles of image
  and kernel and uses a scalar loop, about a hundred times slower than necessary. The last stage of
  a ResNet on 64 px images consists of such convolutions.
* With groups, the gradient of the kernel is such a loop for maps of every size: 17 s for one layer
  of a ResNeXt on 8 images of 224 px, instead of 0.3 s.

In these cases ``conv`` sums over the taps of the kernel: each tap is a matrix product between the
positions that it reads and the outputs that it contributes to. Nothing is multiplied with padding.
The derivatives are again matrix products, so no custom derivative rule is needed: forward and
reverse mode, ``vmap`` and second derivatives all work.

On a processor without AVX-512, XLA's gradient of a kernel takes up to twenty times as long as it
has to, on maps of every size. There other convolutions are sums over the rows of the kernel, for
one or two images at a time.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flaxtransfer.batchnorm import Norm, mesh_at_hand, mode, normalized_over
from flaxtransfer.models.config import GROUPS, ResNetConfig

__all__ = [
    "MOMENTUM",
    "Conv",
    "Convolution",
    "Layers",
    "anti_aliased",
    "average_pool",
    "blur_pool",
    "by_taps",
    "conv",
    "conv_by_patches",
    "for_platform",
    "lax_conv",
    "max_pool",
    "platform_at_hand",
]


_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_devices: ContextVar[int] = ContextVar("devices", default=1)


@contextmanager
def for_platform(name: str | None, devices: int = 1) -> Iterator[None]:
    """What is traced in the block is for devices of a platform: "cpu", "gpu" or "tpu".

    A program is compiled for the devices of its arguments, which nobody knows while it is traced,
    and which need not be those that jax takes by itself. None is those. ``devices`` is how many a
    batch is split over.

    >>> with for_platform("tpu"):
    ...     program = jax.make_jaxpr(max_pool)(jnp.ones((1, 4, 4, 1)))
    >>> "reduce_window" in str(program)
    True
    """
    before, one = _platform.set(name), _devices.set(devices)
    try:
        yield
    finally:
        _platform.reset(before)
        _devices.reset(one)


def platform_at_hand() -> str:
    """The platform that programs are traced for.

    >>> with for_platform("tpu"):
    ...     platform_at_hand()
    'tpu'
    """
    device = _platform.get() or getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    return device if isinstance(device, str) else str(device.platform)


MOMENTUM = 0.9
"""Fraction of the running statistics that an update keeps; torch states 1 - 0.9 = 0.1."""

Convolution = Callable[..., jax.Array]
"""A function with the signature of ``flaxtransfer.models.layers.conv``."""


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


class BatchNormOverDevices(nn.BatchNorm):
    """A BatchNorm by the statistics of a batch that the devices of ``mesh_at_hand`` divide."""

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        """Normalizes ``x``, ``[batch, ..., channels]``, and updates the running statistics."""
        del use_running_average, mask
        mesh, shape, wide = mesh_at_hand(len(x)), x.shape[-1:], jnp.float32
        assert mesh is not None
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, shape, wide),
            self.variable("batch_stats", "var", jnp.ones, shape, wide),
        ]
        scale = self.param("scale", self.scale_init, shape, wide)
        bias = self.param("bias", self.bias_init, shape, wide)
        y, moments = normalized_over(x, scale, bias, self.epsilon, mesh)
        for kept, new in zip(running, moments, strict=True):
            kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        return y


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
        divided = by_batch and mesh_at_hand(len(x)) is not None
        layer = (BatchNormOverDevices if divided else nn.BatchNorm)(
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
    if platform_at_hand() != "cpu":
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


Pair = tuple[int, int]

_SMALL_MAP = 16
"""Output positions up to which the sum over taps was faster in all three passes together
(3x3, 256 to 512 channels, batch 32)."""

_SMALL_DEEP_MAP, _DEEP = 49, 256
"""Output positions up to which it was faster with at least so many channels (in whole networks at
224 px, batch 8 and 32)."""

_LARGE = 10**8
"""Multiplications on a device below which a loop over images is not worth its turns."""

_NARROW = 16
"""Channels below which a matrix product is too small to be faster."""


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """Two-dimensional convolution by the fastest algorithm on the platform at hand.

    The result equals that of ``lax_conv`` up to rounding; only the order of the additions differs,
    and only on CPU. The platform is that of ``for_platform`` when the function is traced.

    Args:
        x: images ``[batch, height, width, channels]``, of a floating dtype.
        kernel: ``[kernel height, kernel width, channels / groups, outputs]``, of the same dtype.
        strides: steps in px, vertical and horizontal.
        padding: zeros in px: ``((top, bottom), (left, right))``. "SAME" is not supported: on
            even sizes it pads asymmetrically, and torch checkpoints give wrong results.
        groups: independent groups of channels.

    Returns:
        ``[batch, out height, out width, outputs]`` of the same dtype.

    Raises:
        TypeError: the dtypes differ or are not floating.
        ValueError: shapes, strides, padding or groups that do not fit; all problems in one text.

    >>> x, kernel = jnp.ones((1, 4, 4, 16)), jnp.ones((3, 3, 16, 32))
    >>> conv(x, kernel, strides=(2, 2), padding=((1, 1), (1, 1))).shape
    (1, 2, 2, 32)
    """
    static = _checked(x, kernel, strides, padding, groups)
    if platform_at_hand() != "cpu":
        return _lax(x, kernel, *static)
    if by_taps(x.shape, kernel.shape, *static):
        return _sum_over_taps(x, kernel, *static)
    split = _devices.get()
    if images := images_at_a_time(x.shape, kernel.shape, *static, split):
        return _sum_over_rows(x, kernel, *static[:2], split, images)
    return _lax(x, kernel, *static)


def lax_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """Two-dimensional convolution by ``jax.lax.conv_general_dilated`` on every backend.

    Use it as the reference for ``conv`` in tests and timings, and in exported programs.

    >>> lax_conv(jnp.ones((1, 4, 4, 16)), jnp.ones((1, 1, 16, 32))).shape
    (1, 4, 4, 32)
    """
    return _lax(x, kernel, *_checked(x, kernel, strides, padding, groups))


def conv_by_patches(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """``conv`` for programs that run once: the sum over taps is one product, of whole patches.

    It compiles in half the time (experiments/results/frequency.md), and its patches take as many
    times the memory of the image as the kernel has taps. Where ``conv`` is no sum over the taps of
    one group, it is ``conv``.

    >>> x, kernel = jnp.ones((1, 4, 4, 16)), jnp.ones((3, 3, 16, 32))
    >>> how = {"strides": (2, 2), "padding": ((1, 1), (1, 1))}
    >>> bool((conv_by_patches(x, kernel, **how) == conv(x, kernel, **how)).all())
    True
    """
    static = _checked(x, kernel, strides, padding, groups)
    taps, out = kernel.shape[:2], _out_size(x.shape, kernel.shape, *static[:2])
    by_product = platform_at_hand() == "cpu" and by_taps(x.shape, kernel.shape, *static)
    if not by_product or groups > 1 or taps == (1, 1) or 0 in out:
        return conv(x, kernel, strides=strides, padding=padding, groups=groups)
    padded = jnp.pad(x, ((0, 0), *static[1], (0, 0)))
    height, width = (((n - 1) * stride + 1) for n, stride in zip(out, static[0], strict=True))
    seen = [
        padded[:, i : i + height : static[0][0], j : j + width : static[0][1]]
        for i, j in itertools.product(*map(range, taps))
    ]
    patches = jnp.concatenate(seen, axis=-1).reshape(-1, math.prod(kernel.shape[:3]))
    found = _product(patches, kernel.reshape(-1, kernel.shape[3]), 1)
    return found.reshape(x.shape[0], *out, kernel.shape[3]).astype(x.dtype)


def by_taps(
    image: Sequence[int],
    kernel: Sequence[int],
    strides: Pair,
    padding: tuple[Pair, Pair],
    groups: int,
) -> bool:
    """Whether ``conv`` writes a convolution of these shapes as a sum over taps on CPU.

    >>> by_taps((8, 16, 16, 64), (1, 1, 64, 256), (1, 1), ((0, 0), (0, 0)), 1)
    True
    >>> by_taps((8, 16, 16, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1)), 1)
    False
    """
    if groups > 1:
        return True
    if min(kernel[2:]) < _NARROW:
        return False
    height, width = _out_size(image, kernel, strides, padding)
    small = _SMALL_DEEP_MAP if min(kernel[2:]) >= _DEEP else _SMALL_MAP
    return tuple(kernel[:2]) == (1, 1) or height * width <= small


def images_at_a_time(
    image: Sequence[int],
    kernel: Sequence[int],
    strides: Pair,
    padding: tuple[Pair, Pair],
    groups: int,
    devices: int = 1,
) -> int:
    """How many images ``conv`` takes at a time on a CPU device, where it sums over rows.

    Returns:
        1 or 2, which divides the images of a device; 0 where the convolution is XLA's.

    >>> images_at_a_time((32, 4, 4, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1)), 1)
    0
    """
    height, width = _out_size(image, kernel, strides, padding)
    share, rest = divmod(image[0], devices)
    large = share * height * width * math.prod(kernel) >= _LARGE
    if has_wide_registers() or not large or rest or groups > 1 or tuple(kernel[:2]) == (1, 1):
        return 0
    return 1 if share % 2 else 2


@cache
def has_wide_registers() -> bool:
    """Whether the processor has AVX-512, or is none of those of which it is known to matter."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return True
    return "avx512f" in flags or "avx2" not in flags


def _lax(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], groups: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _sum_over_taps(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: tuple[Pair, Pair], groups: int
) -> jax.Array:
    taps, (channels, outputs) = kernel.shape[:2], kernel.shape[2:]
    out = _out_size(x.shape, kernel.shape, strides, padding)
    # Transposing `split` is one concatenation; transposing an index into the kernel would be a
    # padded copy of the whole kernel for each tap.
    matrices = lax.split(kernel.reshape(-1, outputs), (channels,) * (taps[0] * taps[1]))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.zeros((x.shape[0], *out, outputs), wide)
    for (i, j), matrix in zip(itertools.product(*map(range, taps)), matrices, strict=True):
        rows = _fed_outputs(i, x.shape[1], out[0], strides[0], padding[0][0])
        columns = _fed_outputs(j, x.shape[2], out[1], strides[1], padding[1][0])
        if not rows or not columns:
            continue
        seen = x[
            :,
            _positions(rows, i, strides[0], padding[0][0]),
            _positions(columns, j, strides[1], padding[1][0]),
        ]
        product = _product(seen, matrix, groups).reshape(*seen.shape[:3], outputs)
        total += jnp.pad(product, ((0, 0), _around(rows, out[0]), _around(columns, out[1]), (0, 0)))
    return total.astype(x.dtype)


def _sum_over_rows(
    x: jax.Array,
    kernel: jax.Array,
    strides: Pair,
    padding: tuple[Pair, Pair],
    devices: int,
    images: int,
) -> jax.Array:
    """A few images of each device at a time, so that what is copied stays in a core's cache.

    For each row of the kernel, what its taps read is put side by side and multiplied at once.
    """
    rows, columns, channels, outputs = kernel.shape
    height, width = _out_size(x.shape, kernel.shape, strides, padding)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Each device adds up by itself, and all together once, after the last image.
    matrices = jnp.broadcast_to(
        kernel.reshape(rows, 1, columns * channels, outputs),
        (rows, devices, columns * channels, outputs),
    )

    # Without the checkpoint, what was put side by side would be kept for the gradient.
    @jax.checkpoint
    def few(_: None, some: jax.Array) -> tuple[None, jax.Array]:
        padded = jnp.pad(some, ((0, 0), (0, 0), *padding, (0, 0)))
        total = jnp.zeros((devices, images * height * width, outputs), wide)
        for i, matrix in enumerate(matrices):
            seen = padded[:, :, i : i + (height - 1) * strides[0] + 1 : strides[0]]
            taps = [
                seen[:, :, :, j : j + (width - 1) * strides[1] + 1 : strides[1]]
                for j in range(columns)
            ]
            side_by_side = jnp.concatenate(taps, -1).reshape(devices, -1, columns * channels)
            total += jnp.matmul(side_by_side, matrix, preferred_element_type=wide)
        return None, total.astype(x.dtype).reshape(devices, images, height, width, outputs)

    shares = x.reshape(devices, -1, images, *x.shape[1:])
    _, maps = lax.scan(few, None, jnp.moveaxis(shares, 1, 0))
    return jnp.moveaxis(maps, 0, 1).reshape(-1, height, width, outputs)


def _product(seen: jax.Array, matrix: jax.Array, groups: int) -> jax.Array:
    """``[positions, outputs]`` or ``[positions, groups, outputs / groups]``; float32 or wider."""
    channels, outputs = matrix.shape
    wide = jnp.promote_types(seen.dtype, jnp.float32)
    # Positions become one axis: given more of them, XLA transposes the gradient of the output,
    # which costs a seventh of a ResNet-50 step.
    if groups == 1:
        return jnp.matmul(seen.reshape(-1, channels), matrix, preferred_element_type=wide)
    return jnp.einsum(
        "pgc,cgo->pgo",
        seen.reshape(-1, groups, channels),
        matrix.reshape(channels, groups, outputs // groups),
        preferred_element_type=wide,
    )


def _fed_outputs(tap: int, size: int, out: int, stride: int, before: int) -> range:
    """The outputs for which this tap reads a pixel of the image and not padding."""
    first = max(0, -((tap - before) // stride))
    last = min(out - 1, (size - 1 + before - tap) // stride)
    return range(first, last + 1)


def _positions(outputs: range, tap: int, stride: int, before: int) -> slice:
    """The pixels that this tap reads for these outputs."""
    offset = tap - before
    return slice(outputs[0] * stride + offset, outputs[-1] * stride + offset + 1, stride)


def _around(inner: range, size: int) -> Pair:
    return inner.start, size - inner.stop


def _out_size(
    image: Sequence[int], kernel: Sequence[int], strides: Pair, padding: tuple[Pair, Pair]
) -> Pair:
    height, width = (
        (size + sum(pad) - taps) // stride + 1
        for size, taps, stride, pad in zip(image[1:3], kernel[:2], strides, padding, strict=True)
    )
    return height, width


def _checked(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[Sequence[int]],
    groups: int,
) -> tuple[Pair, tuple[Pair, Pair], int]:
    """Strides, padding and groups as integers, or an error that lists all problems."""
    if x.dtype != kernel.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"images and kernel must have the same floating dtype, got {x.dtype} and "
            f"{kernel.dtype}; cast one of them"
        )
    try:
        down, right = (int(stride) for stride in strides)
        (a, b), (c, d) = ((int(before), int(after)) for before, after in padding)
    except (TypeError, ValueError):
        raise ValueError(
            "strides must be (vertical, horizontal) and padding ((top, bottom), (left, right)), "
            "all "
            f"integers, got {strides!r} and {padding!r}"
        ) from None
    problems = []
    if x.ndim != 4:
        problems.append(f"images must be [batch, height, width, channels], got shape {x.shape}")
    if kernel.ndim != 4:
        problems.append(
            f"kernel must be [height, width, channels, outputs], got shape {kernel.shape}"
        )
    if min(down, right) < 1:
        problems.append(f"strides must be >= 1, got {(down, right)}")
    if min(a, b, c, d) < 0:
        problems.append(f"padding must be >= 0, got {((a, b), (c, d))}")
    if groups < 1:
        problems.append(f"groups must be >= 1, got {groups}")
    if not problems:
        if x.shape[3] != kernel.shape[2] * groups:
            problems.append(
                f"the images have {x.shape[3]} channels and the kernel takes "
                f"{kernel.shape[2] * groups} ({kernel.shape[2]} in each of {groups} groups)"
            )
        if kernel.shape[3] % groups:
            problems.append(f"{kernel.shape[3]} outputs do not divide into {groups} groups")
        if min(_out_size(x.shape, kernel.shape, (down, right), ((a, b), (c, d)))) < 1:
            problems.append(
                f"images of {x.shape[1]} x {x.shape[2]} px, padded by {((a, b), (c, d))}, are too "
                f"small for a kernel of {kernel.shape[0]} x {kernel.shape[1]}"
            )
    if problems:
        raise ValueError("invalid convolution: " + "; ".join(problems))
    return (down, right), ((a, b), (c, d)), groups
