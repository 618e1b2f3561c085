"""From what a sensor measured to the pixels that a pipeline carries, or straight to the network."""

from typing import Any

import numpy as np

from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["normalised", "pixels"]


def pixels(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    """Pixels from 0 to 1, as `ArraySource` takes them, between the preprocessing's black and white.

    You want it to train or predict with the pipeline, which stores images in 8 bits: what lies
    beyond black and white is cut off there. `normalised` cuts and rounds nothing.

    Args:
        measurements: numbers `[..., bands]` in the sensor's units, such as Sentinel-2's integers.
        preprocessing: of the checkpoint; one without black and white is for photographs.

    Returns:
        float32 `[..., bands]`.

    Raises:
        ValueError: another number of bands, numbers that are not finite, or a preprocessing that
            does not say what black and white are.

    >>> sentinel = Preprocessing((0.0,), (1.0,), 8, 8, bands=("B4",), black=(0,), white=(10_000,))
    >>> pixels(np.array([[-3], [2_500], [12_000]]), sentinel).ravel().tolist()
    [0.0, 0.25, 1.0]
    """
    return np.clip(_scaled(measurements, preprocessing), 0, 1).astype(np.float32)


def normalised(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    """What the network takes, from what the sensor measured: nothing is cut off or rounded.

    You want it to look at features of images that have their size already; nothing is resized.

    Args:
        measurements: numbers `[..., bands]` in the sensor's units.
        preprocessing: of the checkpoint.

    Returns:
        float32 `[..., bands]`.

    Raises:
        ValueError: as `pixels`.

    >>> radar = Preprocessing((0.5,), (0.25,), 8, 8, bands=("VV",), black=(-40,), white=(0,))
    >>> normalised([[-20.0], [-10.0]], radar).ravel().tolist()
    [0.0, 1.0]
    """
    mean, std = (np.asarray(values) for values in (preprocessing.mean, preprocessing.std))
    return ((_scaled(measurements, preprocessing) - mean) / std).astype(np.float32)


def _scaled(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    values = np.asarray(measurements)
    if not preprocessing.black:
        raise ValueError(
            "the preprocessing does not say which measurements are black and white: it is for "
            "photographs, whose pixels are uint8, or floats from 0 to 1, already"
        )
    if values.ndim < 1 or values.shape[-1] != len(preprocessing.black):
        raise ValueError(
            f"measurements of shape {list(values.shape)}, wanted [..., {len(preprocessing.black)}]"
            f"; the last axis has the bands {', '.join(preprocessing.bands) or 'in their order'}"
        )
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError("measurements must be finite numbers; fill in what is missing first")
    black, white = (np.asarray(ends) for ends in (preprocessing.black, preprocessing.white))
    return (values.astype(np.float64) - black) / (white - black)
