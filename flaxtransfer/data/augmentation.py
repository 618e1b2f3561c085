"""Random steps for training images; every number they draw comes from the given generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flaxtransfer.data.geometry import affine, check_image, resize_box
from flaxtransfer.data.steps import check_sizes


@dataclass(frozen=True)
class RandomAffine:
    """``ResizeCrop`` with a random rotation, shift, magnification and shear on top.

    Suits glyphs, scans and whatever else stands centred: nothing is cropped away on purpose. It is
    not the crop with which ImageNet networks are trained; that is ``RandomResizedCrop``.

    Attributes:
      degrees: the rotation is uniform in ``-degrees .. degrees``.
      shift: each of the two shifts is uniform in ``-shift .. shift`` times ``size``.
      scale: the magnification is uniform between these two.
      shear: the shear is uniform in ``-shear .. shear`` degrees.
      fill: value of pixels from outside the image.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    degrees: float = 10.0
    shift: float = 0.1
    scale: tuple[float, float] = (0.9, 1.1)
    shear: float = 0.0
    fill: int = 0

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = _range_problems("scale", self.scale, above=0)
        for name in ("degrees", "shift", "shear"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}, wanted 0 or more")
        if abs(self.shear) >= 90:
            problems.append(f"shear is {self.shear}, wanted less than 90 degrees")
        if not 0 <= self.fill <= 255:
            problems.append(f"fill is {self.fill}, wanted 0 to 255")
        check_sizes(self, problems)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        turn, right, down, slant, magnify = rng.random(5).tolist()
        low, high = self.scale
        reach = self.shift * self.size
        return affine(
            image,
            size=self.size,
            resize=self.resize,
            degrees=self.degrees * (2 * turn - 1),
            shift=(reach * (2 * right - 1), reach * (2 * down - 1)),
            scale=low + (high - low) * magnify,
            shear=self.shear * (2 * slant - 1),
            interpolation=self.interpolation,
            fill=self.fill,
        )


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to ``size`` px: the crop of ImageNet training.

    Attributes:
      scale: the part's share of the area is uniform between these two.
      ratio: its width over height is log-uniform between these two.

    References:
      C. Szegedy et al., Going Deeper with Convolutions, 2015.
    """

    size: int
    interpolation: str = "bilinear"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = _range_problems("scale", self.scale, above=0, most=1)
        problems += _range_problems("ratio", self.ratio, above=0)
        check_sizes(self, problems)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        box = self._box(image.shape[0], image.shape[1], rng)
        return resize_box(image, box, self.size, self.interpolation)

    def _box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(*log_ratio))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        # No such box fits a very long image: the largest central one of the nearest ratio.
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclass(frozen=True)
class HorizontalFlip:
    """Left and right exchanged with this probability. Not for labels that it changes."""

    probability: float = 0.5

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is {self.probability}, wanted 0 to 1")

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        return image[:, ::-1] if rng.random() < self.probability else image


@dataclass(frozen=True)
class Jitter:
    """Random brightness and contrast.

    Pixels are multiplied by a factor within ``1 - brightness .. 1 + brightness``, and their
    distance from the image's mean luma by one within ``1 - contrast .. 1 + contrast``, in one
    rounding.
    """

    brightness: float = 0.2
    contrast: float = 0.2

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value}, wanted 0 to 1"
            for name, value in (("brightness", self.brightness), ("contrast", self.contrast))
            if not 0 <= value <= 1
        ]
        if wrong:
            raise ValueError("; ".join(wrong))

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        bright, contrast = (2 * rng.random(2) - 1).tolist()
        bright, contrast = 1 + self.brightness * bright, 1 + self.contrast * contrast
        luma = image.mean(axis=(0, 1))
        mean = luma @ (0.299, 0.587, 0.114) if len(luma) == 3 else luma.mean()
        table = bright * (mean + contrast * (np.arange(256) - mean))
        return np.clip(np.rint(table), 0, 255).astype(np.uint8)[image]


def _range_problems(
    name: str, values: tuple[float, float], *, above: float, most: float = math.inf
) -> list[str]:
    low, high = values
    if above < low <= high <= most:
        return []
    top = "" if most == math.inf else f" <= {most:g}"
    return [f"{name} is {values}, wanted {above:g} < low <= high{top}"]
