"""Initial kernels for images with n bands.

``luminance``, ``by_wavelength`` and ``least_squares`` compute kernels ``[1, 1, bands, 3]`` for an
adapter in front of the stem. ``sum_kernels``, ``average_kernels`` and ``repeat_kernels`` are the
usual methods without an adapter: the network keeps its layers, and the stem's kernel changes its
shape.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "RGB_CENTERS_NM",
    "RGB_CORRELATION",
    "RGB_DEVIATIONS",
    "average_kernels",
    "by_wavelength",
    "channel_gains",
    "checked_stem",
    "common_scale",
    "least_squares",
    "luminance",
    "repeat_kernels",
    "replicate",
    "sum_kernels",
]


RGB_CENTERS_NM = (660.0, 560.0, 490.0)
"""Red, green and blue, rounded from Landsat 8 (655, 561, 482) and Sentinel-2 (665, 560, 490)."""

RGB_DEVIATIONS = (0.229, 0.224, 0.225)
"""Standard deviations of R, G and B over ImageNet's pixels, which are 0 to 1."""

_VISIBLE_NM = (380.0, 780.0)
"""The range of wavelengths of the CIE's color-matching functions at 5 nm."""


def common_scale(std: Sequence[float]) -> float:
    """One divisor for the pixels of all bands: the geometric mean of the channels' divisors.

    Args:
        std: by which the checkpoint divides each of its channels.

    >>> round(common_scale((0.1, 0.2, 0.4)), 3)
    0.2
    """
    return math.exp(sum(map(math.log, std)) / len(std))


def channel_gains(std: Sequence[float]) -> np.ndarray:
    """What turns bands in the ``common_scale`` into the stem's three channels.

    A stem expects (pixel - mean) / std with a std per channel, and a band has one scale only. The
    rest of the way is a factor per channel, whose geometric mean is 1.

    Args:
        std: of the stem's three channels; () for equal ones.

    Returns:
        float64 ``[3]``.

    Raises:
        ValueError: another number of channels.

    >>> channel_gains((0.1, 0.2, 0.4)).round(3).tolist()
    [2.0, 1.0, 0.5]
    """
    if len(std) not in (0, 3):
        raise ValueError(f"std must have three values, one per channel, got {len(std)}")
    return common_scale(std) / np.asarray(std, np.float64) if std else np.ones(3)


def replicate(images: jax.Array) -> jax.Array:
    """Replicates a gray image to three channels.

    Args:
        images: ``[batch, height, width, 1]``.

    Returns:
        ``[batch, height, width, 3]``, of the same dtype.

    Raises:
        ValueError: images with more than one band.

    >>> replicate(jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 3)
    """
    if images.ndim != 4 or images.shape[-1] != 1:
        raise ValueError(
            f"images must have shape [batch, height, width, 1], got {tuple(images.shape)}"
        )
    return jnp.repeat(images, 3, axis=-1)


def sum_kernels(stem_kernel: jax.Array) -> jax.Array:
    """The stem's kernel for one gray band: equivalent to replicating the band.

    A convolution is linear in its channels, so three equal channels can be added up in advance,
    which saves two thirds of the stem's work: filters whose three parts cancel give zero in both
    cases.

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
    """The stem's kernel for n bands, averaged over R, G and B.

    Each band gets the mean over R, G and B, times 3 / n, so that n equal bands give the same
    response as three equal channels. It equals ``luminance`` folded into the stem.

    Args:
        stem_kernel: ``[kernel height, kernel width, 3, filters]``.
        bands: n, >= 1.

    Returns:
        ``[kernel height, kernel width, bands, filters]``.

    Raises:
        ValueError: a kernel of another shape, or ``bands`` below 1.

    >>> average_kernels(jnp.ones((7, 7, 3, 64)), 6)[0, 0, :, 0].tolist()
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    _check_bands(bands)
    return jnp.repeat(sum_kernels(stem_kernel) / bands, bands, axis=2)


def repeat_kernels(stem_kernel: jax.Array, bands: int) -> jax.Array:
    """The stem's kernel for n bands, repeating R, G, B: the method of timm's ``in_chans``.

    Band i gets the part of channel i mod 3, times 3 / n; one band gets the sum, and three bands
    get the unchanged kernel. Filters keep their opponent colors, but between bands that are
    unrelated to those colors. If n is not a multiple of 3, the parts are not balanced: n equal
    bands do not give the response of a gray image.

    Args:
        stem_kernel: ``[kernel height, kernel width, 3, filters]``.
        bands: n, >= 1.

    Returns:
        ``[kernel height, kernel width, bands, filters]``.

    Raises:
        ValueError: a kernel of another shape, or ``bands`` below 1.

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

    Use it without wavelengths, where no band can be preferred. The stem then sees a gray image,
    and its color-opponent filters see nothing (``analysis.stem``).

    Args:
        bands: number of bands, >= 1.

    Returns:
        float64 ``[1, 1, bands, 3]``.

    Raises:
        ValueError: ``bands`` below 1.

    >>> luminance(2)[0, 0].tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    _check_bands(bands)
    return np.full((1, 1, bands, 3), 1 / bands)


def by_wavelength(
    centers_nm: Sequence[float],
    *,
    width_nm: float = 30.0,
    invisible: float = 0.1,
    channels_nm: Sequence[float] = RGB_CENTERS_NM,
) -> np.ndarray:
    """Red, green and blue from the visible bands, weighted by wavelength.

    A visible band has in each channel the weight of a Gaussian around 660, 560 or 490 nm. The
    bands outside 380 to 780 nm have no natural place in a stem for photographs. They share
    ``invisible`` of each channel equally: enough for their content to reach a frozen stem, and too
    little to hide color. If all bands are visible, they get all of the weight; if none is, each
    channel is the mean of all bands.

    Args:
        centers_nm: center wavelength of each band in nm, in the order of the image's bands.
        width_nm: standard deviation of the Gaussians; 30 nm is 70 nm at half maximum, the width of
            Sentinel-2's blue band.
        invisible: total weight of the bands outside the visible range, >= 0 and < 1.
        channels_nm: center of each of the stem's three channels, if it was not trained on
            photographs. A band within two widths of one of them counts as visible.

    Returns:
        float64 ``[1, 1, bands, 3]``; the weights of each channel sum to 1.

    Raises:
        ValueError: wavelengths that are not positive, or in µm; numbers out of range.

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
    centers, channels = np.asarray(centers_nm, np.float64), np.asarray(channels_nm, np.float64)
    if channels.shape != (3,) or not (np.isfinite(channels) & (channels >= 100)).all():
        raise ValueError(f"channels_nm must be three wavelengths in nm, got {channels.tolist()}")
    if centers.ndim != 1 or not centers.size:
        raise ValueError(f"centers_nm must have shape [bands], one or more, got {centers.shape}")
    if not (np.isfinite(centers) & (centers > 0)).all():
        raise ValueError(f"wavelengths must be positive, in nm, got {centers.tolist()}")
    if (centers < 100).any():
        raise ValueError(
            f"wavelengths must be >= 100 nm, got {centers.min():g}; multiply µm by 1000"
        )
    if not (math.isfinite(width_nm) and width_nm > 0):
        raise ValueError(f"width_nm must be > 0, got {width_nm}")
    if not 0 <= invisible < 1:
        raise ValueError(f"invisible must be >= 0 and < 1, got {invisible}")
    seen = (centers >= _VISIBLE_NM[0]) & (centers <= _VISIBLE_NM[1])
    seen |= (abs(centers[:, None] - channels) <= 2 * width_nm).any(axis=1)
    if not seen.any():
        return luminance(len(centers))
    share = 0.0 if seen.all() else invisible
    exponents = -0.5 * ((centers[seen, None] - channels) / width_nm) ** 2
    # Relative to the nearest band: if all bands are far, the Gaussians themselves underflow.
    weights = np.exp(exponents - exponents.max(axis=0))
    kernel = np.full((len(centers), 3), share / max(1, (~seen).sum()))
    kernel[seen] = (1 - share) * weights / weights.sum(axis=0)
    return kernel[None, None]


_PATCHES_PER_BAND = 10
"""Below this, directions with little variance are sampling noise."""

_NEGLIGIBLE = 1e-4
"""Fraction of the largest variance below which a component is dropped. Rounding to 8 bits alone
leaves about 2e-5 of an image's variance, which whitening would amplify to the level of the rest."""


def _rgb_correlation() -> np.ndarray:
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    covariance = vectors * values @ vectors.T
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    correlation.flags.writeable = False
    result: np.ndarray = correlation
    return result


RGB_CORRELATION = _rgb_correlation()
"""Correlation ``[3, 3]`` of R, G and B over ImageNet's pixels, from the principal components of
their covariance that go with Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep
Convolutional Neural Networks", 2012 (section 4.1), as torch's ImageNet scripts publish them."""


def least_squares(
    patches: Any, rgb_covariance: Any = RGB_CORRELATION, *, towards: Any = None
) -> np.ndarray:
    """Maps the principal components of the bands to the covariance of the pre-training's RGB.

    The three principal components of the bands are whitened, rotated and scaled to the principal
    components of RGB. Contrast between bands then reaches the stem as strongly as contrast between
    colors, and the second-order statistics match those that the stem was trained on. The
    assignment of components to colors is free. By default the first component is brightness and
    the others follow by size; with ``towards``, the rotation minimizes the distance to that
    kernel's channels (Procrustes).

    With fewer than three components (few or redundant bands), the covariance is the nearest one of
    lower rank, and the variances are still those of RGB.

    Args:
        patches: ``[patches, bands]``, pixels or means of small patches, of normalized images.
        rgb_covariance: ``[3, 3]`` of the pre-training's normalized inputs; by default ImageNet's
            correlation, which gives channels of variance 1. ``change_input`` gives the covariance
            of photographs under the checkpoint's own preprocessing.
        towards: kernel ``[1, 1, bands, 3]``, such as the result of ``by_wavelength``.

    Returns:
        float64 ``[1, 1, bands, 3]``. The channels of the patches have this covariance (exactly,
        with three components or more), and mean 0 if the bands have mean 0.

    Raises:
        ValueError: fewer than 10 patches per band, values that are not finite, bands that are not
            centered or all constant, or an invalid covariance or kernel.

    >>> gray = np.random.default_rng(0).normal(0, 0.5, (100, 1))
    >>> channels = (gray - gray.mean()) @ least_squares(gray - gray.mean())[0, 0]
    >>> channels.std(axis=0).round(6).tolist()
    [1.0, 1.0, 1.0]

    References:
        P. H. Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966.
        C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", 1936.
    """
    bands = _checked_patches(patches)
    target = _checked_covariance(rgb_covariance)
    toward = luminance(bands.shape[1]) if towards is None else np.asarray(towards, np.float64)
    if toward.shape != (1, 1, bands.shape[1], 3):
        raise ValueError(
            f"towards must have shape (1, 1, {bands.shape[1]}, 3) for these patches, got "
            f"{toward.shape}"
        )
    covariance = np.cov(bands, rowvar=False, ddof=0).reshape(bands.shape[1], -1)
    variances, axes = _main_components(covariance)
    rank = int((variances[:3] > _NEGLIGIBLE * variances[0]).sum())
    if rank < 3 and (target <= 0).any():
        # With positive entries the first component reaches every channel (Perron, Frobenius).
        raise ValueError(
            f"rgb_covariance must be positive in all entries for patches with fewer than 3 "
            f"independent components ({rank} here), got {target.tolist()}"
        )
    whiten = axes[:, :rank] / np.sqrt(variances[:rank])
    target_variances, colors = _main_components(target)
    unwhiten = (colors[:, :rank] * np.sqrt(target_variances[:rank])).T
    agreement = whiten.T @ covariance @ toward[0, 0] @ unwhiten.T
    if towards is None:
        rotation = np.diag(np.where(np.diag(agreement) < 0, -1.0, 1.0))
    else:
        left, _, right = np.linalg.svd(agreement)
        rotation = left @ right
    scale = np.sqrt(np.diag(target) / np.square(unwhiten).sum(axis=0))
    result: np.ndarray = (whiten @ rotation @ unwhiten * scale)[None, None]
    return result


def checked_stem(kernel: Any) -> jax.Array:
    """The kernel as an array, after a check that it belongs to an RGB stem.

    Raises:
        ValueError: a shape other than ``[kernel height, kernel width, 3, filters]``.
    """
    kernel = jnp.asarray(kernel)
    if kernel.ndim != 4 or kernel.shape[2] != 3:
        swap = kernel.ndim == 4 and kernel.shape[1] == 3
        raise ValueError(
            f"stem_kernel must have shape [height, width, 3, filters], got {tuple(kernel.shape)}"
            + ("; transpose(2, 3, 1, 0) converts torch's order" if swap else "")
        )
    result: jax.Array = kernel
    return result


def _check_bands(bands: int) -> None:
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise ValueError(f"bands must be an integer >= 1, got {bands!r}")


def _checked_patches(patches: Any) -> np.ndarray:
    bands = np.asarray(patches, np.float64)
    if bands.ndim != 2 or not bands.shape[1]:
        raise ValueError(
            f"patches must have shape [patches, bands], got {bands.shape}; images.reshape(-1, "
            f"bands) "
            "makes pixels of images"
        )
    count, columns = bands.shape
    if count < _PATCHES_PER_BAND * columns:
        raise ValueError(
            f"patches must number >= {_PATCHES_PER_BAND * columns} for {columns} bands, got {count}"
        )
    if unfinished := np.flatnonzero(~np.isfinite(bands).all(axis=0)).tolist():
        raise ValueError(
            f"patches must be finite, got NaN or infinite values in the bands {unfinished}; leave "
            "out pixels without data"
        )
    deviations = bands.std(axis=0)
    if not (deviations > 1e-12 * np.abs(bands).max(axis=0)).any():
        raise ValueError("patches must not be constant: there is no contrast to scale")
    # The adapter has no bias to subtract a mean, which would therefore reach the stem.
    away = np.flatnonzero(np.abs(bands.mean(axis=0)) > 0.5 * deviations + 1e-12)
    if away.size:
        means = {int(band): round(float(bands[:, band].mean()), 4) for band in away[:6]}
        raise ValueError(
            "the mean of each band must be within half a standard deviation of 0, got means "
            f"{means}; normalize the images by their own mean and deviation per band"
        )
    return bands


def _checked_covariance(covariance: Any) -> np.ndarray:
    matrix = np.asarray(covariance, np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"rgb_covariance must be 3 × 3 finite numbers, got {matrix.tolist()}")
    if not np.allclose(matrix, matrix.T) or np.linalg.eigvalsh(matrix).min() <= 0:
        raise ValueError(
            f"rgb_covariance must be symmetric and positive definite, got {matrix.tolist()}"
        )
    return matrix


def _main_components(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances in decreasing order, and the principal axes as columns."""
    variances, axes = np.linalg.eigh(covariance)
    return variances[::-1], axes[:, ::-1]
