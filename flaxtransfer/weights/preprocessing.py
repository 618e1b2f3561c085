"""Preprocessing: how images are prepared for a set of weights.

A ``Preprocessing`` is a value that belongs to the weights. ``normalize`` applies its mean and std
to uint8 images on the device, inside the training step. ``measured_to_pixels`` and
``normalize_measured`` convert sensor measurements, such as reflectance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flaxtransfer.files import parse_json
from flaxtransfer.paths import shortened

if TYPE_CHECKING:
    import jax

__all__ = [
    "CROP_MODES",
    "IMAGENET",
    "INTERPOLATIONS",
    "PROCESSORS",
    "Preprocessing",
    "are_numbers",
    "is_number",
    "listed",
    "measured_to_pixels",
    "normalize",
    "normalize_measured",
    "refuse_fields",
    "whole",
]


REQUIRED = ("mean", "std", "size", "resize")
OF_BANDS = ("bands", "wavelengths", "black", "white")
"""Fields that describe the channels of a sensor; photographs have none of them."""
_CROPS = ("crop_mode", "processor")

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash")
PROCESSORS = ("torchvision", "huggingface")


@dataclasses.dataclass(frozen=True, repr=False)
class Preprocessing:
    """Resize the shorter side, crop the center, scale to 0..1, subtract mean, divide by std.

    It belongs to the weights: the same network with another mean is another network. It describes
    how an image is prepared for prediction, not augmentation.

    Pixels are 0 to 1, stored as 0 to 255. For sensors with other units, such as reflectance times
    10,000 or decibels, ``black`` and ``white`` are the measurements of those two pixel values, and
    ``measured_to_pixels`` converts measurements to pixels.

    Args:
        mean: subtracted from each channel, for pixels scaled to 0..1.
        std: divides each channel afterwards; > 0.
        size: side of the square input of the network, in pixels.
        resize: shorter side of the image before the center crop, in pixels.
        interpolation: filter of the resize: nearest, bilinear, bicubic, lanczos, box or hamming.
        crop_mode: "center" keeps the proportions of the image; "squash" resizes both sides to
            ``resize``, so that the center crop loses nothing where it equals ``size``.
        processor: whose rules hold in the details, "torchvision" (and timm) or "huggingface". The
            latter rounds down where half a pixel would be cut away, and squashes the width first.
        bands: the sensor's name of each channel; () if unknown.
        wavelengths: center of each band in nm; () if unknown, or if the bands are not light.
        black: measurement of each band that becomes pixel 0; () for photographs.
        white: measurement of each band that becomes pixel 1; above black.

    Raises:
        ValueError: invalid values; all problems in one text.

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
    crop_mode: str = "center"
    processor: str = "torchvision"
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
            raise ValueError("invalid Preprocessing: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if not self.mean or len(self.mean) != len(self.std):
            problems.append(
                f"mean and std must have one value per channel, got {len(self.mean)} and "
                f"{len(self.std)}"
            )
        if not all(map(math.isfinite, self.mean)):
            problems.append(f"mean must be finite, got {self.mean}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            problems.append(f"std must be > 0, got {self.std}")
        if not isinstance(self.size, int) or self.size < 1:
            problems.append(f"size must be an integer >= 1 (pixels), got {self.size!r}")
        elif not isinstance(self.resize, int) or self.resize < self.size:
            problems.append(
                f"resize must be an integer >= size, {self.size} pixels, got {self.resize!r}"
            )
        choices = (INTERPOLATIONS, CROP_MODES, PROCESSORS)
        problems += [
            f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
            for name, known in zip(("interpolation", *_CROPS), choices, strict=True)
            if getattr(self, name) not in known
        ]
        return problems + self._problems_of_bands()

    def _problems_of_bands(self) -> list[str]:
        problems = [
            f"{name} must have one value per channel, {len(self.mean)}, or none, got {len(values)}"
            for name in OF_BANDS
            if len(values := getattr(self, name)) not in (0, len(self.mean))
        ]
        if not all(isinstance(name, str) and name for name in self.bands):
            problems.append(f"bands must be names, got {self.bands}")
        elif len(set(self.bands)) != len(self.bands):
            problems.append(f"bands must have different names, got {self.bands}")
        # A number below 100 is most likely in micrometers.
        if not all(math.isfinite(nm) and nm >= 100 for nm in self.wavelengths):
            problems.append(f"wavelengths must be >= 100 nm, got {self.wavelengths}")
        ends = list(zip(self.black, self.white, strict=False))
        if len(self.black) != len(self.white):
            problems.append("black and white must be given together, but one of them is missing")
        elif not all(math.isfinite(low) and low < high < math.inf for low, high in ends):
            problems.append(
                f"white must be above black, got white {self.white} and black {self.black}"
            )
        return problems

    def __repr__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self._stated().items()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _stated(self) -> dict[str, Any]:
        """All fields except those of crops and bands that have their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
            or field.name not in (*_CROPS, *OF_BANDS)
        }

    def to_json(self) -> dict[str, Any]:
        """The fields as a dictionary for ``json``, without defaults of crops and bands."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._stated().items()
        }

    def of_other_bands(self, mean: Sequence[float], std: Sequence[float]) -> Preprocessing:
        """The same resize and crop for images with other bands, about which nothing else is known.

        >>> IMAGENET.of_other_bands([0.5], [0.25]).mean
        (0.5,)
        """
        plain: dict[str, Any] = dict.fromkeys(OF_BANDS, ())
        return dataclasses.replace(self, mean=tuple(mean), std=tuple(std), **plain)

    def at_size(self, size: int) -> Preprocessing:
        """The same for images of another size, of which as large a part is cut out.

        >>> IMAGENET.at_size(112).resize
        128
        """
        return dataclasses.replace(self, size=size, resize=round(self.resize * size / self.size))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any] | str) -> Preprocessing:
        """The value from the output of ``to_json``, as a dictionary or as JSON text.

        Raises:
            ValueError: a missing or unknown field, or an invalid value.

        >>> Preprocessing.from_json('{"mean": [0], "std": [1], "size": 8}')
        Traceback (most recent call last):
        ValueError: a Preprocessing must have mean, std, size, resize, ...; missing: resize
        """
        if isinstance(fields, str):
            fields = parse_json(fields.encode(), "a Preprocessing as JSON")
        if not isinstance(fields, Mapping):
            raise ValueError(f"a Preprocessing must be a JSON object, got {fields!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in REQUIRED if name not in fields]
        unknown = [name for name in fields if name not in names]
        if missing or unknown:
            raise ValueError(
                f"a Preprocessing must have {', '.join(names[:5])}, and may have "
                f"{', '.join(names[5:])}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
                + (f"; unknown: {', '.join(map(str, unknown))}" if unknown else "")
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"invalid Preprocessing: {error}") from error


IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=224, resize=256)
"""The preprocessing of torchvision's first ImageNet weights."""


def refuse_fields(
    fields: Mapping[str, Any], checks: Iterable[tuple[str, bool, str]], file: str
) -> None:
    """Raises ValueError for the fields whose check failed.

    Args:
        fields: of the record, by name.
        checks: name of a field, whether it is good, and what it must be.
        file: name of the file.
    """
    problems = [
        f"{name} must be {wanted}, got {shortened(repr(fields.get(name)), 60)}"
        for name, good, wanted in checks
        if not good
    ]
    if problems:
        raise ValueError(
            f"{file} next to the weights asks for pixels that are not supported: "
            f"{shortened('; '.join(problems), 380)}; edit or remove it, and check the result's "
            "preprocessing"
        )


def is_number(value: Any) -> bool:
    """Whether an entry of a record is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def listed(value: Any) -> tuple[float, ...]:
    """The numbers of a record's entry, which may be one number."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def are_numbers(value: Any) -> bool:
    """Whether an entry of a record is one finite number or more."""
    return bool(listed(value)) and all(map(is_number, listed(value)))


def whole(value: Any) -> int:
    """A whole number of 1 or more as an integer; 0 for anything else in a record."""
    return int(value) if is_number(value) and value == int(value) and value >= 1 else 0


def measured_to_pixels(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    """Converts sensor measurements to pixels from 0 (black) to 1 (white) for ``ArraySource``.

    Use it to train or predict with the pipeline, which stores images in 8 bits: measurements beyond
    black and white are clipped. ``normalize_measured`` neither clips nor rounds.

    Args:
        measurements: numbers ``[..., bands]`` in the sensor's units, such as Sentinel-2's integers.
        preprocessing: of the checkpoint, with black and white.

    Returns:
        float32 ``[..., bands]``.

    Raises:
        ValueError: another number of bands, numbers that are not finite, or a preprocessing
            without black and white.

    >>> sentinel = Preprocessing((0.0,), (1.0,), 8, 8, bands=("B4",), black=(0,), white=(10_000,))
    >>> measured_to_pixels(np.array([[-3], [2_500], [12_000]]), sentinel).ravel().tolist()
    [0.0, 0.25, 1.0]
    """
    result: np.ndarray = np.clip(_scaled(measurements, preprocessing), 0, 1).astype(np.float32)
    return result


def normalize_measured(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    """Normalized input of the network from sensor measurements, without clipping or rounding.

    Use it to compute features of images that already have the right size; nothing is resized.

    Args:
        measurements: numbers ``[..., bands]`` in the sensor's units.
        preprocessing: of the checkpoint.

    Returns:
        float32 ``[..., bands]``.

    Raises:
        ValueError: as ``measured_to_pixels``.

    >>> radar = Preprocessing((0.5,), (0.25,), 8, 8, bands=("VV",), black=(-40,), white=(0,))
    >>> normalize_measured([[-20.0], [-10.0]], radar).ravel().tolist()
    [0.0, 1.0]
    """
    mean, std = (np.asarray(values) for values in (preprocessing.mean, preprocessing.std))
    result: np.ndarray = ((_scaled(measurements, preprocessing) - mean) / std).astype(np.float32)
    return result


def _scaled(measurements: Any, preprocessing: Preprocessing) -> np.ndarray:
    values = np.asarray(measurements)
    if not preprocessing.black:
        raise ValueError(
            "preprocessing must have black and white; this one is for photographs, whose pixels "
            "are "
            "already uint8, or floats from 0 to 1"
        )
    if values.ndim < 1 or values.shape[-1] != len(preprocessing.black):
        raise ValueError(
            f"measurements must have shape [..., {len(preprocessing.black)}], got "
            f"{list(values.shape)}; the last axis has the bands "
            f"{', '.join(preprocessing.bands) or 'in order'}"
        )
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise ValueError("measurements must be finite numbers; fill in missing values first")
    black, white = (np.asarray(ends) for ends in (preprocessing.black, preprocessing.white))
    result: np.ndarray = (values.astype(np.float64) - black) / (white - black)
    return result


def normalize(
    images: jax.Array | np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    dtype: Any = np.float32,
) -> jax.Array:
    """Normalizes uint8 images: ``(images / 255 - mean) / std`` per channel.

    Images are transferred as uint8, a quarter of the bytes of float32, and are normalized on the
    device. Other dtypes are refused, so that no image is normalized twice.

    Args:
        images: uint8 ``[..., channels]``.
        mean: of each channel on the scale 0 to 1, or one number for all.
        std: likewise, > 0.
        dtype: of the result; the arithmetic is float32.

    Returns:
        ``[..., channels]`` of ``dtype``.

    Raises:
        TypeError: ``images`` are not uint8.
        ValueError: mean or std do not fit the channels, or std is not > 0.

    >>> normalize(np.array([[0, 255]], np.uint8), (0.5,), (0.25,)).tolist()
    [[-2.0, 2.0]]
    """
    if images.dtype != np.uint8:
        raise TypeError(
            f"images must be uint8, as the data pipeline returns them, got {images.dtype}; have "
            "they already been normalized?"
        )
    channels = images.shape[-1]
    problems = [
        f"{name} has {len(values)} values"
        for name, values in (("mean", mean), ("std", std))
        if len(values) not in (1, channels)
    ]
    if problems:
        raise ValueError(
            f"mean and std must have one value or {channels}, one per channel, but "
            f"{' and '.join(problems)}"
        )
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be > 0, got {tuple(std)}")
    import jax.numpy as jnp

    scaled = jnp.asarray(images).astype(jnp.float32) / 255
    centered = scaled - jnp.asarray(mean, jnp.float32)
    return (centered / jnp.asarray(std, jnp.float32)).astype(dtype)
