"""Augmentation policies: TrivialAugment, RandAugment, random erasing.

Transforms of one uint8 image, to be put after its geometry. Images in red, green and blue get the
operations of the papers; gray images and bands get those that keep their meaning: geometry, noise,
blur and intensity, each band by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from flaxtransfer.data.geometry import check_image, resampling

if TYPE_CHECKING:
    from PIL import Image

LEVELS = 31
"""Strengths of an operation, 0 to 30, evenly spaced over its range."""


class How(NamedTuple):
    """What operations need beside their magnitude."""

    method: Image.Resampling
    fill: int
    rng: np.random.Generator


@dataclass(frozen=True)
class Operation:
    """One operation of a policy.

    Args:
        apply: ``(picture, magnitude, how) -> picture``.
        wide: magnitudes at strength 0 and 30, in TrivialAugment.
        narrow: the same in RandAugment.
        signed: whether the sign of the magnitude is drawn.
    """

    apply: Callable[[Image.Image, float, How], Image.Image]
    wide: tuple[float, float] = (0.0, 0.0)
    narrow: tuple[float, float] = (0.0, 0.0)
    signed: bool = False

    def magnitude(self, level: int, *, narrow: bool, negative: bool = False) -> float:
        """The magnitude at a strength of 0 to 30.

        >>> OPERATIONS["rotate"].magnitude(30, narrow=False, negative=True)
        -135.0
        """
        low, high = self.narrow if narrow else self.wide
        found = low + (high - low) * level / (LEVELS - 1)
        return -found if self.signed and negative else found


def _identity(picture: Image.Image, value: float, how: How) -> Image.Image:
    return picture


def _mapped(picture: Image.Image, matrix: tuple[float, ...], how: How) -> Image.Image:
    from PIL import Image

    color = how.fill if picture.mode == "L" else (how.fill,) * 3
    kind = Image.Transform.AFFINE
    return picture.transform(picture.size, kind, matrix, how.method, fillcolor=color)


def _shear_x(picture: Image.Image, value: float, how: How) -> Image.Image:
    return _mapped(picture, (1, value, 0, 0, 1, 0), how)


def _shear_y(picture: Image.Image, value: float, how: How) -> Image.Image:
    return _mapped(picture, (1, 0, 0, value, 1, 0), how)


def _translate_x(picture: Image.Image, value: float, how: How) -> Image.Image:
    return _mapped(picture, (1, 0, -int(value * picture.width), 0, 1, 0), how)


def _translate_y(picture: Image.Image, value: float, how: How) -> Image.Image:
    return _mapped(picture, (1, 0, 0, 0, 1, -int(value * picture.height)), how)


def _rotate(picture: Image.Image, value: float, how: How) -> Image.Image:
    color = how.fill if picture.mode == "L" else (how.fill,) * 3
    return picture.rotate(value, how.method, fillcolor=color)


def _enhanced(kind: str) -> Callable[[Image.Image, float, How], Image.Image]:
    def apply(picture: Image.Image, value: float, how: How) -> Image.Image:
        from PIL import ImageEnhance

        found: Image.Image = getattr(ImageEnhance, kind)(picture).enhance(1 + value)
        return found

    return apply


def _posterize(picture: Image.Image, value: float, how: How) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.posterize(picture, 8 - round(value))


def _solarize(picture: Image.Image, value: float, how: How) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.solarize(picture, value)  # type: ignore[arg-type]  # fractions work


def _autocontrast(picture: Image.Image, value: float, how: How) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, value: float, how: How) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.equalize(picture)


def _gamma(picture: Image.Image, value: float, how: How) -> Image.Image:
    table = np.rint(255 * (np.arange(256) / 255) ** 2.0**value).astype(int)
    return picture.point(table.tolist())


def _blur(picture: Image.Image, value: float, how: How) -> Image.Image:
    from PIL import ImageFilter

    return picture.filter(ImageFilter.GaussianBlur(value * min(picture.size)))


def _noise(picture: Image.Image, value: float, how: How) -> Image.Image:
    from PIL import Image

    pixels = np.asarray(picture)
    noisy = pixels + 255 * value * how.rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(_identity),
    "shear_x": Operation(_shear_x, (0, 0.99), (0, 0.3), signed=True),
    "shear_y": Operation(_shear_y, (0, 0.99), (0, 0.3), signed=True),
    # Shares of the side: 32 px of 224, and 150 px of 331.
    "translate_x": Operation(_translate_x, (0, 32 / 224), (0, 150 / 331), signed=True),
    "translate_y": Operation(_translate_y, (0, 32 / 224), (0, 150 / 331), signed=True),
    "rotate": Operation(_rotate, (0, 135), (0, 30), signed=True),
    "brightness": Operation(_enhanced("Brightness"), (0, 0.99), (0, 0.9), signed=True),
    "color": Operation(_enhanced("Color"), (0, 0.99), (0, 0.9), signed=True),
    "contrast": Operation(_enhanced("Contrast"), (0, 0.99), (0, 0.9), signed=True),
    "sharpness": Operation(_enhanced("Sharpness"), (0, 0.99), (0, 0.9), signed=True),
    # Bits that are dropped.
    "posterize": Operation(_posterize, (0, 6), (0, 4)),
    # The level from which pixels are inverted.
    "solarize": Operation(_solarize, (255, 0), (255, 0)),
    "autocontrast": Operation(_autocontrast),
    "equalize": Operation(_equalize),
    # The exponent's logarithm, to base 2.
    "gamma": Operation(_gamma, (0, 1), (0, 0.5), signed=True),
    # The standard deviation, of the side and of the range of levels.
    "blur": Operation(_blur, (0, 0.01), (0, 0.005)),
    "noise": Operation(_noise, (0, 0.1), (0, 0.05)),
}
"""All operations. Their ranges are those of torchvision, as far as it has them."""

_GEOMETRY = ("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate")

RGB = (
    *_GEOMETRY,
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""The operations of both papers, for red, green and blue."""

BANDS = (*_GEOMETRY, "brightness", "contrast", "gamma", "sharpness", "blur", "noise")
"""The operations for gray and for bands. Inverted, equalized or coarse levels are left out: there
they are other things, not other pictures of the same thing."""


def apply_operation(
    image: np.ndarray,
    name: str,
    magnitude: float,
    *,
    rgb: bool,
    interpolation: str = "bilinear",
    fill: int = 0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Applies one operation.

    Args:
        image: uint8 ``[height, width, channels]``.
        name: in ``OPERATIONS``.
        magnitude: in the operation's own unit.
        rgb: whether the three channels are one picture; otherwise each is done by itself.
        interpolation: of shears and turns.
        fill: value of pixels from outside the image.
        rng: for noise.

    Returns:
        uint8 of the same shape.

    >>> apply_operation(np.full((1, 2, 1), 200, np.uint8), "brightness", -0.5, rgb=False).ravel()
    array([100, 100], dtype=uint8)
    """
    from PIL import Image

    check_image(image)
    how = How(resampling(interpolation), fill, rng or np.random.default_rng(0))
    apply = OPERATIONS[name].apply
    if rgb:
        return np.asarray(apply(Image.fromarray(np.ascontiguousarray(image)), magnitude, how))
    bands = (np.ascontiguousarray(image[..., band]) for band in range(image.shape[2]))
    return np.stack(
        [np.asarray(apply(Image.fromarray(band), magnitude, how)) for band in bands], axis=-1
    )


def _drawn(
    image: np.ndarray, policy: TrivialAugment | RandAugment, level: int, rng: np.random.Generator
) -> np.ndarray:
    """The image after one operation, drawn evenly from those that fit it."""
    rgb = policy.rgb and image.shape[2] == 3
    names = RGB if rgb else BANDS
    name = names[int(rng.integers(len(names)))]
    narrow = isinstance(policy, RandAugment)
    magnitude = OPERATIONS[name].magnitude(level, narrow=narrow, negative=rng.random() < 0.5)
    return apply_operation(
        image,
        name,
        magnitude,
        rgb=rgb,
        interpolation=policy.interpolation,
        fill=policy.fill,
        rng=rng,
    )


@dataclass(frozen=True)
class TrivialAugment:
    """One operation at one strength, both drawn evenly for each image; nothing is to be tuned.

    It is the wide space of the paper, which turns by up to 135 degrees: not for labels that this
    changes, such as 6 and 9.

    Args:
        rgb: whether images of three channels are red, green and blue. They then get the operations
            ``RGB``; other images, and all of them without it, get ``BANDS``.
        interpolation: of shears and turns.
        fill: value of pixels from outside the image.

    References:
        S. G. Mueller, F. Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data
        Augmentation", 2021.

    >>> image = np.zeros((8, 8, 3), np.uint8)
    >>> TrivialAugment()(image, np.random.default_rng(0)).shape
    (8, 8, 3)
    """

    rgb: bool = True
    interpolation: str = "bilinear"
    fill: int = 0

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        return _drawn(image, self, int(rng.integers(LEVELS)), rng)


@dataclass(frozen=True)
class RandAugment:
    """Some operations, drawn evenly for each image, at one strength that you choose.

    Args:
        count: operations per image, one after the other; the same may be drawn twice.
        strength: of all of them, 0 to 30.
        rgb: see ``TrivialAugment``.
        interpolation: of shears and turns.
        fill: value of pixels from outside the image.

    References:
        E. D. Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced
        Search Space", 2020.

    >>> image = np.zeros((8, 8, 1), np.uint8)
    >>> RandAugment(strength=5)(image, np.random.default_rng(0)).shape
    (8, 8, 1)
    """

    count: int = 2
    strength: int = 9
    rgb: bool = True
    interpolation: str = "bilinear"
    fill: int = 0

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = [] if self.count >= 1 else [f"count must be >= 1, got {self.count}"]
        if not 0 <= self.strength < LEVELS:
            problems.append(f"strength must be 0 to {LEVELS - 1}, got {self.strength}")
        _check(self, problems)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        for _ in range(self.count):
            image = _drawn(image, self, self.strength, rng)
        return image


@dataclass(frozen=True)
class RandomErasing:
    """Fills a random rectangle with random pixels, so that no one part of an image decides.

    Args:
        probability: with which an image loses a rectangle.
        scale: its share of the area is uniform between these two.
        ratio: its height over its width is log-uniform between these two.

    References:
        Z. Zhong et al., "Random Erasing Data Augmentation", 2020.

    >>> image = np.zeros((16, 16, 1), np.uint8)
    >>> bool(RandomErasing(1.0)(image, np.random.default_rng(0)).any())
    True
    """

    probability: float = 0.25
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.probability <= 1:
            problems.append(f"probability must be 0 to 1, got {self.probability}")
        if not 0 < self.scale[0] <= self.scale[1] < 1:
            problems.append(f"scale must be 0 < low <= high < 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            problems.append(f"ratio must be 0 < low <= high, got {self.ratio}")
        if problems:
            raise ValueError("RandomErasing: " + "; ".join(problems))

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        if rng.random() >= self.probability:
            return image
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        erased = image.copy()
        part = erased[top : top + height, left : left + width]
        part[...] = rng.integers(256, size=part.shape, dtype=np.uint8)
        return erased

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a rectangle in px; empty if none was found to fit."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                top = int(rng.integers(height - h + 1))
                return top, int(rng.integers(width - w + 1)), h, w
        return 0, 0, 0, 0


def _check(policy: TrivialAugment | RandAugment, problems: list[str] | None = None) -> None:
    problems = list(problems or [])
    if not 0 <= policy.fill <= 255:
        problems.append(f"fill must be 0 to 255, got {policy.fill}")
    if policy.interpolation not in MAPPINGS:
        known = " or ".join(MAPPINGS)
        problems.append(f"interpolation must be {known}, got {policy.interpolation!r}")
    if problems:
        raise ValueError(f"{type(policy).__name__}: " + "; ".join(problems))


MAPPINGS = ("nearest", "bilinear", "bicubic")
"""Interpolations that Pillow's affine map knows."""
