"""Image transforms and data augmentation.

Steps on one uint8 image, composed to the transforms for evaluation and for training that belong to
the preprocessing of the weights. All random numbers come from the given generator.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from flaxtransfer.data.augment import RandAugment, RandomErasing, TrivialAugment
from flaxtransfer.data.geometry import (
    affine,
    check_image,
    check_interpolation,
    resize_box,
    resize_crop,
)
from flaxtransfer.paths import suggest
from flaxtransfer.weights.preprocessing import CROP_MODES, PROCESSORS


class Transform(Protocol):
    """A function of an image and a random generator; any such callable is a transform.

    All randomness must come from the generator, so that the augmentation of an example depends
    only on the seed and its position in the run.
    """

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Maps uint8 ``[height, width, channels]`` to uint8 ``[size, size, channels]``."""
        ...


def is_random(transform: Transform) -> bool:
    """Whether a transform declares that it draws random numbers.

    >>> is_random(Channels())
    False
    """
    return getattr(transform, "random", False)


@dataclass(frozen=True)
class Compose:
    """Applies steps in order; all draw from the same generator."""

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
class Channels:
    """Replicates gray to RGB; an image that already has ``count`` channels is left alone.

    Nothing else is converted: a gray image is not an image of 13 bands.
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
            f"images must have {self.count} channels, got {image.shape[2]} (shape "
            f"{list(image.shape)}); only gray can be replicated, and only to 3"
            + (f"; transfer with bands={image.shape[2]} (--bands)" if self.count == 3 else "")
        )


@dataclass(frozen=True)
class ResizeCrop:
    """Resizes the shortest side to ``resize`` px, then crops the central square of ``size`` px.

    ``crop_mode`` and ``processor`` are those of ``weights.Preprocessing``.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    processor: str = "torchvision"

    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(self)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        del rng  # evaluation draws nothing
        return resize_crop(
            image, self.size, self.resize, self.interpolation, self.crop_mode, self.processor
        )


@dataclass(frozen=True)
class RandomAffine:
    """``ResizeCrop`` with a random rotation, shift, magnification and shear.

    Use it for glyphs, scans and other centered objects: nothing is cropped away on purpose. It is
    not the crop with which ImageNet networks are trained; that is ``RandomResizedCrop``.

    Args:
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
    crop_mode: str = "center"
    processor: str = "torchvision"

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = _range_problems("scale", self.scale, above=0)
        for name in ("degrees", "shift", "shear"):
            if getattr(self, name) < 0:
                problems.append(f"{name} must be >= 0, got {getattr(self, name)}")
        if abs(self.shear) >= 90:
            problems.append(f"shear must be < 90 degrees, got {self.shear}")
        if not 0 <= self.fill <= 255:
            problems.append(f"fill must be 0 to 255, got {self.fill}")
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
            crop_mode=self.crop_mode,
            processor=self.processor,
        )


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crops a random part of the image and resizes it to ``size`` px, as in ImageNet training.

    Args:
        scale: the fraction of the area is uniform between these two.
        ratio: width over height is log-uniform between these two.

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
        # No such box fits a very long image: take the largest central one of the nearest ratio.
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors left and right with this probability. It is not for labels that this changes."""

    probability: float = 0.5

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be 0 to 1, got {self.probability}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        if rng.random() >= self.probability:
            return image
        # Band by band: NumPy copies mirrored pixels of several bytes one after the other, slowly.
        mirrored = np.empty_like(image)
        for band in range(image.shape[2]):
            mirrored[..., band] = image[:, ::-1, band]
        return mirrored


@dataclass(frozen=True)
class Jitter:
    """Random brightness and contrast.

    Pixels are multiplied by a factor in ``1 - brightness .. 1 + brightness``, and their distance
    from the mean luma of the image by a factor in ``1 - contrast .. 1 + contrast``. The result is
    rounded once.
    """

    brightness: float = 0.2
    contrast: float = 0.2

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be 0 to 1, got {value}"
            for name, value in (("brightness", self.brightness), ("contrast", self.contrast))
            if not 0 <= value <= 1
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        check_image(image)
        bright, contrast = (2 * rng.random(2) - 1).tolist()
        bright, contrast = 1 + self.brightness * bright, 1 + self.contrast * contrast
        luma = image.mean(axis=(0, 1))
        mean = luma @ (0.299, 0.587, 0.114) if len(luma) == 3 else luma.mean()
        table = bright * (mean + contrast * (np.arange(256) - mean))
        pixels: np.ndarray = np.clip(np.rint(table), 0, 255).astype(np.uint8)[image]
        return pixels


class Geometry(Protocol):
    """The geometric part of a ``Preprocessing``."""

    @property
    def size(self) -> int:
        """Side of the network's input in px."""
        ...

    @property
    def resize(self) -> int:
        """Length of the shortest side before the central crop, in px."""
        ...

    @property
    def interpolation(self) -> str:
        """Name of the resampling."""
        ...

    @property
    def crop_mode(self) -> str:
        """Whether the proportions of the image are kept: "center" or "squash"."""
        ...

    @property
    def processor(self) -> str:
        """Whose rules hold in the details: "torchvision" or "huggingface"."""
        ...


def evaluation_transform(preprocessing: Geometry, *, channels: int = 3) -> Compose:
    """The evaluation transform of the weights: deterministic resize and central crop.

    Args:
        preprocessing: a checkpoint's ``Preprocessing``, or anything with its ``size``, ``resize``,
            ``interpolation``, ``crop_mode`` and ``processor``.
        channels: of the network's input.

    Returns:
        Maps any image to uint8 ``[size, size, channels]``.
    """
    return Compose((_resize_crop(preprocessing), Channels(channels)))


def training_transform(
    preprocessing: Geometry,
    *,
    geometry: Literal["affine", "crop", "none"] = "affine",
    flip: bool = False,
    jitter: bool = False,
    policy: Literal["none", "trivial", "randaugment"] = "none",
    erasing: float = 0.0,
    channels: int = 3,
    rgb: bool = True,
) -> Compose:
    """The default training augmentation, around the preprocessing of the weights.

    For another one, ``Compose`` your own.

    Args:
        preprocessing: see ``evaluation_transform``.
        geometry: ``"affine"`` for ``RandomAffine``, ``"crop"`` for ``RandomResizedCrop``, each with
            its defaults; ``"none"`` for that of evaluation.
        flip: whether images may be mirrored; see ``flip_keeps_labels``.
        jitter: whether brightness and contrast vary.
        policy: "trivial" for ``TrivialAugment``, "randaugment" for ``RandAugment``, each with its
            defaults, after the geometry.
        erasing: probability of ``RandomErasing``, which comes last.
        channels: of the network's input.
        rgb: whether images of three channels are red, green and blue; see ``TrivialAugment``.

    Returns:
        Maps any image to uint8 ``[size, size, channels]``.

    Raises:
        ValueError: an unknown geometry or policy, or a probability out of range.
    """
    p = preprocessing
    choices: dict[str, Transform] = {
        "affine": RandomAffine(
            p.size, p.resize, p.interpolation, crop_mode=p.crop_mode, processor=p.processor
        ),
        "crop": RandomResizedCrop(p.size, p.interpolation),
        "none": _resize_crop(p),
    }
    if geometry not in choices:
        raise ValueError(
            f"unknown geometry {geometry!r}{suggest(geometry, choices)}; known: "
            f"{', '.join(choices)}"
        )
    policies: dict[str, list[Transform]] = {
        "none": [],
        "trivial": [TrivialAugment(rgb=rgb)],
        "randaugment": [RandAugment(rgb=rgb)],
    }
    if policy not in policies:
        raise ValueError(
            f"policy must be one of {', '.join(policies)}, got {policy!r}"
            f"{suggest(policy, policies)}"
        )
    steps: list[Transform] = [choices[geometry]]
    if flip:
        steps.append(HorizontalFlip())
    if jitter:
        steps.append(Jitter())
    steps += policies[policy]
    if erasing:
        steps.append(RandomErasing(erasing))
    # Replication comes last, so that gray is processed as one channel.
    return Compose((*steps, Channels(channels)))


def _resize_crop(p: Geometry) -> ResizeCrop:
    return ResizeCrop(p.size, p.resize, p.interpolation, p.crop_mode, p.processor)


_SIDES = re.compile(r"(?i)(^|[^a-z])(left|right|clockwise|counterclockwise)([^a-z]|$)")
_NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}


def flip_keeps_labels(class_names: Sequence[str]) -> bool:
    """Whether a mirror image probably keeps its label, judged by the names of the classes.

    False if most classes look like glyphs (a single character or number, or a number word), or if
    any name mentions a side. It is a guess for a default: organs, traffic signs and handedness do
    not show in names.

    >>> flip_keeps_labels(["cat", "dog"]), flip_keeps_labels(["0", "1"])
    (True, False)
    >>> flip_keeps_labels(["left lung", "heart"])
    False
    """
    glyphs = [n for n in class_names if len(n) == 1 or n.isdigit() or n.lower() in _NUMBERS]
    sides = any(_SIDES.search(name) for name in class_names)
    return not sides and 2 * len(glyphs) <= len(class_names)


def check_sizes(step: object, problems: Sequence[str] = ()) -> None:
    """Raises ValueError for the given problems of a step and those of its sizes."""
    problems = list(problems)
    size, resize = getattr(step, "size", 1), getattr(step, "resize", None)
    if size < 1:
        problems.append(f"size must be >= 1 px, got {size}")
    if resize is not None and resize < size:
        problems.append(f"resize must be >= size ({size} px), got {resize} px")
    for name, known in (("crop_mode", CROP_MODES), ("processor", PROCESSORS)):
        if (value := getattr(step, name, known[0])) not in known:
            problems.append(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    if problems:
        raise ValueError(f"{type(step).__name__}: " + "; ".join(problems))
    check_interpolation(getattr(step, "interpolation", "bilinear"))


def _range_problems(
    name: str, values: tuple[float, float], *, above: float, most: float = math.inf
) -> list[str]:
    low, high = values
    if above < low <= high <= most:
        return []
    top = "" if most == math.inf else f" <= {most:g}"
    return [f"{name} must be {above:g} < low <= high{top}, got {values}"]
