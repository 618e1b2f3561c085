"""Image transforms for evaluation and training, and random augmentation.

What happens to one image on its way into a batch: small steps, composed; uint8 in, uint8 out.

Random steps for training images; every number they draw comes from the given generator.

The transforms that belong to a checkpoint's preprocessing, for evaluation and for training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from flaxtransfer.data.geometry import (
    affine,
    check_image,
    check_interpolation,
    resize_box,
    resize_crop,
)


class Transform(Protocol):
    """A function of an image and a random generator; any callable of that form will do.

    All randomness comes from the generator, so that an example's augmentation depends on nothing
    but the seed and its place in the run.
    """

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Maps uint8 ``[height, width, channels]`` to uint8 ``[size, size, channels]``."""
        ...


def is_random(transform: Transform) -> bool:
    """Whether a transform says that it draws random numbers.

    >>> is_random(Channels())
    False
    """
    return getattr(transform, "random", False)


@dataclass(frozen=True)
class Compose:
    """The steps one after the other; all draw from the same generator, in order."""

    steps: tuple[Transform, ...]

    @property
    def random(self) -> bool:
        """Whether any step is random."""
        return any(is_random(step) for step in self.steps)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        for step in self.steps:
            image = step(image, rng)
        return image


@dataclass(frozen=True)
class ResizeCrop:
    """Shortest side to ``resize`` px, then the central square of ``size`` px."""

    size: int
    resize: int
    interpolation: str = "bilinear"

    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(self)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        del rng  # evaluation draws nothing
        return resize_crop(image, self.size, self.resize, self.interpolation)


@dataclass(frozen=True)
class Channels:
    """Gray replicated to the three channels of RGB; an image with ``count`` of them is left alone.

    Nothing else is converted: a gray image is no image of 13 bands.
    """

    count: int = 3

    random: ClassVar[bool] = False

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        del rng  # nothing is drawn
        check_image(image)
        if image.shape[2] == self.count:
            return image
        if image.shape[2] == 1 and self.count == 3:
            return np.broadcast_to(image, (*image.shape[:2], self.count))
        raise ValueError(
            f"an image of shape {list(image.shape)} has {image.shape[2]} channels, the network "
            f"wants {self.count}; only gray can be replicated, and only to 3"
            + (f"; transfer with bands={image.shape[2]} (--bands)" if self.count == 3 else "")
        )


def check_sizes(step: object, problems: Sequence[str] = ()) -> None:
    """Raises ValueError for a step's problems: those given, and those of its sizes."""
    problems = list(problems)
    size, resize = getattr(step, "size", 1), getattr(step, "resize", None)
    if size < 1:
        problems.append(f"size is {size}, wanted 1 or more px")
    if resize is not None and resize < size:
        problems.append(f"resize is {resize} px, less than the crop's size of {size} px")
    if problems:
        raise ValueError(f"{type(step).__name__}: " + "; ".join(problems))
    check_interpolation(getattr(step, "interpolation", "bilinear"))


@dataclass(frozen=True)
class RandomAffine:
    """``ResizeCrop`` with a random rotation, shift, magnification and shear on top.

    Suits glyphs, scans and whatever else stands centered: nothing is cropped away on purpose. It is
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


class Geometry(Protocol):
    """The part of a checkpoint's preprocessing that concerns pixels' places."""

    @property
    def size(self) -> int:
        """Side of the network's input in px."""
        ...

    @property
    def resize(self) -> int:
        """What the shortest side is resized to before the central crop, in px."""
        ...

    @property
    def interpolation(self) -> str:
        """Name of the resampling."""
        ...


def evaluation_transform(preprocessing: Geometry, *, channels: int = 3) -> Compose:
    """The deterministic transform that belongs to the weights.

    Args:
      preprocessing: a checkpoint's ``Preprocessing``, or anything with its ``size``, ``resize``
        and ``interpolation``.
      channels: of the network's input.

    Returns:
      Maps any image to uint8 ``[size, size, channels]``.
    """
    p = preprocessing
    return Compose((ResizeCrop(p.size, p.resize, p.interpolation), Channels(channels)))


def training_transform(
    preprocessing: Geometry,
    *,
    geometry: Literal["affine", "crop", "none"] = "affine",
    flip: bool = False,
    jitter: bool = False,
    channels: int = 3,
) -> Compose:
    """A usual augmentation around the weights' preprocessing; compose your own for another.

    Args:
      preprocessing: see ``evaluation_transform``.
      geometry: ``"affine"`` for ``RandomAffine``, ``"crop"`` for ``RandomResizedCrop``, each with
        its defaults; ``"none"`` for the evaluation's.
      flip: whether images may be mirrored; ``flip_keeps_labels`` has an opinion on that.
      jitter: whether brightness and contrast vary.
      channels: of the network's input.

    Returns:
      Maps any image to uint8 ``[size, size, channels]``.
    """
    p = preprocessing
    choices: dict[str, Transform] = {
        "affine": RandomAffine(p.size, p.resize, p.interpolation),
        "crop": RandomResizedCrop(p.size, p.interpolation),
        "none": ResizeCrop(p.size, p.resize, p.interpolation),
    }
    if geometry not in choices:
        raise ValueError(f"unknown geometry {geometry!r}; known: {', '.join(choices)}")
    steps: list[Transform] = [choices[geometry]]
    if flip:
        steps.append(HorizontalFlip())
    if jitter:
        steps.append(Jitter())
    # Last, so that gray is processed as one channel.
    return Compose((*steps, Channels(channels)))


_SIDES = re.compile(r"(?i)(^|[^a-z])(left|right|clockwise|counterclockwise)([^a-z]|$)")
_NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}


def flip_keeps_labels(class_names: Sequence[str]) -> bool:
    """Whether a mirror image probably keeps its label, going by the names of the classes.

    False as soon as most classes look like glyphs (a single character or number, or a number
    word), or any name speaks of a side. It is a guess for a default, not knowledge: organs,
    traffic signs and handedness do not show in names.

    >>> flip_keeps_labels(["cat", "dog"]), flip_keeps_labels(["0", "1"])
    (True, False)
    >>> flip_keeps_labels(["left lung", "heart"])
    False
    """
    glyphs = [n for n in class_names if len(n) == 1 or n.isdigit() or n.lower() in _NUMBERS]
    sides = any(_SIDES.search(name) for name in class_names)
    return not sides and 2 * len(glyphs) <= len(class_names)
