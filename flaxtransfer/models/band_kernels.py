"""Kernels for images of n bands: where an adapter starts, and what can replace an RGB stem's.

``luminance`` and ``by_wavelength`` make kernels ``[1, 1, bands, 3]`` for an adapter in front of the
stem (``band_components`` makes one from the images). ``sum_kernels``, ``average_kernels`` and
``repeat_kernels`` are the usual ways without one: nothing is added to the network, and the stem's
kernel changes its shape.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "RGB_CENTRES_NM",
    "average_kernels",
    "by_wavelength",
    "checked_stem",
    "luminance",
    "repeat_kernels",
    "replicate",
    "sum_kernels",
]

RGB_CENTRES_NM = (660.0, 560.0, 490.0)
"""Red, green and blue, rounded from Landsat 8 (655, 561, 482) and Sentinel-2 (665, 560, 490)."""

_VISIBLE_NM = (380.0, 780.0)
"""The range of wavelengths of the CIE's colour-matching functions at 5 nm."""


def replicate(images: jax.Array) -> jax.Array:
    """A gray image in each of the three channels.

    Args:
      images: ``[batch, height, width, 1]``.

    Returns:
      ``[batch, height, width, 3]``, of the same dtype.

    Raises:
      ValueError: images of more than one band.

    >>> replicate(jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 3)
    """
    if images.ndim != 4 or images.shape[-1] != 1:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, replication takes [batch, height, width, 1]"
        )
    return jnp.repeat(images, 3, axis=-1)


def sum_kernels(stem_kernel: jax.Array) -> jax.Array:
    """The stem's kernel for one gray band: the same function as replicating the band.

    A convolution is linear in its channels, so three equal channels can be added up beforehand,
    which saves two thirds of the stem's work and changes nothing else: filters whose three parts
    cancel give zero both ways.

    Args:
      stem_kernel: ``[kernel height, kernel width, 3, filters]``.

    Returns:
      ``[kernel height, kernel width, 1, filters]``.

    Raises:
      ValueError: a kernel of another shape.

    >>> sum_kernels(jnp.ones((7, 7, 3, 64)))[0, 0, 0, 0].item()
    3.0
    """
    return checked_stem(stem_kernel).sum(axis=2, keepdims=True)


def average_kernels(stem_kernel: jax.Array, bands: int) -> jax.Array:
    """The stem's kernel for n bands of which none is more like red than another.

    Each band gets the mean over R, G and B, times 3 / n, so that n equal bands give the response
    that three equal channels gave. It is ``luminance`` folded into the stem.

    Args:
      stem_kernel: ``[kernel height, kernel width, 3, filters]``.
      bands: n, 1 or more.

    Returns:
      ``[kernel height, kernel width, bands, filters]``.

    Raises:
      ValueError: a kernel of another shape, or no bands.

    >>> average_kernels(jnp.ones((7, 7, 3, 64)), 6)[0, 0, :, 0].tolist()
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    _check_bands(bands)
    return jnp.repeat(sum_kernels(stem_kernel) / bands, bands, axis=2)


def repeat_kernels(stem_kernel: jax.Array, bands: int) -> jax.Array:
    """The stem's kernel for n bands with R, G, B in turn: timm's ``in_chans``.

    Band i gets the part of channel i mod 3, times 3 / n; one band gets the sum, three bands the
    kernel as it is. Filters keep their opponent colours, but between bands that merely stand at
    those places. Where n is no multiple of 3 the parts are not balanced: n equal bands do not
    give the response of a gray image.

    Args:
      stem_kernel: ``[kernel height, kernel width, 3, filters]``.
      bands: n, 1 or more.

    Returns:
      ``[kernel height, kernel width, bands, filters]``.

    Raises:
      ValueError: a kernel of another shape, or no bands.

    >>> kernel = jnp.array([1.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    >>> repeat_kernels(kernel, 4)[0, 0, :, 0].tolist()
    [0.75, 1.5, 3.0, 0.75]

    References:
      R. Wightman, "PyTorch Image Models", 2019 (``adapt_input_conv``).
    """
    _check_bands(bands)
    kernel = checked_stem(stem_kernel)
    if bands == 1:
        return sum_kernels(kernel)
    return jnp.take(kernel, jnp.arange(bands) % 3, axis=2) * (3 / bands)


def luminance(bands: int) -> np.ndarray:
    """The mean of all bands in each of the three channels; one gray band is replicated.

    Without wavelengths there is no reason to treat one band otherwise than another. The stem then
    sees a gray image, and its colour-opponent filters nothing (``analysis.stem``).

    Args:
      bands: how many, 1 or more.

    Returns:
      float64 ``[1, 1, bands, 3]``.

    Raises:
      ValueError: no bands.

    >>> luminance(2)[0, 0].tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    _check_bands(bands)
    return np.full((1, 1, bands, 3), 1 / bands)


def by_wavelength(
    centres_nm: Sequence[float],
    *,
    width_nm: float = 30.0,
    invisible: float = 0.1,
    channels_nm: Sequence[float] = RGB_CENTRES_NM,
) -> np.ndarray:
    """Red, green and blue from the visible bands, by how near each one is.

    A visible band has in each channel the weight of a Gaussian around 660, 560 or 490 nm. The
    bands outside 380 to 780 nm, to which a stem of photographs has no natural place, share
    ``invisible`` of each channel equally: enough for their content to reach a frozen stem, and too
    little to hide colour. If all bands are visible they have everything; if none is, each
    channel is the mean of all.

    Args:
      centres_nm: centre wavelength of each band in nm, in the order of the image's bands.
      width_nm: standard deviation of the Gaussians; 30 nm is 70 nm at half height, as wide as
        Sentinel-2's blue band.
      invisible: share of the bands outside the visible range, at least 0 and less than 1.
      channels_nm: centre of each of the stem's three channels, where it was not trained on
        photographs. A band within two widths of one of them counts as visible.

    Returns:
      float64 ``[1, 1, bands, 3]``; the weights of each channel sum to 1.

    Raises:
      ValueError: wavelengths that are no such, or in µm; numbers out of range.

    >>> red, green, blue = by_wavelength([490, 560, 665, 842])[0, 0].T.round(2)
    >>> red.tolist(), blue.tolist()
    ([0.0, 0.0, 0.9, 0.1], [0.84, 0.06, 0.0, 0.1])

    References:
      M. Drusch et al., "Sentinel-2: ESA's Optical High-Resolution Mission for GMES Operational
      Services", 2012 (bands and their widths).
      D. P. Roy et al., "Landsat-8: Science and product vision for terrestrial global change
      research", 2014 (bands).
      CIE 15, "Colorimetry" (the visible range).
    """
    centres, channels = np.asarray(centres_nm, np.float64), np.asarray(channels_nm, np.float64)
    if channels.shape != (3,) or not (np.isfinite(channels) & (channels >= 100)).all():
        raise ValueError(f"channels_nm are three wavelengths in nm, not {channels.tolist()}")
    if centres.ndim != 1 or not centres.size:
        raise ValueError(f"centres_nm has shape {centres.shape}, wanted [bands], one or more")
    if not (np.isfinite(centres) & (centres > 0)).all():
        raise ValueError(f"wavelengths are positive numbers of nm, not {centres.tolist()}")
    if (centres < 100).any():
        raise ValueError(
            f"wavelengths are in nm, and {centres.min():g} nm is no light; from µm multiply by 1000"
        )
    if not (math.isfinite(width_nm) and width_nm > 0):
        raise ValueError(f"width_nm is {width_nm}, wanted more than 0")
    if not 0 <= invisible < 1:
        raise ValueError(f"invisible is {invisible}, wanted at least 0 and less than 1")
    seen = (centres >= _VISIBLE_NM[0]) & (centres <= _VISIBLE_NM[1])
    seen |= (abs(centres[:, None] - channels) <= 2 * width_nm).any(axis=1)
    if not seen.any():
        return luminance(len(centres))
    share = 0.0 if seen.all() else invisible
    exponents = -0.5 * ((centres[seen, None] - channels) / width_nm) ** 2
    # Relative to the nearest band, for where all bands are far the Gaussians themselves underflow.
    weights = np.exp(exponents - exponents.max(axis=0))
    kernel = np.full((len(centres), 3), share / max(1, (~seen).sum()))
    kernel[seen] = (1 - share) * weights / weights.sum(axis=0)
    return kernel[None, None]


def checked_stem(kernel: Any) -> jax.Array:
    """The kernel, if it is one of an RGB stem.

    Raises:
      ValueError: another shape than ``[kernel height, kernel width, 3, filters]``.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim != 4 or kernel.shape[2] != 3:
        swap = kernel.ndim == 4 and kernel.shape[1] == 3
        raise ValueError(
            f"the stem's kernel has shape {tuple(kernel.shape)}, wanted [height, width, 3, filters]"
            + ("; torch's order becomes this by transpose(2, 3, 1, 0)" if swap else "")
        )
    return kernel


def _check_bands(bands: int) -> None:
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise ValueError(f"bands must be a whole number, 1 or more, not {bands!r}")
