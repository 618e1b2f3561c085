"""Batch normalisation, by the statistics of the batch or by running ones."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["EPSILON", "MOMENTUM", "BatchNorm", "normalise_by_batch"]

EPSILON = 1e-5
MOMENTUM = 0.9
"""What stays of a running statistic at an update; torch calls the rest, 0.1, momentum."""


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last.

    It computes what `flax.linen.BatchNorm(use_fast_variance=False)` does, with the same leaves.
    The statistics are float32 (or wider) whatever the dtype of the images, and under `jit` on a
    mesh they are those of the global batch. Which of them serve is said at each call; nothing
    depends on whether a collection is mutable. The output has the dtype of the input.
    """

    @nn.compact
    def __call__(self, x: jax.Array, by_batch: bool) -> jax.Array:
        """Normalises `[..., channels]`; by the batch, it also updates the running statistics."""
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not by_batch:
            factor = scale * lax.rsqrt(var.value + EPSILON)
            return ((x - mean.value) * factor + bias).astype(x.dtype)
        if x.size // x.shape[-1] < 2:
            raise ValueError(
                f"{'/'.join(self.path)} normalises by the batch, but each channel has "
                f"{x.size // x.shape[-1]} value(s) here, in maps of shape {x.shape}: use larger "
                "images, a larger batch, or norm='running'"
            )
        y, batch_mean, batch_var = normalise_by_batch(x, scale, bias)
        mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * batch_mean
        var.value = MOMENTUM * var.value + (1 - MOMENTUM) * batch_var
        return y


@jax.custom_jvp
def normalise_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by its own mean and variance.

    The variance is the mean square distance from the mean, taken in a second pass: the difference
    of the mean square and the squared mean loses most of its digits in float32. The derivative is
    written out, because it needs two sums over the batch where differentiating the two passes one
    by one takes five; that is a third of the whole layer.

    Args:
      x: `[..., channels]`.
      scale: `[channels]`.
      bias: `[channels]`.

    Returns:
      The normalised values in the dtype of `x`; the mean and the biased variance, `[channels]`,
      in float32 or wider.

    >>> y, mean, var = normalise_by_batch(jnp.array([[1.0], [3.0]]), jnp.ones(1), jnp.zeros(1))
    >>> mean.tolist(), var.tolist()
    ([2.0], [1.0])

    References:
      S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
      Internal Covariate Shift", 2015.
    """
    wide = _wide(x)
    mean = _mean(wide)
    centred = wide - mean
    var = _mean(jnp.square(centred))
    y = centred * (scale * lax.rsqrt(var + EPSILON)) + bias
    return y.astype(x.dtype), mean, var


@normalise_by_batch.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    y, mean, var = normalise_by_batch(x, scale, bias)
    inverse = lax.rsqrt(var + EPSILON)
    unit = (_wide(x) - mean) * inverse
    dx, factor = _wide(dx), scale * inverse
    dmean, along = _mean(dx), _mean(unit * dx)
    # One factor for each of dx, unit and 1, so that its transpose is again two sums.
    dy = factor * dx + unit * (dscale - factor * along) + (dbias - factor * dmean)
    return (y, mean, var), (dy.astype(y.dtype), dmean, 2 * along / inverse)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean(x: jax.Array) -> jax.Array:
    return x.mean(tuple(range(x.ndim - 1)))
