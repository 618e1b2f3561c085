"""Band statistics.

Mean, standard deviation and samples of each band, measured on training images. Use them to adapt a
network for RGB to images with other bands.
"""

from __future__ import annotations

import numpy as np

from flaxtransfer.data.pipeline import batches_in_order
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import subsample
from flaxtransfer.data.transforms import evaluation_transform
from flaxtransfer.models.band_init import common_scale
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["band_patches", "band_preprocessing"]


_MOST_IMAGES = 2000
"""More images hardly change a mean over all their pixels."""

_BATCH = 64


def band_preprocessing(
    preprocessing: Preprocessing, source: Source, positions: np.ndarray, bands: int
) -> Preprocessing:
    """The weights' preprocessing for the bands of the data, in the scale that the stem expects.

    The statistics of the weights are those of red, green and blue in photographs; other bands have
    none. Over all pixels of the training images, each band gets mean 0, and all bands get the same
    contrast: the root mean square of their deviations, divided by the ``common_scale`` of the
    weights' own std. One gray band is therefore divided by that scale and nothing else, as in
    replication; ``transfer`` adds what is left per channel of the stem. All of that comes before
    the adapter, which therefore folds exactly into the stem. A constant band is only centered.

    Args:
        preprocessing: of the weights; size, resize and interpolation are kept.
        source: labeled images of ``bands`` bands.
        positions: of the training images; at most 2000 of them are read, drawn evenly.
        bands: how many bands the images have.

    Raises:
        ValueError: no images, or images with another number of bands.

    >>> from flaxtransfer.data import ArraySource
    >>> images = np.stack([np.full((4, 8, 8), 51), np.arange(256).reshape(4, 8, 8)], -1)
    >>> source = ArraySource(images.astype(np.uint8), [0, 1, 0, 1])
    >>> plain = Preprocessing((0.5,) * 3, (0.25,) * 3, 8, 8)
    >>> found = band_preprocessing(plain, source, np.arange(4), 2)
    >>> [round(value, 3) for value in (*found.mean, *found.std)]
    [0.2, 0.5, 0.25, 0.25]
    """
    counts = np.zeros((bands, 256), np.int64)
    transform = evaluation_transform(preprocessing, channels=bands)
    chosen = subsample(np.asarray(positions), _MOST_IMAGES)
    _check(source, chosen, bands)
    for batch in batches_in_order(source, chosen, batch_size=_BATCH, transform=transform):
        images = batch["image"][batch["weight"] > 0]
        for band in range(bands):
            # Integers: the result depends neither on the order nor on the batches.
            counts[band] += np.bincount(images[..., band].ravel(), minlength=256)
    values = np.arange(256) / 255
    fractions = counts / counts.sum(axis=1, keepdims=True)
    mean = fractions @ values
    std = np.sqrt(np.maximum((fractions * np.square(values - mean[:, None])).sum(axis=1), 0))
    varied, scale = std >= 1e-9, common_scale(preprocessing.std)
    contrast = np.sqrt(np.square(std[varied]).mean()) if varied.any() else 1.0
    divisors = np.where(varied, std * (scale / contrast), scale)
    return preprocessing.of_other_bands(mean.tolist(), divisors.tolist())


def band_patches(
    preprocessing: Preprocessing,
    source: Source,
    positions: np.ndarray,
    *,
    side: int = 4,
    most: int = 20_000,
) -> np.ndarray:
    """Patch means of normalized training images, for ``transfer(..., patches=...)``.

    Args:
        preprocessing: from ``band_preprocessing``.
        source: labeled images with as many bands as the preprocessing.
        positions: of the training images.
        side: of a square patch, in px of the network's input; patches are less noisy than pixels.
        most: how many patches to take, from images drawn evenly from the positions.

    Returns:
        float64 ``[patches, bands]``.
    """
    bands, side = len(preprocessing.mean), min(side, preprocessing.size)
    across = preprocessing.size // side
    chosen = subsample(np.asarray(positions), max(1, most // across**2))
    _check(source, chosen, bands)
    transform = evaluation_transform(preprocessing, channels=bands)
    found = []
    for batch in batches_in_order(source, chosen, batch_size=_BATCH, transform=transform):
        images = batch["image"][batch["weight"] > 0]
        cut = images[:, : across * side, : across * side]
        squares = cut.reshape(len(cut), across, side, across, side, bands)
        found.append(squares.mean(axis=(2, 4), dtype=np.float64).reshape(-1, bands))
    means, stds = np.array(preprocessing.mean), np.array(preprocessing.std)
    normalized: np.ndarray = (np.concatenate(found) / 255 - means) / stds
    return normalized


def _check(source: Source, positions: np.ndarray, bands: int) -> None:
    if not len(positions):
        raise ValueError("the statistics of bands need training images; there are none")
    shape = source[int(positions[0])]["image"].shape
    if shape[-1] != bands:
        raise ValueError(
            f"images must have {bands} channels, one per band; image {int(positions[0])} has "
            f"{shape[-1]} (shape {list(shape)})"
        )
