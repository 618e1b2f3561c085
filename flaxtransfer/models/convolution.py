"""Two-dimensional convolution that is fast on CPU as well as on accelerators.

On GPU and TPU `conv` is `jax.lax.conv_general_dilated` and nothing else. XLA's CPU compiler has two
weak spots that a ResNet hits all the time, and only there other formulations of the same sum are
used, each with its own pair of gradients:

* a 1x1 convolution is a matrix product over the channels, and XLA's convolution takes about twice
  the time of the product forward and several times in the gradient of the kernel;
* when the map has no more positions than the kernel has taps, XLA exchanges the roles of image and
  kernel and falls into a scalar loop; gathering the patches and multiplying once is some hundred
  times faster.

The gradients are written out because differentiating the forward pass of a remedy gives away
most of what it gains.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]
Route = Literal["lax", "matmul", "patches"]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """Convolve images with a kernel by the fastest route on the current backend."""
    strides, padding = _static(strides, padding)
    _check(x, kernel, strides, padding, groups)
    if jax.default_backend() != "cpu":
        return _lax(x, kernel, strides, padding, groups)
    match route(x.shape, kernel.shape, padding, groups):
        case "matmul":
            return _matmul(x, kernel, strides)
        case "patches":
            return _patches(x, kernel, strides, padding)
        case _:
            return _lax(x, kernel, strides, padding, groups)


def lax_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[Sequence[int]] = ((0, 0), (0, 0)),
    groups: int = 1,
) -> jax.Array:
    """The same convolution by `jax.lax.conv_general_dilated` on every backend."""
    strides, padding = _static(strides, padding)
    _check(x, kernel, strides, padding, groups)
    return _lax(x, kernel, strides, padding, groups)


def route(
    image: Sequence[int], kernel: Sequence[int], padding: Padding, groups: int
) -> Route:
    """Which formulation `conv` uses on CPU for these shapes."""
    _, height, width, _ = image
    kernel_height, kernel_width, _, _ = kernel
    if groups != 1:
        return "lax"
    if (kernel_height, kernel_width) == (1, 1) and padding == ((0, 0), (0, 0)):
        return "matmul"
    if height * width <= kernel_height * kernel_width:
        return "patches"
    return "lax"


def _static(
    strides: Sequence[int], padding: Sequence[Sequence[int]]
) -> tuple[Pair, Padding]:
    """Plain hashable integers, whatever sequence they came in."""
    sy, sx = (int(s) for s in strides)
    (top, bottom), (left, right) = ((int(a), int(b)) for a, b in padding)
    return (sy, sx), ((top, bottom), (left, right))


def _check(x, kernel, strides, padding, groups) -> None:
    if x.dtype != kernel.dtype:
        raise TypeError(f"conv needs one dtype: images are {x.dtype}, kernel is {kernel.dtype}")


def _lax(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, groups: int
) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=_LAYOUT, feature_group_count=groups
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x: jax.Array, kernel: jax.Array, strides: Pair) -> jax.Array:
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def _matmul_forward(x, kernel, strides):
    kept = x[:, :: strides[0], :: strides[1]]
    return kept @ kernel[0, 0], (kept, kernel, jnp.zeros(x.shape[1:3] + (0,), x.dtype))


def _matmul_backward(strides, residuals, dy):
    kept, kernel, shape = residuals
    height, width, _ = shape.shape
    dx = dy @ kernel[0, 0].T
    if strides != (1, 1):
        dx = lax.pad(
            dx,
            jnp.zeros((), dx.dtype),
            [(0, 0, 0), *(
                (0, size - 1 - (count - 1) * stride, stride - 1)
                for size, count, stride in zip((height, width), dx.shape[1:3], strides, strict=True)
            ), (0, 0, 0)],
        )
    dkernel = jnp.tensordot(kept, dy, ((0, 1, 2), (0, 1, 2)))
    return dx, dkernel[None, None]


_matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _patches(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
    return _patches_forward(x, kernel, strides, padding)[0]


def _gather(x, taps: Pair, strides: Pair, padding: Padding) -> jax.Array:
    """Patches `[batch, out_height, out_width, taps * channels]`, tap by tap."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height = (x.shape[1] - taps[0]) // strides[0] + 1
    width = (x.shape[2] - taps[1]) // strides[1] + 1
    return jnp.concatenate(
        [
            lax.slice(
                x,
                (0, i, j, 0),
                (x.shape[0], i + (height - 1) * strides[0] + 1,
                 j + (width - 1) * strides[1] + 1, x.shape[3]),
                (1, *strides, 1),
            )
            for i in range(taps[0])
            for j in range(taps[1])
        ],
        axis=-1,
    )


def _patches_forward(x, kernel, strides, padding):
    patches = _gather(x, kernel.shape[:2], strides, padding)
    return patches @ kernel.reshape(-1, kernel.shape[3]), (x, kernel)


def _patches_backward(strides, padding, residuals, dy):
    x, kernel = residuals
    patches, scatter = jax.vjp(lambda x: _gather(x, kernel.shape[:2], strides, padding), x)
    dkernel = jnp.tensordot(patches, dy, ((0, 1, 2), (0, 1, 2))).reshape(kernel.shape)
    (dx,) = scatter(dy @ kernel.reshape(-1, kernel.shape[3]).T)
    return dx, dkernel


_patches.defvjp(_patches_forward, _patches_backward)
