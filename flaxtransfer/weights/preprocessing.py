"""Preprocessing: what is done to an image before a set of weights may see it.

What has to be done to an image before a set of weights may see it.

From what a sensor measured to the pixels that a pipeline carries, or straight to the network.

From stored bytes to what the network was trained on; runs on the device, inside the step.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["IMAGENET", "Preprocessing", "measured_to_pixels", "normalize", "normalize_measured"]


REQUIRED = ("mean", "std", "size", "resize")
OF_BANDS = ("bands", "wavelengths", "black", "white")
"""Fields that say what the channels are; a photograph has none of them."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclasses.dataclass(frozen=True, repr=False)
class Preprocessing:
    """Resize the shorter side, cut the center square, scale to 0..1, subtract mean, divide by std.

    It belongs to the weights: the same network with another mean is another network. It says how
    an image is prepared for prediction, and nothing about augmentation.

    Pixels are 0 to 1 for photographs, and 0 to 255 where they are stored. Where a sensor measured
    something else, reflectance times 10,000 or decibels, `black` and `white` say which
    measurements those two pixels are, and `measured.pixels` makes images of the others.

    Args:
        mean: subtracted from each channel, for pixels scaled to 0..1.
        std: divides each channel afterwards; positive.
        size: side of the square that the network sees, in pixels.
        resize: shorter side of the image before the center square is cut, in pixels.
        interpolation: filter of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.
        bands: what the sensor's makers call each channel; () where nobody said.
        wavelengths: center of each band in nm; () where nobody said, or the bands are no light.
        black: measurement of each band that is the pixel 0; () for photographs.
        white: measurement of each band that is the pixel 1; above black.

    Raises:
        ValueError: values that describe no preprocessing; all of them are listed.

    >>> Preprocessing((0.5,), (0.25,), size=224, resize=256).to_json()["mean"]
    [0.5]
    >>> Preprocessing.from_json(IMAGENET.to_json()) == IMAGENET
    True
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    resize: int
    interpolation: str = "bilinear"
    bands: tuple[str, ...] = ()
    wavelengths: tuple[float, ...] = ()
    black: tuple[float, ...] = ()
    white: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple(self.bands))
        for field in ("mean", "std", "wavelengths", "black", "white"):
            object.__setattr__(self, field, tuple(float(value) for value in getattr(self, field)))
        for field in ("size", "resize"):
            value = getattr(self, field)
            if isinstance(value, float) and value.is_integer():
                object.__setattr__(self, field, int(value))
        problems = self._problems()
        if problems:
            raise ValueError("this is no preprocessing:\n  " + "\n  ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if not self.mean or len(self.mean) != len(self.std):
            problems.append(
                f"mean and std need one value a channel, not {len(self.mean)} and {len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean)):
            problems.append(f"mean must be finite, not {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            problems.append(f"std must be positive, not {self.std}")
        if not isinstance(self.size, int) or self.size < 1:
            problems.append(f"size must be a positive number of pixels, not {self.size!r}")
        elif not isinstance(self.resize, int) or self.resize < self.size:
            problems.append(
                f"resize must be at least the size, {self.size} pixels, not {self.resize!r}"
            )
        if self.interpolation not in INTERPOLATIONS:
            problems.append(
                f"interpolation must be one of {', '.join(INTERPOLATIONS)}, "
                f"not {self.interpolation!r}"
            )
        return problems + self._problems_of_bands()

    def _problems_of_bands(self) -> list[str]:
        problems = [
            f"{name} needs one value a channel, {len(self.mean)}, or none, not {len(values)}"
            for name in OF_BANDS
            if len(values := getattr(self, name)) not in (0, len(self.mean))
        ]
        if not all(isinstance(name, str) and name for name in self.bands):
            problems.append(f"bands must be names, not {self.bands}")
        elif len(set(self.bands)) != len(self.bands):
            problems.append(f"two bands have one name: {self.bands}")
        # Below 100 nm it is no light, and most likely a number in micrometers.
        if not all(math.isfinite(nm) and nm >= 100 for nm in self.wavelengths):
            problems.append(f"wavelengths must be in nm, not {self.wavelengths}")
        ends = list(zip(self.black, self.white, strict=False))
        if len(self.black) != len(self.white):
            problems.append("black and white belong together, and one of them is missing")
        elif not all(math.isfinite(low) and low < high < math.inf for low, high in ends):
            problems.append(f"white must be above black, not {self.white} above {self.black}")
        return problems

    def __repr__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self._said().items()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _said(self) -> dict[str, Any]:
        """The fields without those of bands that nobody described."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != () or field.name not in OF_BANDS
        }

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary that `json` can write, without those of no bands."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._said().items()
        }

    def of_other_bands(self, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
        """The same geometry for images of other bands, of which nothing else is known.

        >>> IMAGENET.of_other_bands([0.5], [0.25]).mean
        (0.5,)
        """
        plain: dict[str, Any] = dict.fromkeys(OF_BANDS, ())
        return dataclasses.replace(self, mean=tuple(mean), std=tuple(std), **plain)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any] | str) -> Preprocessing:
        """The value that `to_json` wrote, from its dictionary or the text of it.

        Raises:
            ValueError: a field is missing or unknown, or holds what it cannot hold.

        >>> Preprocessing.from_json('{"mean": [0], "std": [1], "size": 8}')
        Traceback (most recent call last):
        ValueError: a preprocessing has mean, std, size, resize, ...; missing: resize
        """
        if isinstance(fields, str):
            fields = json.loads(fields)
        if not isinstance(fields, Mapping):
            raise ValueError(f"a preprocessing is a JSON object, not {fields!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in REQUIRED if name not in fields]
        unknown = [name for name in fields if name not in names]
        if missing or unknown:
            raise ValueError(
                f"a preprocessing has {', '.join(names[:5])}, and may have {', '.join(OF_BANDS)}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; unknown: {', '.join(map(str, unknown))}" if unknown else "")
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"this is no preprocessing: {error}") from error


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=224, resize=256)
"""What torchvision's first ImageNet weights were evaluated with."""


def measured_to_pixels(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    """Pixels from 0 to 1, as `ArraySource` takes them, between the preprocessing's black and white.

    You want it to train or predict with the pipeline, which stores images in 8 bits: what lies
    beyond black and white is cut off there. `normalized` cuts and rounds nothing.

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


def normalize_measured(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
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
    >>> normalized([[-20.0], [-10.0]], radar).ravel().tolist()
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


def normalize(
    images: jax.Array | np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """``(images / 255 - mean) / std``, channel by channel.

    Images travel as uint8, a quarter of the bytes of float32, and are normalized where they are
    used. Anything but uint8 is refused, so that nothing can be normalized twice.

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

    >>> normalize(np.array([[0, 255]], np.uint8), (0.5,), (0.25,)).tolist()
    [[-2.0, 2.0]]
    """
    if images.dtype != jnp.uint8:
        raise TypeError(
            f"images are {images.dtype}, wanted uint8 as the data pipeline makes them; have they "
            "been normalized already?"
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
    centered = scaled - jnp.asarray(mean, jnp.float32)
    return (centered / jnp.asarray(std, jnp.float32)).astype(dtype)
