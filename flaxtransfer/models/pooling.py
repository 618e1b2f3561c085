"""What lowers resolution without a convolution; max-pooling has a gradient that is fast on CPU."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["anti_aliased", "average_pool", "blur_pool", "max_pool"]


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
