"""From stored bytes to what the network was trained on; runs on the device, inside the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normalise(
    images: jax.Array | np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """``(images / 255 - mean) / std``, channel by channel.

    Images travel as uint8, a quarter of the bytes of float32, and are normalised where they are
    used. Anything but uint8 is refused, so that nothing can be normalised twice.

    Args:
      images: uint8 ``[..., channels]``.
      mean: of each channel on the scale 0 .. 1, or one number for all.
      std: likewise, greater than 0.
      dtype: of the result; the arithmetic is float32.

    Returns:
      ``[..., channels]`` of ``dtype``.

    Raises:
      TypeError: ``images`` are not uint8.
      ValueError: mean or std do not fit the channels, or a std is not positive.

    >>> normalise(np.array([[0, 255]], np.uint8), (0.5,), (0.25,)).tolist()
    [[-2.0, 2.0]]
    """
    if images.dtype != jnp.uint8:
        raise TypeError(
            f"images are {images.dtype}, wanted uint8 as the data pipeline makes them; have they "
            "been normalised already?"
        )
    channels = images.shape[-1]
    problems = [
        f"{name} has {len(values)} values"
        for name, values in (("mean", mean), ("std", std))
        if len(values) not in (1, channels)
    ]
    if problems:
        raise ValueError(f"images have {channels} channels, but {' and '.join(problems)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std is {tuple(std)}; every value must be greater than 0")
    scaled = jnp.asarray(images).astype(jnp.float32) / 255
    centred = scaled - jnp.asarray(mean, jnp.float32)
    return (centred / jnp.asarray(std, jnp.float32)).astype(dtype)
