"""A kernel for images of n bands from their own statistics: the bands' main components as RGB."""

from typing import Any

import numpy as np

from flaxtransfer.models.band_kernels import luminance

__all__ = ["RGB_CORRELATION", "least_squares"]

_PATCHES_PER_BAND = 10
"""Below that, directions of little variance are an accident of the sample."""

_NEGLIGIBLE = 1e-4
"""Share of the largest variance below which a component is left out: rounding to 8 bits alone
leaves some 2e-5 of an image's variance, and whitening would make it as loud as the rest."""


def _rgb_correlation() -> np.ndarray:
    values = np.array([0.2175, 0.0188, 0.0045])
    vectors = np.array(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    covariance = vectors * values @ vectors.T
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    correlation.flags.writeable = False
    return correlation


RGB_CORRELATION = _rgb_correlation()
"""Correlation ``[3, 3]`` of R, G and B over ImageNet's pixels, from the principal components of
their covariance that go with Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep
Convolutional Neural Networks", 2012 (section 4.1), as torch's ImageNet scripts publish them."""


def least_squares(
    patches: Any, rgb_covariance: Any = RGB_CORRELATION, *, towards: Any = None
) -> np.ndarray:
    """Channels with the covariance of the pre-training's RGB, from the bands' main components.

    The three main components of the bands are whitened and become, rotated and scaled, the main
    components of RGB: contrast between bands reaches the stem as strongly as contrast between
    colours did, and what the stem's filters learned to expect holds. Which component is which
    colour is open. By default the first is brightness and the others follow by size; with
    ``towards`` the rotation is the one whose channels are nearest to that kernel's (Procrustes).

    With fewer than three components (few bands, or bands that say the same) the covariance is the
    nearest of lower rank, and the variances are still those of RGB.

    Args:
      patches: ``[patches, bands]``, pixels or means of small patches, of normalised images.
      rgb_covariance: ``[3, 3]`` of the pre-training's normalised inputs; ImageNet's correlation
        when left out, which gives channels of variance 1.
      towards: kernel ``[1, 1, bands, 3]``, such as that of ``by_wavelength``.

    Returns:
      float64 ``[1, 1, bands, 3]``. Channels of the patches have that covariance, exactly with three
      components or more, and mean 0 as far as the bands have.

    Raises:
      ValueError: fewer than 10 patches a band, values that are not finite, bands that are not
        centred or all constant, a covariance or kernel that is none.

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
    wanted = luminance(bands.shape[1]) if towards is None else np.asarray(towards, np.float64)
    if wanted.shape != (1, 1, bands.shape[1], 3):
        raise ValueError(
            f"towards has shape {wanted.shape}; for these patches it is (1, 1, {bands.shape[1]}, 3)"
        )
    covariance = np.cov(bands, rowvar=False, ddof=0).reshape(bands.shape[1], -1)
    variances, axes = _main_components(covariance)
    rank = int((variances[:3] > _NEGLIGIBLE * variances[0]).sum())
    if rank < 3 and (target <= 0).any():
        # With positive entries the first component reaches every channel (Perron, Frobenius).
        raise ValueError(
            f"the patches have {rank} independent components, and with fewer than 3 every pair of "
            f"channels must correlate positively; rgb_covariance is {target.tolist()}"
        )
    whiten = axes[:, :rank] / np.sqrt(variances[:rank])
    target_variances, colours = _main_components(target)
    unwhiten = (colours[:, :rank] * np.sqrt(target_variances[:rank])).T
    agreement = whiten.T @ covariance @ wanted[0, 0] @ unwhiten.T
    if towards is None:
        rotation = np.diag(np.where(np.diag(agreement) < 0, -1.0, 1.0))
    else:
        left, _, right = np.linalg.svd(agreement)
        rotation = left @ right
    scale = np.sqrt(np.diag(target) / np.square(unwhiten).sum(axis=0))
    return (whiten @ rotation @ unwhiten * scale)[None, None]


def _checked_patches(patches: Any) -> np.ndarray:
    bands = np.asarray(patches, np.float64)
    if bands.ndim != 2 or not bands.shape[1]:
        raise ValueError(
            f"patches have shape {bands.shape}, wanted [patches, bands]; images become pixels by "
            "images.reshape(-1, bands)"
        )
    count, columns = bands.shape
    if count < _PATCHES_PER_BAND * columns:
        raise ValueError(
            f"{count} patches are too few for {columns} bands; wanted "
            f"{_PATCHES_PER_BAND * columns} or more"
        )
    if unfinished := np.flatnonzero(~np.isfinite(bands).all(axis=0)).tolist():
        raise ValueError(
            f"patches have values that are not finite in the bands {unfinished}; leave out pixels "
            "without data"
        )
    deviations = bands.std(axis=0)
    if not (deviations > 1e-12 * np.abs(bands).max(axis=0)).any():
        raise ValueError("the patches are all alike: there is no contrast to scale")
    # There is no bias to subtract a mean with, so that it would reach the stem.
    away = np.flatnonzero(np.abs(bands.mean(axis=0)) > 0.5 * deviations + 1e-12)
    if away.size:
        means = {int(band): round(float(bands[:, band].mean()), 4) for band in away[:6]}
        raise ValueError(
            f"bands are not centred, more than half a deviation away from 0 (means {means}); "
            "normalise the images by their own mean and deviation per band"
        )
    return bands


def _checked_covariance(covariance: Any) -> np.ndarray:
    matrix = np.asarray(covariance, np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"rgb_covariance must be 3 × 3 finite numbers, not {matrix.tolist()}")
    if not np.allclose(matrix, matrix.T) or np.linalg.eigvalsh(matrix).min() <= 0:
        raise ValueError(
            f"rgb_covariance must be symmetric and positive definite, not {matrix.tolist()}"
        )
    return matrix


def _main_components(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variances, the largest first, and their axes as columns."""
    variances, axes = np.linalg.eigh(covariance)
    return variances[::-1], axes[:, ::-1]
